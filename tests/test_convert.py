"""The output of a conversion of handmade checkpoints: values, figures, sizes, records, and refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import xxhash
from safetensors.torch import save_file
from support.checkpoints import (
    LISTED,
    WITHOUT_COLUMNS,
    build_tiny,
    quantize_with_bitsandbytes,
    read_all,
    read_json,
    read_tensors,
    save_by_hand,
    save_tiny,
    survey,
)
from support.progress import CoherentProgress
from torch import Tensor

from int8cli import ConvertOptions, convert
from int8cli.checkpoint.source_card import NO_CARD, source_card_of
from int8cli.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from int8cli.planning.blocks import BLOCK_ELEMENTS

LINEAR = "layers.0.mlp.up_proj"
WEIGHT = f"{LINEAR}.weight"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 0.02, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def convert_tensors(directory: Path, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Convert a checkpoint of these tensors; returns those of the output."""
    convert(
        save_by_hand(directory / "source", tensors), directory / "output", ConvertOptions(outliers="none", **options)
    )
    return read_tensors(directory / "output" / "model.safetensors")


def convert_weight(directory: Path, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """int8 data and scales of a lone linear."""
    written = convert_tensors(directory, {WEIGHT: weight}, **options)
    assert set(written) == {WEIGHT, f"{LINEAR}.SCB", f"{LINEAR}.weight_format"}
    assert written[f"{LINEAR}.weight_format"].item() == 0
    return written[WEIGHT], written[f"{LINEAR}.SCB"]


def conv1d_checkpoint(weight: Tensor) -> dict[str, Tensor]:
    """A GPT-2 block in which `weight` (in, out) is a Conv1D."""
    return {"h.0.mlp.c_fc.weight": weight, "h.0.mlp.c_fc.bias": torch.zeros(weight.shape[1], dtype=weight.dtype)}


# Values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(37, 53), (1, 64), (64, 1), (1, 1), (129, 1000), (700, 1031)], ids=str)
def test_data_and_scales_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    weight = normal(*shape, dtype=dtype)
    data, scales = convert_weight(tmp_path, weight)
    expected_data, expected_scales = quantize_with_bitsandbytes(weight)
    assert (data.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(data, expected_data)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("exponent", [-20, -14, -10, -7, -6, 0, 10, 15])
def test_rows_of_any_magnitude_are_those_of_bitsandbytes(exponent: int, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = (normal(16, 200, dtype=torch.float32, std=1.0).clamp(-1.99, 1.99) * 2.0**exponent).to(dtype)
    data, scales = convert_weight(tmp_path, weight)
    expected_data, expected_scales = quantize_with_bitsandbytes(weight)
    assert torch.equal(data, expected_data)
    assert torch.equal(scales, expected_scales)


def test_magnitudes_outside_float16_are_quantized_too(tmp_path: Path) -> None:
    weight = normal(8, 300, std=1.0) * 2.0**40
    data, scales = convert_weight(tmp_path, weight)
    assert torch.equal(scales, weight.float().abs().amax(dim=1))
    step = scales.double() / 127
    assert ((data.double() * step[:, None] - weight.double()).abs() <= step[:, None] * 0.5001).all()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"]
)
def test_zero_rows_stay_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = normal(5, 33, dtype=dtype)
    weight[1] = 0
    weight[4] = -0.0
    data, scales = convert_weight(tmp_path, weight)
    assert not data[[1, 4]].any()
    assert scales[[1, 4]].tolist() == [0.0, 0.0]
    assert data[[0, 2, 3]].abs().amax(dim=1).tolist() == [127, 127, 127]


def test_float32_is_quantized_as_it_is(tmp_path: Path) -> None:
    weight = normal(48, 1031, dtype=torch.float32)
    data, scales = convert_weight(tmp_path, weight)
    assert torch.equal(scales, weight.abs().amax(dim=1))
    assert torch.equal(data, (weight * (scales.reciprocal() * 127)[:, None]).round().to(torch.int8))
    assert not torch.equal(scales, quantize_with_bitsandbytes(weight)[1])  # it goes through float16


def test_float32_through_float16_is_what_bitsandbytes_does(tmp_path: Path) -> None:
    weight = normal(48, 1031, dtype=torch.float32)
    data, scales = convert_weight(tmp_path, weight, float32="float16")
    expected_data, expected_scales = quantize_with_bitsandbytes(weight)
    assert torch.equal(data, expected_data)
    assert torch.equal(scales, expected_scales)


def test_a_conv1d_is_stored_transposed(tmp_path: Path) -> None:
    weight = normal(33, 70)
    written = convert_tensors(tmp_path, conv1d_checkpoint(weight))
    expected_data, expected_scales = quantize_with_bitsandbytes(weight.t().contiguous())
    assert torch.equal(written["h.0.mlp.c_fc.weight"], expected_data)
    assert torch.equal(written["h.0.mlp.c_fc.SCB"], expected_scales)


# Blocks


@pytest.mark.parametrize(
    "shape",
    [(3, BLOCK_ELEMENTS + 1), (2, 2 * BLOCK_ELEMENTS), (BLOCK_ELEMENTS + 3, 1), (BLOCK_ELEMENTS // 7 + 1, 7)],
    ids=["wide", "two blocks wide", "one column", "tall"],
)
def test_a_weight_larger_than_a_block_is_quantized_like_a_small_one(shape: tuple[int, int], tmp_path: Path) -> None:
    weight = normal(*shape)
    data, scales = convert_weight(tmp_path, weight, threads=3)
    expected_data, expected_scales = quantize_with_bitsandbytes(weight)
    assert torch.equal(data, expected_data)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize(
    "shape",
    [(701, 1500), (BLOCK_ELEMENTS + 5, 1), (3, BLOCK_ELEMENTS // 2)],
    ids=["plain", "rows wider than a block", "short rows"],
)
def test_a_conv1d_larger_than_a_block_is_quantized_like_a_small_one(shape: tuple[int, int], tmp_path: Path) -> None:
    weight = normal(*shape)
    written = convert_tensors(tmp_path, conv1d_checkpoint(weight), threads=3)
    expected_data, expected_scales = quantize_with_bitsandbytes(weight.t().contiguous())
    assert torch.equal(written["h.0.mlp.c_fc.weight"], expected_data)
    assert torch.equal(written["h.0.mlp.c_fc.SCB"], expected_scales)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_byte(threads: int, tmp_path: Path) -> None:
    source = save_by_hand(
        tmp_path / "source",
        {
            WEIGHT: normal(900, 1031),
            "layers.1.mlp.up_proj.weight": normal(2, BLOCK_ELEMENTS + 9),
            "wte.weight": normal(9, 4),
        },
    )
    convert(source, tmp_path / "one", ConvertOptions(outliers="none", threads=1))
    convert(source, tmp_path / "several", ConvertOptions(outliers="none", threads=threads))
    assert files_of(tmp_path / "several") == files_of(tmp_path / "one")


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    convert(source, tmp_path / "one", ConvertOptions(outliers="none", workers=1))
    convert(source, tmp_path / "two", ConvertOptions(outliers="none", workers=2))
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# What is copied


def test_other_tensors_are_copied_byte_for_byte(tmp_path: Path) -> None:
    tensors = {
        WEIGHT: normal(8, 8),
        "embed_tokens.weight": normal(300, 3001),
        "norm.weight": normal(8),
        "scale": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.empty(0, 4),
        "layers.0.mlp.gate_proj.weight": torch.empty(0, 8, dtype=torch.bfloat16),
        "position_ids": torch.arange(40).reshape(1, 40),
        "mask": torch.tensor([[True, False]]),
        "layers.0.mlp.down_proj.weight": normal(5, 7, dtype=torch.float64),
        "conv.weight": normal(4, 3, 2, 2),
    }
    written = convert_tensors(tmp_path, tensors)
    for name, tensor in tensors.items():
        if name != WEIGHT:
            assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(written[name], tensor)
    assert written[WEIGHT].dtype == torch.int8


def test_copied_bytes_keep_nan_and_infinity(tmp_path: Path) -> None:
    norm = torch.tensor([1.0, float("nan"), float("-inf")], dtype=torch.bfloat16)
    written = convert_tensors(tmp_path, {WEIGHT: normal(8, 8), "norm.weight": norm})
    assert written["norm.weight"].view(torch.int16).tolist() == norm.view(torch.int16).tolist()


def test_other_files_are_copied_and_the_rest_is_listed(tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", {WEIGHT: normal(8, 8)}, {"model_type": "llama"})
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "chat_template.jinja"):
        (source / name).write_text(f"{name} of the source")
    for name in ("optimizer.pt", "tf_model.h5", "flax_model.msgpack", "model.gguf"):
        (source / name).write_bytes(b"not weights to take")
    report = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "chat_template.jinja"):
        assert (tmp_path / "output" / name).read_bytes() == (source / name).read_bytes()
    named = dict(report.passed_over)
    assert {"optimizer.pt", "tf_model.h5", "flax_model.msgpack", "model.gguf"} <= set(named)
    assert not [name for name in named if (tmp_path / "output" / name).exists()]


# Files


def test_sizes_are_exact_before_any_tensor_is_read(tmp_path: Path) -> None:
    source = save_tiny("gpt2", tmp_path / "source", max_shard_size="20KB")
    foreseen = survey(source)
    report = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "output").glob("*.safetensors")}
    assert sizes == {shard.file_name: shard.file_bytes for shard in foreseen.outputs.values()}
    assert sum(sizes.values()) == foreseen.output_bytes == report.output_bytes


def test_the_header_is_aligned_and_without_gaps(tmp_path: Path) -> None:
    convert_tensors(tmp_path, {WEIGHT: normal(7, 5), "norm.weight": normal(3), "scale": torch.tensor(1.0)})
    data = (tmp_path / "output" / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    assert header.pop("__metadata__")["format"] == "pt"
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0
    assert [span[1] for span in spans[:-1]] == [span[0] for span in spans[1:]]
    assert spans[-1][1] == len(data) - 8 - header_bytes
    widths = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1}
    assert [name for name, entry in header.items() if entry["data_offsets"][0] % widths[entry["dtype"]]] == []


def test_the_index_lists_every_tensor_and_the_total_size(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", max_shard_size="20KB")
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    index = read_json(tmp_path / "output" / "model.safetensors.index.json")
    shards = {p.name: read_tensors(p) for p in (tmp_path / "output").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert set(shards) == {p.name for p in source.glob("*.safetensors")}


def test_records_contain_the_digest_of_every_tensor(tmp_path: Path) -> None:
    source = save_tiny("gpt2", tmp_path / "source", max_shard_size="20KB")
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    records = [read_json(path) for path in sorted((tmp_path / "output" / "int8" / "records").glob("*.json"))]
    assert len(records) == len(list(source.glob("*.safetensors")))
    for file in (file for record in records for file in record["files"]):
        data = (tmp_path / "output" / file["file"]).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        assert file["size_bytes"] == len(data)
        assert file["header_xxh3_128"] == xxhash.xxh3_128_hexdigest(data[:start])
        assert {tensor["name"] for tensor in file["tensors"]} == set(header) - {"__metadata__"}
        for tensor in file["tensors"]:
            begin, end = header[tensor["name"]]["data_offsets"]
            assert tensor["xxh3_128"] == xxhash.xxh3_128_hexdigest(data[start + begin : start + end])
            assert (tensor["dtype"], tensor["shape"]) == (
                header[tensor["name"]]["dtype"],
                header[tensor["name"]]["shape"],
            )


def test_the_output_has_exactly_the_expected_files(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", max_shard_size="20KB")
    (source / "README.md").unlink(missing_ok=True)
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    shards = sorted(p.name for p in source.glob("*.safetensors"))
    records = [f"int8/records/{name.removesuffix('.safetensors')}.json" for name in shards]
    others = ["README.md", "config.json", "generation_config.json", "model.safetensors.index.json"]
    own = ["int8/conversion.json", "int8/files.json", "int8/report.json", *records]
    assert sorted(files_of(tmp_path / "output")) == sorted([*shards, *others, *own])


# The report


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"]
)
def test_figures_are_those_of_the_written_files(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        WEIGHT: normal(64, 333, dtype=dtype),
        "layers.0.mlp.down_proj.weight": normal(900, 701, dtype=dtype, std=1e-3),
        "layers.1.mlp.up_proj.weight": normal(2, BLOCK_ELEMENTS + 77, dtype=dtype, std=3.0),
        "embed_tokens.weight": normal(10, 8, dtype=dtype),
    }
    tensors[WEIGHT][3] = 0
    source = save_by_hand(tmp_path / "source", tensors)
    returned = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report.to_json()
    report = read_json(tmp_path / "output" / "int8" / "report.json")
    assert json.loads(json.dumps(returned)) == report
    written = read_tensors(tmp_path / "output" / "model.safetensors")
    assert {layer["name"] for layer in report["layers"]} == {n.removesuffix(".weight") for n in tensors} - {
        "embed_tokens"
    }
    errors = weights = 0.0
    for layer in report["layers"]:
        weight = tensors[f"{layer['name']}.weight"].double()
        data, scales = written[f"{layer['name']}.weight"], written[f"{layer['name']}.SCB"]
        error = weight - data.double() * scales.double()[:, None] / 127
        assert layer["relative_frobenius_error"] == pytest.approx(float(error.norm() / weight.norm()), rel=1e-4)
        sqnr_db = 20 * float(torch.log10(weight.norm() / error.norm()))
        assert layer["sqnr_db"] == pytest.approx(sqnr_db, abs=1e-3)
        assert layer["max_abs_error"] == pytest.approx(float(error.abs().max()), rel=1e-3)
        assert layer["mean_range_use"] == pytest.approx(float(data.double().abs().mean() / 127), rel=1e-6)
        assert (layer["row_absmax_min"], layer["row_absmax_max"]) == (float(scales.min()), float(scales.max()))
        assert layer["shape"] == list(weight.shape)
        assert layer["bytes_before"] == weight.numel() * dtype.itemsize
        assert layer["bytes_after"] == weight.numel() + 4 * weight.shape[0] + 1
        errors, weights = errors + float(error.square().sum()), weights + float(weight.square().sum())
    totals = report["totals"]
    assert totals["relative_frobenius_error"] == pytest.approx((errors / weights) ** 0.5, rel=1e-4)
    quantized = sum(tensor.numel() for name, tensor in tensors.items() if name != "embed_tokens.weight")
    assert totals["quantized_parameters"] == quantized
    assert totals["percent_quantized"] == pytest.approx(100 * quantized / (quantized + 80))
    assert totals["output_bytes"] == (tmp_path / "output" / "model.safetensors").stat().st_size
    assert totals["source_bytes"] == (source / "model.safetensors").stat().st_size


def test_the_worst_layer_comes_first(tmp_path: Path) -> None:
    spiky = normal(64, 64)
    spiky[:, 0] = 8.0  # one large value in each row leaves the rest few steps
    source = save_by_hand(
        tmp_path / "source", {"layers.0.q_proj.weight": normal(64, 64), "layers.1.q_proj.weight": spiky}
    )
    report = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report
    assert [layer.name for layer in report.layers] == ["layers.1.q_proj", "layers.0.q_proj"]


def test_a_weight_of_zeros_has_no_error_and_no_sqnr(tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", {WEIGHT: torch.zeros(4, 4, dtype=torch.bfloat16)})
    layer = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report.to_json()["layers"][0]
    assert (layer["relative_frobenius_error"], layer["max_abs_error"], layer["sqnr_db"]) == (0.0, 0.0, None)


# What must not be quantized


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"]
)
def test_a_non_finite_value_is_named_with_its_position(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = normal(1200, 700, dtype=dtype)
    weight[1100, 450] = value
    weight[1150, 2] = value
    place = rf"model\.safetensors: {WEIGHT} contains {value} at row 1,100, column 450$"
    with pytest.raises(NonFiniteError, match=place) as caught:
        convert_weight(tmp_path, weight, threads=3)
    assert caught.value.hint
    assert no_weights_in(tmp_path / "output")


@pytest.mark.parametrize("column", [5, BLOCK_ELEMENTS + 4])
def test_the_position_is_right_in_a_row_wider_than_a_block(column: int, tmp_path: Path) -> None:
    weight = normal(3, BLOCK_ELEMENTS + 9)
    weight[1, column] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"contains nan at row 1, column {column:,}$"):
        convert_weight(tmp_path, weight)


def test_the_position_in_a_conv1d_is_that_in_the_source(tmp_path: Path) -> None:
    weight = normal(701, 1500)
    weight[33, 1400] = float("inf")
    with pytest.raises(NonFiniteError, match=r"contains inf at row 33, column 1,400$"):
        convert_tensors(tmp_path, conv1d_checkpoint(weight))


def no_weights_in(output: Path) -> bool:
    return not list(output.rglob("*.safetensors")) and not (output / "config.json").exists()


def test_the_loader_does_not_quantize_a_copied_non_finite_weight(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = build_tiny(LISTED["llama"])
    damaged = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    with torch.no_grad():
        for name in damaged:
            model.get_submodule(name).weight[2, 3] = float("nan")
    model.save_pretrained(tmp_path / "source")
    report = convert(
        tmp_path / "source", tmp_path / "output", ConvertOptions(outliers="none", on_nonfinite="keep")
    ).report

    source, written = read_all(tmp_path / "source"), read_all(tmp_path / "output")
    kept = {name for name in source if ".layers." in name and "norm" not in name and written[name].dtype != torch.int8}
    assert kept == {f"{name}.weight" for name in damaged}
    assert all(written[name].view(torch.int16).equal(source[name].view(torch.int16)) for name in kept)
    assert {f"{name}.SCB" for name in damaged}.isdisjoint(written)
    assert sum(group.tensors for group in report.left_alone if group.reason == "holds NaN or infinity") == 3
    assert {layer.name for layer in report.layers}.isdisjoint(damaged)

    loader: Any = LlamaForCausalLM  # which of its two answers it gives, its types do not say
    loaded, info = loader.from_pretrained(tmp_path / "output", output_loading_info=True, device_map="cpu")
    assert not any(info.values())
    state = loaded.state_dict()
    assert all(torch.equal(state[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in written.items())


def test_on_nonfinite_keep_changes_nothing_if_all_weights_are_finite(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    convert(source, tmp_path / "plain", WITHOUT_COLUMNS)
    convert(source, tmp_path / "kept", ConvertOptions(outliers="none", on_nonfinite="keep"))
    assert files_of(tmp_path / "kept") == files_of(tmp_path / "plain")


# Options


@pytest.mark.parametrize(
    ("patterns", "int8"),
    [
        ({"skip": ("*.down_proj", "*.layers.0.*")}, r"layers\.1\.(self_attn\.._proj|mlp\.(gate|up)_proj)\.weight$"),
        ({"only": ("*.q_proj", "*.layers.1.mlp.*")}, r"(q_proj|layers\.1\.mlp\..*_proj)\.weight$"),
        ({"skip": ("*",)}, r"(?!)"),
    ],
    ids=["skip", "only", "nothing left"],
)
def test_patterns_choose_and_the_loader_follows(patterns: dict[str, Any], int8: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    source = save_tiny("llama", tmp_path / "source")
    convert(source, tmp_path / "output", ConvertOptions(outliers="none", **patterns))
    written = read_all(tmp_path / "output")
    assert {n for n, t in written.items() if t.dtype == torch.int8} == {n for n in written if re.search(int8, n)}
    loader: Any = LlamaForCausalLM  # which of its two answers it gives, its types do not say
    loaded, info = loader.from_pretrained(tmp_path / "output", output_loading_info=True, device_map="cpu")
    assert not any(info.values())
    state = loaded.state_dict()
    assert set(state) == set(written)
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())


def test_the_threshold_is_in_the_config(tmp_path: Path) -> None:
    source = save_by_hand(
        tmp_path / "source", {WEIGHT: normal(8, 8)}, {"model_type": "llama", "torch_dtype": "bfloat16"}
    )
    convert(source, tmp_path / "output", ConvertOptions(outliers="none", threshold=4.5))
    config = read_json(tmp_path / "output" / "config.json")
    assert (config["model_type"], config["torch_dtype"]) == ("llama", "bfloat16")
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 4.5,
        "llm_int8_skip_modules": ["classification_head", "classifier", "lm_head", "qa_outputs", "score"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def test_a_quantization_config_over_plain_weights_is_replaced_and_named(tmp_path: Path) -> None:
    stale = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    source = save_by_hand(
        tmp_path / "source", {WEIGHT: normal(8, 8)}, {"model_type": "llama", "quantization_config": stale}
    )
    report = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report
    assert read_json(tmp_path / "output" / "config.json")["quantization_config"]["load_in_8bit"] is True
    assert "config.json: quantization_config" in dict(report.passed_over)


def test_an_output_of_ours_is_not_converted_again(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    with pytest.raises(UnsupportedModelError, match="already int8"):
        convert(tmp_path / "output", tmp_path / "again", WITHOUT_COLUMNS)
    assert not (tmp_path / "again").exists() or no_weights_in(tmp_path / "again")


# The model card


def test_the_card_is_valid_and_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard

    convert(save_tiny("llama", tmp_path / "source"), tmp_path / "output", WITHOUT_COLUMNS)
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert card.data.library_name == "transformers"
    assert {"int8", "bitsandbytes"} <= set(card.data.tags or [])
    monkeypatch.chdir(tmp_path / "output")
    models = []
    for code in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        names: dict[str, Any] = {}
        exec(code, names)
        models.append(names["model"])
    in_transformers, in_int8cli = models
    assert in_transformers.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert type(in_int8cli.model.layers[0].mlp.up_proj).__module__.startswith("int8cli.")
    assert "int8cli generate . " in card.text


SOURCE_CARD = (
    "---\nlicense: other\nlicense_name: a-name\nlicense_link: LICENSE\npipeline_tag: text-generation\n---\n# M\n"
)


def test_the_card_inherits_license_and_task(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    source = save_tiny("llama", tmp_path / "source")
    (source / "README.md").write_text(SOURCE_CARD)
    convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    data = ModelCard.load(tmp_path / "output" / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "a-name", "LICENSE")
    assert data.pipeline_tag == "text-generation"


@pytest.mark.parametrize(
    ("front", "license_name"),
    [
        ("license: mit\nmore: {}", "mit"),
        ("license: [mit, apache-2.0]", None),
        ('license: "mit\\e[31m"', None),
        ("license: " + "x" * 400, None),
        ("nothing: here", None),
    ],
)
def test_only_a_short_line_is_believed_of_a_source_card(front: str, license_name: str | None) -> None:
    assert source_card_of(f"---\n{front}\n---\n# Text\n").license == license_name
    assert source_card_of("# no front matter\n") == NO_CARD


@pytest.mark.parametrize("front", ["license: [", "- a\n- list", "a: *unknown", "license: {a: b"])
def test_a_source_card_that_is_no_yaml_is_an_error_and_stops_no_conversion(front: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="front matter"):
        source_card_of(f"---\n{front}\n---\n")
    source = save_tiny("llama", tmp_path / "source")
    (source / "README.md").write_text(f"---\n{front}\n---\n")
    progress = CoherentProgress()
    convert(source, tmp_path / "output", WITHOUT_COLUMNS, progress=progress)
    assert any("names no license" in note for note in progress.notes)


# Dtypes that differ from the model's


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("held", ["all in float32", "norms in float32"])
def test_weights_in_another_dtype_than_the_config_names_load_and_run(
    architecture: str, held: str, tmp_path: Path
) -> None:
    """transformers casts no `.weight` of a checkpoint that is int8 already: they must stand in the model's dtype."""
    source = save_tiny(architecture, tmp_path / "source", torch.bfloat16)
    state = read_all(source)
    widened = {name: t.float() if held.startswith("all") or "norm" in name.lower() else t for name, t in state.items()}
    save_file(widened, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "output", ConvertOptions(outliers="none", threads=2))
    written = read_all(tmp_path / "output")
    assert {t.dtype for name, t in written.items() if name.endswith(".weight")} == {torch.bfloat16, torch.int8}
    model_class = getattr(transformers, read_json(source / "config.json")["architectures"][0])
    model = model_class.from_pretrained(tmp_path / "output", device_map="cpu")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits.float()).all()


def test_only_without_a_match_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", {WEIGHT: normal(8, 8)})
    with pytest.raises(UnsupportedModelError, match="no module that could be quantized matches"):
        convert(source, tmp_path / "output", ConvertOptions(outliers="none", only=("nothing.*",)))
    assert not (tmp_path / "output").exists()
