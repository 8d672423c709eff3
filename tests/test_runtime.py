"""The runtime: every int8 layer of a loaded model, compared with the decomposition in float64."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import LISTED, WITHOUT_COLUMNS, build_tiny, read_all, save_tiny
from torch import Tensor

import int8cli
from int8cli import ConvertOptions, convert
from int8cli.commands.options import LayoutName
from int8cli.errors import CheckpointError, MissingExtraError, ModelNotFoundError, OptionError, UnsupportedModelError
from int8cli.llm_int8.matmul import InputScheme
from int8cli.runtime.linear import Int8Linear

Tensors = dict[str, Tensor]
# Beside float64: four roundings in float32 of the int8 part, and a float32 sum over the stored columns.
TOLERANCE = 2e-6

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(5))


def columns_of(name: str, in_features: int) -> list[int]:
    """Two or three columns that differ from layer to layer; some layers have none stored."""
    start = sum(name.encode()) % in_features
    return sorted({start, (start + 5) % in_features, in_features - 1}) if len(name) % 4 else []


def store_columns(source: Path, output: Path) -> Tensors:
    """Write the sidecar of a conversion, from its source; returns what it holds."""
    original, converted = read_all(source), read_all(output)
    transposed = json.loads((source / "config.json").read_text())["model_type"] == "gpt2"
    stored: Tensors = {}
    for name, data in converted.items():
        columns = columns_of(name, data.shape[-1]) if data.dtype == torch.int8 else []
        if columns:
            weight = original[name].t() if transposed else original[name]
            stored[f"{name.removesuffix('.weight')}.outlier_cols"] = torch.tensor(columns, dtype=torch.int32)
            stored[f"{name.removesuffix('.weight')}.outlier_weight"] = weight[:, columns].contiguous()
    assert stored
    write_sidecar(output, stored)
    return stored


def write_sidecar(output: Path, stored: Mapping[str, Tensor]) -> None:
    (output / "int8/outliers").mkdir(parents=True, exist_ok=True)
    save_file(dict(stored), output / "int8/outliers/model.safetensors")


def converted(
    architecture: str, directory: Path, dtype: torch.dtype = torch.float32, layout: LayoutName = "bitsandbytes"
) -> Path:
    source = save_tiny(architecture, directory / "source", dtype)
    convert(source, directory / "out", ConvertOptions(outliers="none", layout=layout))
    return directory / "out"


def run(model: Any) -> Any:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **decoder)


@contextmanager
def watched(model: Any) -> Iterator[dict[Int8Linear, tuple[Tensor, Tensor]]]:
    """The last input and output of each int8 layer."""
    seen: dict[Int8Linear, tuple[Tensor, Tensor]] = {}

    def take(layer: Int8Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[layer] = (inputs[0].flatten(0, -2), output.flatten(0, -2))

    handles = [m.register_forward_hook(take) for m in model.modules() if isinstance(m, Int8Linear)]
    yield seen
    for handle in handles:
        handle.remove()


def decomposition(x: Tensor, files: Tensors, stored: Tensors, name: str, scheme: InputScheme) -> Tensor:
    """Stored columns in floats, the rest of X with one float32 scale a token, all products and sums in float64."""
    columns = stored.get(f"{name}.outlier_cols", torch.empty(0)).tolist()
    rest = x.float().clone()
    rest[:, columns] = 0
    low, high = rest.amin(dim=1, keepdim=True).clamp(max=0), rest.amax(dim=1, keepdim=True).clamp(min=0)
    if scheme == "absmax":
        step, zero = torch.maximum(high, -low) / 127, torch.tensor(0.0)
    else:
        step = (high - low) / 255
        zero = torch.round(-128 - low / step)
    whole = (rest / step + zero).round().clamp(-128, 127).double() - zero.double()
    scales = files[f"{name}.SCB"].double() / 127 if f"{name}.SCB" in files else files[f"{name}.weight_scale"].double()
    result = (whole @ files[f"{name}.weight"].double().t()) * step.double() * scales.reshape(-1)
    if columns:
        result += x[:, columns].double() @ stored[f"{name}.outlier_weight"].double().t()
    return result + files.get(f"{name}.bias", torch.zeros(())).double()


def names_by_data(files: Tensors) -> Callable[[Int8Linear], str]:
    """Identifies layers by their int8 data, which differ, and not by the names under test."""
    names = {
        data.numpy().tobytes(): name.removesuffix(".weight") for name, data in files.items() if data.dtype == torch.int8
    }
    return lambda layer: names[layer.weight.numpy().tobytes()]


def check_layers(model: Any, output: Path, stored: Tensors, scheme: InputScheme = "zeropoint") -> None:
    files = read_all(output)
    name_of = names_by_data(files)
    with watched(model) as seen:
        run(model)
    reached = {name_of(layer) for layer in seen}
    assert reached == {name.removesuffix(".weight") for name, data in files.items() if data.dtype == torch.int8}
    for layer, (x, y) in seen.items():
        exact = decomposition(x, files, stored, name_of(layer), scheme)
        assert float((y.double() - exact).abs().max()) <= TOLERANCE * float(exact.abs().max()), name_of(layer)


TEXT_MODELS = ("gpt2", "bloom", "t5", "opt", "llama", "bert", "gpt_neox", "phi3", "bart", "qwen3_moe")


@pytest.mark.parametrize("architecture", TEXT_MODELS)
def test_every_layer_computes_the_decomposition(architecture: str, tmp_path: Path) -> None:
    output = converted(architecture, tmp_path)
    stored = store_columns(tmp_path / "source", output)
    model = int8cli.load_model(output, device="cpu")
    assert type(model).__name__ == LISTED[architecture].model
    assert not model.training
    check_layers(model, output, stored)


def test_names_without_the_base_models_prefix_find_their_layers(tmp_path: Path) -> None:
    source = save_tiny("bloom-base", tmp_path / "source", torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BloomForCausalLM"]}))
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    assert "h.0.mlp.dense_h_to_4h.weight" in read_all(tmp_path / "out")
    stored = store_columns(source, tmp_path / "out")
    model = int8cli.load_model(tmp_path / "out", device="cpu")
    assert type(model).__name__ == "BloomForCausalLM"
    check_layers(model, tmp_path / "out", stored)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_symmetric_inputs_and_both_layouts(layout: LayoutName, tmp_path: Path) -> None:
    output = converted("llama-biased", tmp_path, layout=layout)
    stored = store_columns(tmp_path / "source", output)
    check_layers(int8cli.load_model(output, inputs="absmax", device="cpu"), output, stored, "absmax")


def test_without_sidecars_all_columns_are_int8(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    model = int8cli.load_model(output, device="cpu")
    check_layers(model, output, {})
    assert all(not m.outlier_cols.numel() for m in model.modules() if isinstance(m, Int8Linear))


def test_results_have_the_models_dtype_and_are_rounded_to_it_once(tmp_path: Path) -> None:
    output = converted("llama-biased", tmp_path, torch.bfloat16)
    stored = store_columns(tmp_path / "source", output)
    model = int8cli.load_model(output, device="cpu")
    files = read_all(output)
    name_of = names_by_data(files)
    with watched(model) as seen:
        assert run(model).logits.dtype == model.dtype == torch.bfloat16
    for layer, (x, y) in seen.items():
        exact = decomposition(x, files, stored, name_of(layer), "zeropoint")
        assert y.dtype == torch.bfloat16
        # Half a unit in the last place, and what float32 adds to it.
        torch.testing.assert_close(y.double(), exact, rtol=2**-8 + 1e-5, atol=TOLERANCE * float(exact.abs().max()))


def test_another_dtype_does_not_change_what_was_stored(tmp_path: Path) -> None:
    output = converted("llama", tmp_path, torch.bfloat16)
    store_columns(tmp_path / "source", output)
    model = int8cli.load_model(output, device="cpu", dtype=torch.float32)
    assert run(model).logits.dtype == torch.float32
    stored = [m for m in model.modules() if isinstance(m, Int8Linear) and m.outlier_cols.numel()]
    assert stored
    assert {m.outlier_weight.dtype for m in stored} == {torch.bfloat16}


# transformers renames tensors of the last two on load, and 5.0 to 5.22 leave those in the dtype of the file.
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_all_floats_get_the_dtype_that_is_asked_for(stored: torch.dtype, architecture: str, tmp_path: Path) -> None:
    asked = torch.float32 if stored == torch.bfloat16 else torch.bfloat16
    output = converted(architecture, tmp_path, stored)
    model = int8cli.load_model(output, device="cpu", dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {asked}
    assert run(model).logits.dtype == asked


def test_a_layer_keeps_its_scales_when_a_model_is_cast() -> None:
    layer = Int8Linear(4, 3, None, inputs="zeropoint", columns=1, device="cpu")
    layer.weight.fill_(1)
    layer.row_absmax.fill_(1e-6)  # would be 0 in float16
    layer.prepare()
    assert layer.half().row_absmax.tolist() == torch.full((3,), 1e-6).tolist()
    assert layer.row_sums.tolist() == [4, 4, 4]


def test_generation_starts_as_the_forward_pass_says_and_with_the_saved_settings(tmp_path: Path) -> None:
    source = save_tiny("llama-tied", tmp_path / "source")
    settings = {"eos_token_id": 98, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "out", WITHOUT_COLUMNS)
    store_columns(source, tmp_path / "out")
    model = int8cli.load_model(tmp_path / "out", device="cpu")
    ids = model.generate(IDS, attention_mask=torch.ones_like(IDS))
    assert ids.shape == (2, 10)
    assert torch.equal(ids[:, 7], run(model).logits[:, -1].argmax(dim=-1))


def test_stored_columns_restore_the_accuracy_that_outliers_cost(tmp_path: Path) -> None:
    model = build_tiny(LISTED["llama"], torch.float32)
    columns, scale = [3, 17], 256.0
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[columns] *= scale
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                linear.weight[:, columns] /= scale
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", WITHOUT_COLUMNS)
    exact = run(model).logits
    before = run(int8cli.load_model(tmp_path / "out", device="cpu")).logits
    weights = read_all(tmp_path / "source")
    stored = {}
    for name in weights:
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            stored[name.replace(".weight", ".outlier_cols")] = torch.tensor(columns, dtype=torch.int32)
            stored[name.replace(".weight", ".outlier_weight")] = weights[name][:, columns].contiguous()
    write_sidecar(tmp_path / "out", stored)
    after = run(int8cli.load_model(tmp_path / "out", device="cpu")).logits
    assert float((after - exact).norm()) < 0.1 * float((before - exact).norm())


def wrong_sidecars() -> Iterator[Any]:
    layer = "model.layers.0.mlp.up_proj"
    columns, weights = f"{layer}.outlier_cols", f"{layer}.outlier_weight"
    good = {columns: torch.tensor([1, 4], dtype=torch.int32), weights: torch.zeros(56, 2)}
    yield pytest.param({**good, weights: torch.zeros(56, 3)}, r"F32 \[56, 3\]", id="number of columns")
    yield pytest.param({**good, weights: torch.zeros(32, 2)}, r"56 outputs", id="number of outputs")
    yield pytest.param({**good, columns: torch.tensor([1, 4])}, "I64", id="dtype")
    yield pytest.param({columns: good[columns]}, "missing", id="no weights")
    yield pytest.param({**good, columns: torch.tensor([4, 1], dtype=torch.int32)}, "ascending", id="order")
    yield pytest.param({**good, columns: torch.tensor([1, 32], dtype=torch.int32)}, "below 32", id="range")
    yield pytest.param({"lm_head.outlier_cols": good[columns]}, "that is not in int8", id="unknown layer")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(("stored", "message"), list(wrong_sidecars()))
def test_stored_columns_that_do_not_fit_are_an_error(llama: Path, stored: Tensors, message: str) -> None:
    write_sidecar(llama, stored)
    with pytest.raises(CheckpointError, match=message) as raised:
        int8cli.load_model(llama, device="cpu")
    assert raised.value.hint


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("weight", torch.zeros(32, dtype=torch.int8)),
        ("weight", torch.zeros(4, 4, 4, dtype=torch.int8)),
        ("weight", torch.tensor(1, dtype=torch.int8)),
        ("SCB", torch.zeros(3)),
        ("SCB", torch.zeros(32, dtype=torch.int32)),
    ],
)
def test_an_int8_weight_without_one_scale_per_row_is_an_error(part: str, wrong: Tensor, tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    tensors = read_all(output)
    name = "model.layers.0.self_attn.q_proj"
    save_file({**tensors, f"{name}.{part}": wrong}, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}\.weight is I8"):
        int8cli.load_model(output, device="cpu")


def test_a_directory_that_convert_did_not_write_is_refused(tmp_path: Path) -> None:
    plain = save_tiny("llama", tmp_path / "plain")
    with pytest.raises(UnsupportedModelError, match="no int8 weights") as raised:
        int8cli.load_model(plain)
    assert "convert" in raised.value.hint
    with pytest.raises(ModelNotFoundError):
        int8cli.load_model(tmp_path / "nothing")


def test_a_model_unknown_to_transformers_is_refused(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "model_type": "new", "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(UnsupportedModelError, match="never run") as raised:
        int8cli.load_model(output)
    assert "--from" not in raised.value.hint


def test_a_config_of_other_sizes_is_an_error(tmp_path: Path) -> None:
    output = converted("llama", tmp_path)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointError, match=r"mlp\.\w+\.weight has the shape"):
        int8cli.load_model(output, device="cpu")


def test_without_transformers_the_extra_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="transformers") as raised:
        int8cli.load_model(llama)
    assert "calibrate" in raised.value.hint


def test_the_package_imports_no_torch_until_a_model_is_loaded() -> None:
    code = "import sys, int8cli; assert 'torch' not in sys.modules; int8cli.load_model; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        int8cli.no_such_thing  # noqa: B018


def test_a_transformers_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = converted("llama", tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.6")
    with pytest.raises(MissingExtraError, match=r"needs transformers 5\.0\.0 or newer; 4\.57\.6 is installed"):
        int8cli.load_model(out)


def test_a_form_of_inputs_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'xx' is not one of absmax, zeropoint"):
        int8cli.load_model(tmp_path, inputs="xx")  # type: ignore[arg-type]
