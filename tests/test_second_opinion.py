"""`verify` finds int8 that is wrong in the conversion and in converting again alike."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.calibration_models import make_model, some_text
from support.checkpoints import convert_storing, save_by_hand, save_tiny, some_columns
from support.smoothing import spread
from support.verifying import verified
from torch import Tensor

from int8cli import ConvertOptions, convert
from int8cli.commands.options import InputsName, LayoutName
from int8cli.conversion.block_bytes import BlockConverter
from int8cli.conversion.buffers import Workbench
from int8cli.conversion.scaling import BlockScaling
from int8cli.llm_int8 import quantize
from int8cli.llm_int8.quantize import BlockQuantizer
from int8cli.planning import expert_names
from int8cli.planning import plan as planning
from int8cli.planning import reasons as why
from int8cli.planning.layouts import LAYOUTS
from int8cli.results.verification import Check, Verification
from int8cli.verification import int8_layer

Patch = pytest.MonkeyPatch
WAYS: tuple[tuple[LayoutName, InputsName | None], ...] = (
    ("bitsandbytes", None),
    ("compressed-tensors", "absmax"),
    ("compressed-tensors", "zeropoint"),
    ("compressed-tensors", "none"),
)
ways = pytest.mark.parametrize(("layout", "inputs"), WAYS, ids=[f"{layout}-{inputs}" for layout, inputs in WAYS])


def failed(verification: Verification) -> dict[str, Check]:
    return {check.name: check for check in verification.checks if check.status == "failed"}


def problems(verification: Verification) -> list[str]:
    """What the second opinion says, and that it is alone in saying anything."""
    found = failed(verification)
    assert list(found) == ["method"]
    return [failure.problem for failure in found["method"].failures]


def options_of(layout: LayoutName, inputs: InputsName | None) -> ConvertOptions:
    options = ConvertOptions(outliers="none", layout=layout, figures=False)
    return options if inputs is None else replace(options, inputs=inputs)


# Arithmetic that is wrong in conversion and verification alike


def steps_of_126(patch: Patch) -> None:
    """Scales and data fit each other, and are not what bitsandbytes computes."""
    patch.setattr(quantize, "INT8_MAX", 126.0)


def scales_rounded_once(patch: Patch) -> None:
    def scale(absmax: Tensor, *, plain: bool = False) -> Tensor:
        return torch.full_like(absmax, 127.0).div_(absmax).masked_fill_(absmax == 0, 0.0)

    patch.setattr(quantize, "_scale", scale)


def halves_away_from_zero(patch: Patch) -> None:
    def quantized(self: Any, block: Tensor, row_absmax: Tensor, *, data: Tensor, stored_absmax: Tensor) -> None:
        scaled = block.float() * quantize._scale(row_absmax)[:, None]
        data.copy_(scaled.abs().add(0.5).floor() * scaled.sign())
        stored_absmax.copy_(row_absmax)

    patch.setattr(BlockQuantizer, "quantize", quantized)


def one_absmax_for_all_rows(patch: Patch) -> None:
    row_absmax = BlockQuantizer.row_absmax

    def largest(self: BlockQuantizer, block: Tensor) -> Tensor:
        found = row_absmax(self, block)
        return found.max().expand_as(found).contiguous()

    patch.setattr(BlockQuantizer, "row_absmax", largest)


def rows_in_another_order(patch: Patch) -> None:
    load = BlockConverter._load

    def reversed_rows(self: Any, *where: Any) -> Tensor:
        return load(self, *where).flip(0).contiguous()

    patch.setattr(BlockConverter, "_load", reversed_rows)


ARITHMETIC = (steps_of_126, scales_rounded_once, halves_away_from_zero, one_absmax_for_all_rows, rows_in_another_order)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear layers large enough for each kind of rounding to show, with values on the edges of rounding."""
    torch.manual_seed(0)
    weight = torch.randn(96, 512)
    weight[:, 0] = 127 / 32  # a scale of 32: the next are halves of a step
    weight[:48] = (weight[:48].clamp(-3, 3) * 64).round() / 64
    directory: Path = tmp_path_factory.mktemp("opinion") / "source"
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, 512),
        "model.layers.0.self_attn.q_proj.weight": weight,
        "model.layers.0.mlp.down_proj.weight": torch.randn(512, 96),
        "model.layers.0.input_layernorm.weight": torch.rand(512),
        "lm_head.weight": torch.randn(40, 512),
    }
    config = {"model_type": "made-here", "vocab_size": 40, "dtype": "bfloat16"}
    return save_by_hand(directory, {name: each.bfloat16() for name, each in tensors.items()}, config)


@ways
@pytest.mark.parametrize("wrong", ARITHMETIC, ids=[each.__name__ for each in ARITHMETIC])
def test_arithmetic_that_is_wrong_twice_is_found(
    wrong: Callable[[Patch], None],
    layout: LayoutName,
    inputs: InputsName | None,
    source: Path,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    wrong(monkeypatch)
    convert(source, tmp_path / "out", options_of(layout, inputs))
    found = problems(verified(tmp_path / "out", source))
    assert found
    assert all("by the method's definition" in problem for problem in found)


@ways
def test_good_conversions_pass(layout: LayoutName, inputs: InputsName | None, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", options_of(layout, inputs))
    verification = verified(tmp_path / "out", source)
    assert verification.passed
    method = next(check for check in verification.checks if check.name == "method")
    assert method.detail == "2 layers by its definition, 3 tensors read a second way"


# The same of other dtypes, orders and places


@pytest.mark.parametrize("float32", ["float16", "direct"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype: torch.dtype, float32: Any, source: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    tensors = {name: each.to(dtype) for name, each in load_file(source / "model.safetensors").items()}
    tensors["model.layers.0.mlp.down_proj.weight"][:4] *= 1e-6  # rows that float16 holds with few digits
    tensors["model.layers.0.mlp.down_proj.weight"][5] = 0
    config = {"model_type": "made-here", "vocab_size": 40, "dtype": "bfloat16"}
    model = save_by_hand(tmp_path / "model", tensors, config)
    options = ConvertOptions(outliers="none", float32=float32)
    convert(model, tmp_path / "out", options)
    assert verified(tmp_path / "out", model).passed
    steps_of_126(monkeypatch)
    convert(model, tmp_path / "wrong", options)
    assert problems(verified(tmp_path / "wrong", model))


@pytest.mark.parametrize("name", ["half", "torch.half", "float16", "float", "torch.float32"])
def test_every_name_of_a_dtype_is_known(name: str, tmp_path: Path) -> None:
    """Most bytes are bfloat16, to which a load would cast the float16 weight if config.json did not say otherwise."""
    block = "model.layers.0.mlp"
    tensors = {f"{block}.up_proj.weight": torch.randn(8, 16).half(), f"{block}.gate_proj.weight": torch.randn(64, 16)}
    tensors[f"{block}.gate_proj.weight"] = tensors[f"{block}.gate_proj.weight"].bfloat16()
    source = save_by_hand(tmp_path / "source", tensors, {"model_type": "llama", "torch_dtype": name})
    convert(source, tmp_path / "output", options_of("bitsandbytes", None))
    assert "method" not in failed(verified(tmp_path / "output", source))


def test_rows_of_a_large_weight(source: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """Of 512 rows of 96, 80 are compared: in eight runs, from the first to the last."""
    monkeypatch.setattr(int8_layer, "MOST_ELEMENTS", 80 * 96)
    assert list(int8_layer.runs(80, 96)) == [(0, 80)]
    compared = list(int8_layer.runs(512, 96))
    assert (compared[0], compared[-1], len(compared)) == ((0, 10), (502, 512), 8)
    convert(source, tmp_path / "good", ConvertOptions(outliers="none"))
    assert verified(tmp_path / "good", source).passed
    steps_of_126(monkeypatch)
    convert(source, tmp_path / "out", ConvertOptions(outliers="none"))
    assert len(problems(verified(tmp_path / "out", source))) == 2


def test_a_pickled_source(source: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "model").mkdir()
    torch.save(load_file(source / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "config.json").write_text((source / "config.json").read_text())
    steps_of_126(monkeypatch)
    convert(tmp_path / "model", tmp_path / "out", ConvertOptions(outliers="none"))
    assert problems(verified(tmp_path / "out", tmp_path / "model"))


def test_a_square_conv1d_that_is_not_transposed(tmp_path: Path, monkeypatch: Patch) -> None:
    model = save_tiny("gpt2", tmp_path / "model")
    convert(model, tmp_path / "good", ConvertOptions(outliers="none"))
    assert verified(tmp_path / "good", model).passed
    is_conv1d = planning._Checkpoint.is_conv1d
    monkeypatch.setattr(
        planning._Checkpoint, "is_conv1d", lambda self, spec: spec.shape[0] != spec.shape[1] and is_conv1d(self, spec)
    )
    convert(model, tmp_path / "out", ConvertOptions(outliers="none"))
    found = failed(verified(tmp_path / "out", model))["method"]
    assert {failure.tensor for failure in found.failures} == {
        f"transformer.h.{block}.attn.c_proj" for block in range(2)
    }


def test_square_weights_alone_may_be_in_either_order(tmp_path: Path) -> None:
    model = save_tiny("gpt2", tmp_path / "model")
    convert(model, tmp_path / "out", ConvertOptions(outliers="none", only=("*.attn.c_proj",)))
    assert verified(tmp_path / "out", model).passed


def fused_experts(directory: Path, *, transposed: bool) -> Path:
    """Two experts in 3-D, and enough of a model around them."""
    torch.manual_seed(1)
    experts, fused = (
        "model.layers.0.mlp.experts",
        {"gate_up_proj": torch.randn(2, 48, 40), "down_proj": torch.randn(2, 40, 24)},
    )
    tensors = {
        **{f"{experts}.{name}": each.mT.contiguous() if transposed else each for name, each in fused.items()},
        "model.layers.0.self_attn.o_proj.weight": torch.randn(40, 40),
        "model.embed_tokens.weight": torch.randn(9, 40),
    }
    tensors = {name: each.bfloat16() for name, each in tensors.items()}
    return save_by_hand(directory, tensors, {"model_type": "qwen3_moe"})


@pytest.mark.parametrize("transposed", [False, True])
def test_halves_of_fused_experts_in_the_wrong_order(transposed: bool, tmp_path: Path, monkeypatch: Patch) -> None:
    model = fused_experts(tmp_path / "model", transposed=transposed)
    options = options_of("compressed-tensors", "absmax")
    convert(model, tmp_path / "good", options)
    assert verified(tmp_path / "good", model).passed
    turned = expert_names.ExpertNames(("up_proj", "gate_proj"))
    monkeypatch.setitem(expert_names._FAMILIES, "qwen3_moe", turned)
    convert(model, tmp_path / "out", options)
    found = failed(verified(tmp_path / "out", model))["method"]
    assert {str(failure.tensor).rpartition(".")[2] for failure in found.failures} == {"gate_proj", "up_proj"}


def test_stored_columns_that_are_others(source: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    convert_storing(source, tmp_path / "good", some_columns)
    assert verified(tmp_path / "good", source).passed
    gather = Workbench.gather
    monkeypatch.setattr(Workbench, "gather", lambda self, loaded, columns: gather(self, loaded, columns.roll(1)))
    convert_storing(source, tmp_path / "out", some_columns)
    assert all("stored columns" in problem for problem in problems(verified(tmp_path / "out", source)))


def test_floats_that_are_others(source: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    copy = BlockConverter._copy

    def emptied(self: Any, bench: Any, block: Any) -> Any:
        found = copy(self, bench, block)
        for _, _, data in found.outputs:
            data[:1] = b"\0"
        return found

    monkeypatch.setattr(BlockConverter, "_copy", emptied)
    convert(source, tmp_path / "out", ConvertOptions(outliers="none"))
    assert set(problems(verified(tmp_path / "out", source))) == {"differs from the source"}


@pytest.fixture(scope="module")
def to_smooth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConvertOptions]:
    directory = tmp_path_factory.mktemp("smooth")
    model = make_model("llama", directory / "model", spread)
    (directory / "words.txt").write_text(some_text().text)
    options = ConvertOptions(
        layout="compressed-tensors",
        text=directory / "words.txt",
        tokens=48,
        sequence_length=16,
        outlier_columns=2,
        smooth="auto",
    )
    return model, options


def test_norms_that_are_not_divided(to_smooth: tuple[Path, ConvertOptions], tmp_path: Path, monkeypatch: Patch) -> None:
    model, options = to_smooth
    monkeypatch.setattr(BlockScaling, "scaled_vector", lambda self, name, part, loaded: loaded)
    convert(model, tmp_path / "out", options)
    found = failed(verified(tmp_path / "out", model))["method"]
    assert {failure.problem for failure in found.failures} == {"is not the source's divided by its scales"}
    assert all("norm" in str(failure.tensor) for failure in found.failures)


def test_columns_that_are_not_multiplied(
    to_smooth: tuple[Path, ConvertOptions], tmp_path: Path, monkeypatch: Patch
) -> None:
    model, options = to_smooth
    monkeypatch.setattr(BlockScaling, "scaled", lambda self, bench, matrix, part, loaded: loaded)
    monkeypatch.setattr(BlockScaling, "scaled_vector", lambda self, name, part, loaded: loaded)
    convert(model, tmp_path / "out", options)
    named = {
        str(failure.tensor).rpartition(".")[2]
        for failure in failed(verified(tmp_path / "out", model))["method"].failures
    }
    assert {"q_proj", "down_proj"} <= named


# What loaders are told


@pytest.mark.parametrize(
    ("layout", "wrong"),
    [
        ("bitsandbytes", {"llm_int8_threshold": 3.0}),
        ("compressed-tensors", {"format": "pack-quantized"}),
        ("compressed-tensors", {"config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None}}}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_a_config_that_says_something_else(
    layout: LayoutName, wrong: dict[str, Any], source: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Both the conversion and the check ask the layout."""
    target = LAYOUTS[layout]
    stated = target.quantization_config
    monkeypatch.setattr(target, "quantization_config", lambda plan, threshold: stated(plan, threshold) | wrong)
    convert(source, tmp_path / "out", options_of(layout, None))
    found = failed(verified(tmp_path / "out"))["config"]
    assert all("for what was made it must be" in failure.problem for failure in found.failures)


# Output heads


def heads_become_linear(patch: Patch) -> None:
    by_name = planning._reason_by_name

    def reason(spec: Any, checkpoint: Any) -> str:
        found = by_name(spec, checkpoint)
        return why.LINEAR if found in (why.HEAD, why.TIED_HEAD, why.LAST) else found

    patch.setattr(planning, "_reason_by_name", reason)


@ways
def test_an_output_head_in_int8_of_a_model_that_transformers_knows(
    layout: LayoutName, inputs: InputsName | None, tmp_path: Path, monkeypatch: Patch
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    heads_become_linear(monkeypatch)
    convert(model, tmp_path / "out", options_of(layout, inputs))
    found = failed(verified(tmp_path / "out"))["loads"]
    assert [(failure.tensor, failure.problem) for failure in found.failures] == [
        ("lm_head.weight", "is in int8, and transformers keeps it as a float")
    ]


@pytest.mark.parametrize("name", ["output", "transformer.output_layer", "model.transformer.ff_out", "lm_head.linear"])
def test_an_output_head_in_int8_of_a_model_that_nothing_knows(
    name: str, source: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(700, 512).bfloat16()
    tensors[f"{name}.weight"] = torch.randn(700, 512).bfloat16()
    del tensors["lm_head.weight"]
    config = {"model_type": "made-here", "dtype": "bfloat16", "text_config": {"vocab_size": 700}}
    model = save_by_hand(tmp_path / "model", tensors, config)
    convert(model, tmp_path / "good", ConvertOptions(outliers="none"))
    assert verified(tmp_path / "good", model).passed
    heads_become_linear(monkeypatch)
    convert(model, tmp_path / "out", ConvertOptions(outliers="none"))
    found = failed(verified(tmp_path / "out"))["tensors"]
    assert [(failure.tensor, failure.problem) for failure in found.failures] == [
        (name, "looks like an output head, and is in int8")
    ]


# What is sound, though it looks odd


def test_float32_rows_on_the_edge_of_float16_agree(tmp_path: Path) -> None:
    """float16 rounds 65,510 down to its largest value, which is no reason to compute in float16."""
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    weight[3, 5], weight[4, 5], weight[5, 5] = 65504.0, 65510.0, 65530.0
    tensors = {"model.embed_tokens.weight": torch.randn(40, 64), "model.layers.0.mlp.up_proj.weight": weight}
    source = save_by_hand(tmp_path / "source", tensors, {"model_type": "made-here", "vocab_size": 40})
    convert(source, tmp_path / "out", ConvertOptions(outliers="none", float32="float16"))
    assert failed(verified(tmp_path / "out", source)) == {}


def test_a_layer_is_no_head_whose_like_in_other_blocks_are_floats(tmp_path: Path) -> None:
    shapes = {"embed_tokens": (96, 64), **{f"layers.{block}.mlp.up_proj": (96, 64) for block in range(2)}}
    tensors = {f"model.{name}.weight": torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    config = {"model_type": "made-here", "vocab_size": 96, "dtype": "bfloat16"}
    source = save_by_hand(tmp_path / "source", tensors, config)
    convert(source, tmp_path / "out", ConvertOptions(outliers="none", only=("*.0.mlp.up_proj",)))
    assert failed(verified(tmp_path / "out", source)) == {}


def test_without_records_it_says_so(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", ConvertOptions(outliers="none"))
    for path in (tmp_path / "out/int8/records").iterdir():
        path.unlink()
    assert failed(verified(tmp_path / "out", source))


def test_fused_experts_beside_the_language_model_stay_as_they_are(tmp_path: Path) -> None:
    experts = {"gate_up_proj": (3, 64, 32), "down_proj": (3, 32, 32)}
    names = [f"{part}.model.layers.0.mlp" for part in ("thinker", "talker")]
    tensors = {f"{name}.experts.{kind}": torch.randn(shape) for name in names for kind, shape in experts.items()}
    tensors |= {f"{name}.gate.weight": torch.randn(3, 32) for name in names}
    tensors |= {f"{name[:-4]}.self_attn.q_proj.weight": torch.randn(32, 32) for name in names}
    inner = {"text_config": {"model_type": "qwen3_omni_moe_text", "num_experts": 3}, "audio_config": {"d_model": 32}}
    config = {"model_type": "qwen3_omni_moe", "thinker_config": inner, "dtype": "bfloat16"}
    source = save_by_hand(tmp_path / "source", {name: each.bfloat16() for name, each in tensors.items()}, config)
    convert(source, tmp_path / "out", ConvertOptions(outliers="none", layout="compressed-tensors"))
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert "talker.model.layers.0.mlp.experts.gate_up_proj" in written
    assert written["thinker.model.layers.0.mlp.experts.0.gate_proj.weight"].dtype == torch.int8
    assert "method" not in failed(verified(tmp_path / "out", source))
