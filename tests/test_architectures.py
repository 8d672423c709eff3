"""A converted checkpoint opens in transformers, with exactly the tensors of the source quantized on load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.checkpoints import (
    HEADS,
    LISTED,
    OTHERS,
    WITHOUT_COLUMNS,
    Tiny,
    build_tiny,
    quantize_with_bitsandbytes,
    read_all,
    read_json,
    read_tensors,
    save_tiny,
)
from torch import Tensor

from int8cli import ConvertOptions, convert, load_model
from int8cli.loaders.transformers_versions import SURVEYED, float32_of, release, skip_rule
from int8cli.planning.plan import model_types

LEFT_ALONE_ENTIRELY = ("falcon",)
# Quantized on load, these do not run: their code multiplies the weight of a layer by itself. convert leaves it alone.
WITH_LAYERS_THAT_DO_NOT_RUN = ("MambaForCausalLM",)
IS_NEWEST = release(transformers.__version__) >= release(SURVEYED[-1])
BOTH_HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def load(directory: Path, class_name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model as transformers opens it, and what it found missing, unexpected or mismatched."""
    import transformers

    model_class = getattr(transformers, class_name)
    model, info = model_class.from_pretrained(directory, output_loading_info=True, device_map="cpu", **options)
    return model, {key: sorted(map(str, found)) for key, found in info.items() if found}


def quantize_on_load(directory: Path, class_name: str) -> dict[str, Tensor]:
    from transformers import BitsAndBytesConfig

    model, _ = load(directory, class_name, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    return dict(model.state_dict())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bytes."""
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_opens_as_quantized_on_load(source: Path, output: Path, class_name: str) -> dict[str, Tensor]:
    """Returns the state dict of the converted checkpoint."""
    model, complaints = load(output, class_name)
    assert complaints == {}
    state = dict(model.state_dict())
    theirs = quantize_on_load(source, class_name)
    equal = IS_NEWEST and class_name not in WITH_LAYERS_THAT_DO_NOT_RUN
    others = {} if equal else in_another_precision(state, theirs, output)
    assert_same({**state, **others}, theirs)
    return state


def in_another_precision(ours: dict[str, Tensor], theirs: dict[str, Tensor], output: Path) -> dict[str, Tensor]:
    """What this version would hold in another precision, as the tables say, in the form that it chooses.

    That is float32 that a later version introduced, and layers that config.json names as left alone. The values must be
    those of the source: the other's floats exactly, or what quantizes to the other's int8.
    """
    config = read_json(output / "config.json")
    rule, version = skip_rule(transformers.__version__), release(transformers.__version__)
    later = [fact for fact in float32_of(model_types(config)) if release(fact.since) > version]
    found = dict[str, Tensor]()
    for name in ours.keys() & theirs.keys():
        module, is_weight = name.removesuffix(".weight"), name.endswith(".weight")
        if is_weight and ours[name].dtype == torch.float32 and any(fact.covers(module) for fact in later):
            found[name] = ours[name].to(theirs[name].dtype)
            assert torch.equal(found[name].float(), ours[name])
        elif is_weight and theirs[name].dtype == torch.int8 and ours[name].dtype != torch.int8:
            assert any(rule(entry, module) for entry in config["quantization_config"]["llm_int8_skip_modules"])
            found[name], found[f"{module}.SCB"] = quantize_with_bitsandbytes(ours[name])
            found[f"{module}.weight_format"] = theirs[f"{module}.weight_format"]
    return found


def converted(tiny: Tiny, directory: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """Source and output directories of a tiny model."""
    source, output = directory / "source", directory / "output"
    build_tiny(tiny, dtype).save_pretrained(source)
    convert(source, output, WITHOUT_COLUMNS)
    return source, output


@BOTH_HALVES
@pytest.mark.parametrize("name", LISTED)
def test_a_listed_architecture_opens_as_if_quantized_on_load(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, output = converted(LISTED[name], tmp_path, dtype)
    state = assert_opens_as_quantized_on_load(source, output, LISTED[name].model)
    assert any(tensor.dtype == torch.int8 for tensor in state.values()) == (name not in LEFT_ALONE_ENTIRELY)


_LAYOUT = {
    **dict.fromkeys(("hidden_size", "input_size"), 32),
    **dict.fromkeys(("coordinate_size", "num_attention_heads"), 4),
    "vocab_size": 99,
    "num_hidden_layers": 2,
    "intermediate_size": 56,
    "shape_size": 8,
    "visual_embed": False,
    **dict.fromkeys(("max_position_embeddings", "max_2d_position_embeddings"), 64),
}
_TOKENS = torch.arange(4, 16)[None]
# Models whose own code reads the weight of a linear layer, and their inputs.
READING = {
    "mamba": (LISTED["mamba"], {"input_ids": _TOKENS}),
    "falcon_mamba": (OTHERS["falcon_mamba"], {"input_ids": _TOKENS}),
    "jamba": (OTHERS["jamba"], {"input_ids": _TOKENS}),
    "layoutlmv3": (
        Tiny("LayoutLMv3ForTokenClassification", "LayoutLMv3Config", _LAYOUT),
        {"input_ids": _TOKENS, "bbox": torch.arange(48).reshape(1, 12, 4)},
    ),
}


@pytest.mark.parametrize("name", READING)
def test_a_model_runs_whose_own_code_reads_the_weight_of_a_linear_layer(name: str, tmp_path: Path) -> None:
    if name == "falcon_mamba" and release(transformers.__version__) < release("5.23.0"):
        pytest.skip("not built by the arguments of the newest transformers")
    tiny, inputs = READING[name]
    source, output = converted(tiny, tmp_path)
    with torch.no_grad():
        expected = load(source, tiny.model)[0].eval()(**inputs).logits.float()
        for model in (load(output, tiny.model)[0], load_model(output)):
            assert any(tensor.dtype == torch.int8 for tensor in model.state_dict().values())
            assert (model.eval()(**inputs).logits.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_file_with_more_digits_than_the_config_names_opens_as_if_quantized_on_load(
    name: str, stored: torch.dtype, tmp_path: Path
) -> None:
    if name == "t5" and release(transformers.__version__) < release("5.23.0"):
        pytest.skip("transformers 5.0.0 holds the wo of an int8 T5 in float32 in every dtype")
    source, output = tmp_path / "source", tmp_path / "output"
    build_tiny(LISTED[name], stored).save_pretrained(source)
    config = read_json(source / "config.json")
    config.pop("torch_dtype", None)
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    convert(source, output, ConvertOptions(outliers="none", float32="float16"))
    assert_opens_as_quantized_on_load(source, output, LISTED[name].model)


@pytest.mark.parametrize("name", HEADS)
def test_another_head_opens_as_if_quantized_on_load(name: str, tmp_path: Path) -> None:
    source, output = converted(HEADS[name], tmp_path)
    assert_opens_as_quantized_on_load(source, output, HEADS[name].model)


@pytest.mark.parametrize("name", OTHERS)
def test_an_unlisted_architecture_opens_as_if_quantized_on_load(name: str, tmp_path: Path) -> None:
    source, output = converted(OTHERS[name], tmp_path)
    assert_opens_as_quantized_on_load(source, output, OTHERS[name].model)


# Checkpoints in the wild


def rewrite(source: Path, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Give the tensors of a single-file checkpoint other names."""
    tensors = {rename(name): tensor for name, tensor in read_all(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return tensors


def edit_config(source: Path, *removed: str, **changed: Any) -> None:
    config = {key: value for key, value in read_json(source / "config.json").items() if key not in removed}
    (source / "config.json").write_text(json.dumps(config | changed))


@pytest.mark.parametrize(
    ("name", "prefix"), [("bloom", "transformer."), ("gpt2", "transformer."), ("bert", "bert."), ("opt", "model.")]
)
def test_names_without_the_base_model_prefix_open_too(name: str, prefix: str, tmp_path: Path) -> None:
    source = save_tiny(name, tmp_path / "source")
    renamed = rewrite(source, lambda tensor: tensor.removeprefix(prefix))
    assert not any(tensor.startswith(prefix) for tensor in renamed)
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert_opens_as_quantized_on_load(source, tmp_path / "output", LISTED[name].model)


@pytest.mark.parametrize("name", ["opt", "opt-projected", "gpt2", "llama-tied", "gemma2", "qwen3"])
def test_the_checkpoint_of_a_language_model_opens_as_its_base_model(name: str, tmp_path: Path) -> None:
    source, output = converted(LISTED[name], tmp_path)
    model, _ = load(output, "AutoModel")
    assert_same(dict(model.state_dict()), quantize_on_load(source, "AutoModel"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_config_without_dtype_gets_that_of_the_weights(name: str, tmp_path: Path) -> None:
    source = save_tiny(name, tmp_path / "source")
    edit_config(source, "dtype", "torch_dtype")
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert_opens_as_quantized_on_load(source, tmp_path / "output", LISTED[name].model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_float32_through_float16_opens_as_if_quantized_on_load(name: str, tmp_path: Path) -> None:
    source = save_tiny(name, tmp_path / "source", torch.float32)
    convert(source, tmp_path / "output", ConvertOptions(outliers="none", float32="float16"))
    assert_opens_as_quantized_on_load(source, tmp_path / "output", LISTED[name].model)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5-gated", "whisper", "deepseek_v3"])
def test_shards_open_as_if_quantized_on_load(name: str, tmp_path: Path) -> None:
    source = save_tiny(name, tmp_path / "source", max_shard_size="15KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert_opens_as_quantized_on_load(source, tmp_path / "output", LISTED[name].model)


def test_what_transformers_writes_itself_is_what_we_write(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    source = save_tiny("llama", tmp_path / "source")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=quantization, device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    convert(source, tmp_path / "ours", WITHOUT_COLUMNS)
    assert_same(
        read_tensors(tmp_path / "ours" / "model.safetensors"), read_tensors(tmp_path / "theirs" / "model.safetensors")
    )


def test_a_converted_model_computes(tmp_path: Path) -> None:
    source, output = converted(LISTED["llama"], tmp_path)
    ids = torch.tensor([[1, 5, 7, 11]])
    with torch.no_grad():
        int8 = load(output, "LlamaForCausalLM")[0](ids).logits.float()
        original = load(source, "LlamaForCausalLM")[0](ids).logits.float()
    assert 0 < (int8 - original).norm() / original.norm() < 0.05


def test_of_experts_and_routers_nothing_is_int8_and_the_report_says_so(tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "source")
    report = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report
    written = read_all(tmp_path / "output")
    reasons = {group.kind: group.reason for group in report.left_alone}
    assert not [n for n, t in written.items() if t.dtype == torch.int8 and (".experts." in n or ".gate." in n)]
    assert {r for kind, r in reasons.items() if "experts.*" in kind} == {"expert, fused by transformers"}
    assert {r for kind, r in reasons.items() if kind.endswith(".gate.weight")} == {"MoE router"}


def test_falcon_is_not_quantized_and_the_report_says_so(tmp_path: Path) -> None:
    report = convert(save_tiny("falcon", tmp_path / "source"), tmp_path / "output", WITHOUT_COLUMNS).report
    assert report.percent_quantized == 0.0
    assert any("linear class of the model's own" in group.reason for group in report.left_alone)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_base_model_with_a_pooler_loads_from_a_masked_language_model_without(
    architecture: str, tmp_path: Path
) -> None:
    convert(save_tiny(architecture, tmp_path / "source", torch.bfloat16), tmp_path / "output", WITHOUT_COLUMNS)
    model = transformers.AutoModel.from_pretrained(tmp_path / "output", device_map="cpu")
    assert type(model.pooler.dense) is torch.nn.Linear
    assert model.encoder.layer[0].output.dense.weight.dtype == torch.int8


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "opt", "bert", "roberta"])
def test_a_language_model_opens_as_a_classifier_with_a_new_head(architecture: str, tmp_path: Path) -> None:
    source = save_tiny(architecture, tmp_path / "source", torch.bfloat16)
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    classifier = transformers.AutoModelForSequenceClassification
    model = classifier.from_pretrained(tmp_path / "output", device_map="cpu", num_labels=3)
    model.config.pad_token_id = 1
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)
    assert any(tensor.dtype == torch.int8 for tensor in model.state_dict().values())
