"""Sources of 8-bit floats with scales are converted as the floats that they stand for."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration_models import make_model, some_text
from support.checkpoints import WITHOUT_COLUMNS, read_all, read_json, save_by_hand, save_tiny
from support.float8 import BLOCKS, STYLES, encoded, meant, write_float8
from support.hub_stand_in import HubStandIn
from support.program import Nursery, tree
from support.smoothing import spread
from support.verifying import verified
from test_evaluate import evaluated
from test_fused_experts import fused, matrices, source_of
from torch import Tensor

from int8cli import ConvertOptions, InspectOptions, convert, dequantize, estimate_memory, inspect_outliers
from int8cli.commands.options import LayoutName
from int8cli.errors import AlreadyQuantizedError, NonFiniteError
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.suspects import WeightSuspects
from int8cli.report.outliers_json import statistics_to_json, suspects_to_json
from int8cli.results.evaluation import evaluation_to_json

ARCHITECTURES = ("llama", "qwen3", "deepseek_v3")
PROJECTION = "model.layers.0.self_attn.q_proj"


def as_16_bit(source: Path, floats: dict[str, Tensor], directory: Path) -> Path:
    """The checkpoint that an FP8 one stands for, written as one of 16 bit, with its tokenizer."""
    directory.mkdir(parents=True)
    for path in source.glob("tokenizer*.json"):
        shutil.copy(path, directory)
    config = {key: value for key, value in read_json(source / "config.json").items() if key != "quantization_config"}
    return save_by_hand(directory, {name: tensor.contiguous() for name, tensor in floats.items()}, config)


def reads_float8() -> bool:
    """Whether the installed transformers can read 8-bit floats here: older ones import triton for it, on a CPU too."""
    try:
        importlib.import_module("transformers.integrations.finegrained_fp8")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return False
    return True


def different(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """The names of tensors that only one has, or that differ in dtype or in a bit."""
    both = found.keys() & wanted.keys()
    unlike = [
        name for name in both if found[name].dtype != wanted[name].dtype or not torch.equal(found[name], wanted[name])
    ]
    return sorted({*(found.keys() ^ wanted.keys()), *unlike})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("apart", [False, True])
def test_blocks_stand_for_what_transformers_reads(architecture: str, apart: bool, tmp_path: Path) -> None:
    """Held against transformers' own dequantization, on the CPU, bit for bit."""
    import transformers

    if not reads_float8():
        pytest.skip("this transformers needs triton to read 8-bit floats")
    save_tiny(architecture, tmp_path / "source")
    write_float8(tmp_path / "source", tmp_path / "fp8", apart=apart)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    model.config.quantization_config = None
    model.hf_quantizer = None
    model.save_pretrained(tmp_path / "dequantized")
    convert(tmp_path / "dequantized", tmp_path / "wanted", WITHOUT_COLUMNS)
    convert(tmp_path / "fp8", tmp_path / "out", WITHOUT_COLUMNS)
    wanted, found = read_all(tmp_path / "wanted"), read_all(tmp_path / "out")
    held_in_float32 = [name for name in wanted if name.endswith("correction_bias")]  # as it was saved from memory
    assert different(found, wanted) == held_in_float32


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_every_style_of_scales_converts_like_its_floats(style: str, layout: LayoutName, tmp_path: Path) -> None:
    options = ConvertOptions(outliers="none", layout=layout)
    save_tiny("deepseek_v3", tmp_path / "source")
    floats = write_float8(tmp_path / "source", tmp_path / "fp8", STYLES[style], apart=True)
    convert(as_16_bit(tmp_path / "fp8", floats, tmp_path / "floats"), tmp_path / "wanted", options)
    convert(tmp_path / "fp8", tmp_path / "out", options)
    wanted, found = read_all(tmp_path / "wanted"), read_all(tmp_path / "out")
    assert different(found, wanted) == []
    assert read_json(tmp_path / "out" / "config.json") == read_json(tmp_path / "wanted" / "config.json")
    verification = verified(tmp_path / "out", tmp_path / "fp8")
    assert verification.passed, [failure for check in verification.checks for failure in check.failures]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in blocks of 8-bit floats, and the same in the floats that it stands for. Each with a tokenizer."""
    root = tmp_path_factory.mktemp("pair")
    make_model("llama", root / "source")
    floats = write_float8(root / "source", root / "model", apart=True)
    return root / "model", as_16_bit(root / "model", floats, root / "floats" / "model")


@pytest.mark.parametrize("outliers", ["activations", "weights"])
def test_stored_columns_are_those_of_the_floats(outliers: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(some_text().text)
    options = ConvertOptions(outliers=outliers, outlier_columns=4)
    if outliers == "activations":
        options = replace(options, text=tmp_path / "text", tokens=48, sequence_length=16)
    model = pair[0]
    if outliers == "weights":  # the columns of a shard come from the shards up to it, so those must be alike
        model = tmp_path / "one-shard"
        write_float8(pair[0].parent / "source", model)
    convert(model, tmp_path / "0", options)
    convert(pair[1], tmp_path / "1", options)
    assert different(read_all(tmp_path / "0"), read_all(tmp_path / "1")) == []
    assert any(name.endswith("outlier_weight") for name in read_all(tmp_path / "0"))
    assert verified(tmp_path / "0", model).passed


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_it_is_smoothed_as_the_floats_are(layout: LayoutName, tmp_path: Path) -> None:
    """Also where a scale, its weight and the norm of a fold are in different shards."""
    (tmp_path / "text").write_text(some_text().text)
    make_model("llama", tmp_path / "source", spread)
    floats = as_16_bit(
        tmp_path / "source",
        write_float8(tmp_path / "source", tmp_path / "fp8", apart=True),
        tmp_path / "floats",
    )
    options = ConvertOptions(
        layout=layout, smooth="auto", outlier_columns=2, text=tmp_path / "text", tokens=48, sequence_length=16
    )
    convert(floats, tmp_path / "wanted", options)
    convert(tmp_path / "fp8", tmp_path / "out", options)
    found = read_all(tmp_path / "out")
    assert different(found, read_all(tmp_path / "wanted")) == []
    assert sum(name.endswith(".smooth_exponents") for name in found) > 4
    assert verified(tmp_path / "out", tmp_path / "fp8").passed
    dequantize(tmp_path / "out", tmp_path / "again")
    again, norm = read_all(tmp_path / "again"), "model.layers.0.input_layernorm.weight"
    assert f"{norm}.smooth_row_exponents" in found
    assert torch.equal(again[norm], read_all(floats)[norm])


def test_parts_write_what_one_process_writes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The scales of a part's weights lie in the shard of the other part."""
    for outliers in ("none", "weights"):
        options = ConvertOptions(outliers=outliers)
        convert(pair[0], tmp_path / outliers / "one", options)
        for number in (2, 1):
            convert(pair[0], tmp_path / outliers / "parts", replace(options, part=(number, 2)))
        assert tree(tmp_path / outliers / "parts") == tree(tmp_path / outliers / "one")


def test_methods_are_evaluated_as_with_the_floats(pair: tuple[Path, Path]) -> None:
    found, wanted = (evaluation_to_json(evaluated(model, "bitsandbytes", "vector-wise")) for model in pair)
    assert found["methods"] == wanted["methods"]


def test_a_conversion_is_evaluated_against_the_source(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert(pair[0], tmp_path / "out", WITHOUT_COLUMNS)
    found = evaluation_to_json(evaluated(tmp_path / "out", "bitsandbytes", reference=pair[0]))
    wanted = evaluation_to_json(evaluated(tmp_path / "out", "bitsandbytes", reference=pair[1]))
    assert found["methods"] == wanted["methods"]


def test_outliers_are_those_of_the_floats(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(some_text().text)
    options = InspectOptions(text=tmp_path / "text", tokens=48, sequence_length=16, work_dir=tmp_path)
    found, wanted = (inspect_outliers(model, replace(options, evidence="activations")) for model in pair)
    assert isinstance(found, OutlierStatistics)
    assert isinstance(wanted, OutlierStatistics)
    assert statistics_to_json(found) == statistics_to_json(wanted)
    suspects, due = (inspect_outliers(model, replace(options, evidence="weights")) for model in pair)
    assert isinstance(suspects, WeightSuspects)
    assert isinstance(due, WeightSuspects)
    assert suspects_to_json(suspects) == suspects_to_json(due)


def test_memory_is_that_of_the_floats(pair: tuple[Path, Path]) -> None:
    found, wanted = (estimate_memory(model).estimate for model in pair)
    assert replace(found.weights, stored_bytes=0) == replace(wanted.weights, stored_bytes=0)
    in_file = read_all(pair[0]).values()
    codes = sum(tensor.nbytes for tensor in in_file if tensor.dtype == torch.float8_e4m3fn)
    assert found.stored_dtypes["F8_E4M3"] == codes > 0
    assert sum(found.stored_dtypes.values()) == found.weights.stored_bytes == sum(tensor.nbytes for tensor in in_file)
    assert found.conversion.buffer_bytes > wanted.conversion.buffer_bytes


def test_a_conversion_becomes_floats_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import transformers

    convert(pair[0], tmp_path / "out", WITHOUT_COLUMNS)
    dequantize(tmp_path / "out", tmp_path / "again")
    found = read_all(tmp_path / "again")
    assert (
        different(
            {name: tensor[..., :0] for name, tensor in found.items()},
            {name: tensor[..., :0] for name, tensor in read_all(pair[1]).items()},
        )
        == []
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(model.state_dict()[f"{PROJECTION}.weight"], found[f"{PROJECTION}.weight"])


def test_layers_that_stay_floats_are_written_in_16_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert(pair[0], tmp_path / "out", ConvertOptions(outliers="none", skip=("*q_proj",)))
    found, floats = read_all(tmp_path / "out"), read_all(pair[1])
    assert torch.equal(found[f"{PROJECTION}.weight"], floats[f"{PROJECTION}.weight"])
    assert found[f"{PROJECTION}.weight"].dtype == torch.bfloat16
    assert not any("scale" in name for name in found)
    assert "fp8" not in (tmp_path / "out" / "config.json").read_text()


def test_the_last_blocks_of_a_matrix_may_be_smaller(tmp_path: Path) -> None:
    """As in DeepSeek-V3, where 576 rows have five rows of scales."""
    style = replace(BLOCKS, block=(5, 7), section={"quant_method": "fp8", "weight_block_size": [5, 7]})
    save_tiny("deepseek_v3", tmp_path / "source")
    floats = write_float8(tmp_path / "source", tmp_path / "fp8", style)
    convert(as_16_bit(tmp_path / "fp8", floats, tmp_path / "floats"), tmp_path / "wanted", WITHOUT_COLUMNS)
    convert(tmp_path / "fp8", tmp_path / "out", WITHOUT_COLUMNS)
    assert different(read_all(tmp_path / "out"), read_all(tmp_path / "wanted")) == []


def fused_in_float8(family: str, *, transposed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fused experts as codes with grids of scales, and as the floats that these stand for."""
    codes: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    for name, tensor in fused(family, matrices(family), transposed=transposed).items():
        parts = [encoded(matrix, BLOCKS) for matrix in tensor]
        codes[name] = torch.stack([part for part, _ in parts])
        codes[f"{name}_scale_inv"] = torch.stack([scales for _, scales in parts])
        floats[name] = torch.stack([meant(*part, BLOCKS) for part in parts])
    return codes, floats


@pytest.mark.parametrize(
    ("family", "transposed"), [("qwen3_5_moe", False), ("granitemoe", False), ("llama4_text", True)]
)
@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
def test_fused_experts_have_a_grid_for_each(family: str, transposed: bool, layout: LayoutName, tmp_path: Path) -> None:
    """Split into matrices where the layout does that: each finds its own part of the scales, in either orientation."""
    codes, floats = fused_in_float8(family, transposed=transposed)
    model = source_of(tmp_path / "fp8", family, codes)
    config = {"model_type": family, "num_hidden_layers": 1, "quantization_config": dict(BLOCKS.section)}
    (model / "config.json").write_text(json.dumps(config))
    options = ConvertOptions(outliers="none", layout=layout)
    convert(source_of(tmp_path / "floats", family, floats), tmp_path / "wanted", options)
    convert(model, tmp_path / "out", options)
    found = read_all(tmp_path / "out")
    assert different(found, read_all(tmp_path / "wanted")) == []
    assert any(".experts.0." in name for name in found) == (layout == "compressed-tensors")
    weights = next(check for check in verified(tmp_path / "out", model).checks if check.name == "weights")
    assert weights.status == "passed", weights.failures


def small(**tensors: Tensor) -> dict[str, Tensor]:
    """A projection in 8-bit floats, with these tensors beside it."""
    made = {
        f"{PROJECTION}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        "model.embed_tokens.weight": torch.ones(9, 8),
    }
    return made | {f"{PROJECTION}.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight_scale": torch.ones(3, 1)},
        {"weight_scale": torch.ones(3)},
        {"weight_scale": torch.ones(8, 1), "weight_scale_2": torch.ones(1)},
        {"weight_scale": torch.ones(8, 1), "weight_zero_point": torch.ones(8, 1)},
        {"weight_scale": torch.ones(8, 2, dtype=torch.uint8)},
        {"scale_inv": torch.ones(2, 2)},
    ],
)
def test_scales_that_are_not_understood_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(AlreadyQuantizedError):
        convert(save_by_hand(tmp_path / "model", small(**tensors), config), tmp_path / "out", WITHOUT_COLUMNS)


@pytest.mark.parametrize("method", [None, "some_method", "gptq"])
def test_only_methods_whose_scales_are_known_are_read(method: str | None, tmp_path: Path) -> None:
    config = {} if method is None else {"quantization_config": {"quant_method": method}}
    model = save_by_hand(tmp_path / "model", small(weight_scale=torch.ones(8, 1)), config)
    with pytest.raises(AlreadyQuantizedError):
        convert(model, tmp_path / "out", WITHOUT_COLUMNS)


def test_a_checkpoint_with_packed_weights_beside_is_refused(tmp_path: Path) -> None:
    packed = {"model.layers.0.mlp.up_proj.weight_packed": torch.ones(8, 1, dtype=torch.int32)}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    model = save_by_hand(tmp_path / "model", small(weight_scale=torch.ones(8, 1)) | packed, config)
    with pytest.raises(AlreadyQuantizedError):
        convert(model, tmp_path / "out", WITHOUT_COLUMNS)


def test_a_scale_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    tensors = small(weight_scale=torch.full((8, 1), float("inf")))
    with pytest.raises(NonFiniteError, match="q_proj"):
        convert(save_by_hand(tmp_path / "model", tensors, config), tmp_path / "out", WITHOUT_COLUMNS)


def test_model_opt_says_so_in_a_file_of_its_own(tmp_path: Path) -> None:
    model = save_by_hand(tmp_path / "model", small(weight_scale=torch.tensor(2.0), input_scale=torch.tensor(1.0)), {})
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    convert(model, tmp_path / "out", WITHOUT_COLUMNS)
    assert read_all(tmp_path / "out")[f"{PROJECTION}.SCB"].tolist() == [2.0] * 8
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_scales_in_another_shard_are_read_by_range(tmp_path: Path, nursery: Nursery) -> None:
    make_model("llama", tmp_path / "source")
    write_float8(tmp_path / "source", tmp_path / "model", apart=True)
    command = ("convert", "--outliers", "none", "--workers", "2")
    assert nursery.run(*command, tmp_path / "model", "-o", "here", cwd=tmp_path).code == 0
    with HubStandIn() as hub:
        hub.add_repo("org/model", tmp_path / "model")
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        outcome = nursery.run(*command, "org/model", "-o", "there", cwd=tmp_path, env=environment)
    assert outcome.code == 0, outcome.err
    assert "8-bit floats" in outcome.err
    here, there = (
        {name: data for name, data in tree(tmp_path / each).items() if name.endswith(".safetensors")}
        for each in ("here", "there")
    )
    assert here == there
