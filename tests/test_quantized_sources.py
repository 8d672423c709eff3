"""Checkpoints that are quantized already are told by their tensors and config, whatever format they are in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import WITHOUT_COLUMNS, read_json, save_by_hand, save_tiny
from support.program import Nursery
from torch import Tensor

from int8cli import convert, estimate_memory
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.tensor import ShardContents, StoredTensor, TensorSpec
from int8cli.checkpoint.weight_files import find_weights, read_headers
from int8cli.errors import AlreadyConvertedError, AlreadyQuantizedError, UnsupportedModelError
from int8cli.planning.quantized import declared_methods, refuse_quantized, without_quantization

WEIGHT8, PACKED = torch.ones(4, 4, dtype=torch.int8), torch.ones(4, 4, dtype=torch.uint8)
FLOAT8 = WEIGHT8.to(torch.float8_e4m3fn)
FLOAT16 = torch.ones(4, 4, dtype=torch.float16)
DECLARED = {"quantization_config": {"quant_method": "some_method"}}


def refuse(tensors: Mapping[str, Tensor], config: Mapping[str, Any], root: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, root / "model.safetensors")
    source = DirectorySource(root)
    refuse_quantized(config, read_headers(source, find_weights(source)))


def refuse_shapes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any] | None = None) -> None:
    """The same for tensors of which only dtypes and shapes are made up: (dtype, shape) by name."""
    stored = (StoredTensor(TensorSpec(name, *each), 0) for name, each in tensors.items())
    refuse_quantized(config or {}, [ShardContents("model.safetensors", tuple(stored), {}, 0)])


@pytest.mark.parametrize(
    "tensors",
    [
        {"l.weight": WEIGHT8, "l.SCB": torch.ones(4)},
        {"l.weight": PACKED, "l.weight.absmax": torch.ones(4), "l.weight.quant_state.bitsandbytes__nf4": PACKED},
        {"l.qweight": WEIGHT8.int(), "l.scales": FLOAT16},
        {"l.weight_packed": WEIGHT8.int(), "l.weight_scale": FLOAT16},
        {"l.weight": FLOAT8, "l.weight_scale_inv": torch.ones(1, 1)},
        {"l.weight": WEIGHT8, "l.weight_scale": torch.ones(4, 1)},
        {"l.experts.up_blocks": PACKED, "l.experts.up_scales": PACKED},
    ],
)
def test_companions_betray_a_quantized_checkpoint(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        refuse(tensors, {}, tmp_path)


# What stands in the place of a weight (48, 64), half an embedding's width apart from it so that nothing is square.
FORMATS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "a trellis": {"trellis": ("I16", (4, 3, 64)), "suh": ("F16", (64,)), "svh": ("F16", (48,))},
    "packed with packed scales": {"q_weight": ("I32", (8, 48)), "q_scale": ("I32", (2, 6)), "q_groups": ("I16", (4,))},
    "codes of a codebook": {
        "codes": ("I8", (48, 8, 1)),
        "codebooks": ("F16", (1, 256, 1, 8)),
        "scales": ("F16", (48,)),
    },
    "codes of 64 bits": {"Qidxs": ("I64", (48, 8)), "SU": ("F16", (64,)), "SV": ("F16", (48,))},
    "a list of sparse values": {
        "dense_weights": ("I64", (512,)),
        "row_offsets": ("I32", (49,)),
        "values": ("I32", (9,)),
    },
    "packed under the weight's name": {
        "weight": ("U32", (48, 8)),
        "scales": ("F16", (48, 1)),
        "biases": ("F16", (48, 1)),
    },
    "sixteen-bit codes under that name": {"weight": ("I16", (8, 48)), "tables": ("F16", (16, 2))},
    "indices and centroids": {"indices": ("I32", (1, 6, 64)), "centroids.weight": ("F16", (1, 2048))},
    "parts of a subclass": {"_weight_qdata": ("I8", (48, 64)), "_weight_scale": ("F32", (48, 1))},
    "tiles": {"B": ("I32", (4, 96)), "s": ("F16", (1, 48))},
    "int8 with a scale of any name": {"weight": ("I8", (48, 64)), "dequant_scale": ("F32", (48,))},
    "int8 with factors": {"weight": ("I8", (48, 64)), "a": ("F32", (1,)), "bias": ("I8", (48,))},
    "float8 with a scale of any name": {"weight": ("F8_E4M3", (48, 64)), "scale_weight": ("F32", ())},
    "float8 with a scaling factor": {"weight": ("F8_E5M2", (48, 64)), "weights_scaling_factor": ("F32", (1,))},
    "four-bit floats": {"weight": ("F4", (48, 64)), "s": ("F8_E8M0", (48, 2))},
    "a square of integers with a scale": {"w8": ("I8", (64, 64)), "w_absmax": ("F16", (64,))},
}


@pytest.mark.parametrize("companions", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("linear", ["model.layers.0.mlp.down_proj", "transformer.h.0.attn.anything"])
def test_a_format_that_nobody_has_listed_is_told_by_its_tensors(
    companions: dict[str, tuple[str, tuple[int, ...]]], linear: str
) -> None:
    beside = {"model.embed_tokens.weight": ("F16", (99, 64)), "model.layers.0.input_layernorm.weight": ("F16", (64,))}
    tensors = beside | {f"{linear}.{leaf}": spec for leaf, spec in companions.items()}
    if linear.endswith("anything") and "dense_weights" in companions:
        pytest.skip("lists of integers are a sign only where the name is one of linear layers")
    if linear.endswith("anything") and companions.get("Qidxs"):
        pytest.skip("64-bit integers too")
    with pytest.raises(AlreadyQuantizedError, match=r"already quantized: '.*' is "):
        refuse_shapes(tensors)


BUFFERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "embeddings.position_ids": ("I64", (1, 512)),
    "embeddings.token_type_ids": ("I64", (1, 512)),
    "vision.embeddings.position_ids": ("I32", (1, 50)),
    "layer.0.attention.relative_position_index": ("I64", (49, 49)),
    "layer.0.attention.index": ("I32", (49, 49)),
    "bn.num_batches_tracked": ("I64", ()),
    "h.0.attn.bias": ("U8", (1, 1, 64, 64)),
    "h.0.attn.mask": ("BOOL", (1, 1, 32, 64)),
    "proj.bn.num_batches_tracked": ("I64", ()),
    "out_proj.num_batches_tracked": ("I64", ()),
    "gate.tid2eid": ("I32", (99, 4)),
    "d2t": ("I64", (32,)),
    "items.codes": ("I64", (99, 4)),
}


def test_integers_that_a_model_has_of_its_own_are_no_sign() -> None:
    own: dict[str, tuple[str, tuple[int, ...]]] = {
        "layer.0.q_proj.weight": ("BF16", (48, 64)),
        "gate.weight": ("BF16", (4, 64)),
        "layer.0.attention.scale": ("F32", (1,)),
        "layer.0.ffn.scale": ("F32", (64,)),
        "logit_scale": ("F32", ()),
        "odd.weight": ("F8_E4M3", (48, 64)),
        "wide.weight": ("F64", (48, 64)),
    }
    refuse_shapes(BUFFERS | own)
    for name, spec in BUFFERS.items():
        refuse_shapes(own | {name: spec})


@pytest.mark.parametrize("weight", [WEIGHT8, FLOAT8, PACKED])
def test_a_declared_method_over_small_weights_is_named(weight: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="some_method"):
        refuse({"l.weight": weight}, DECLARED, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"l.weight": FLOAT16}, DECLARED),
        ({"l.weight": FLOAT16, "l.weight_scale": torch.ones(4)}, {}),
        ({"l.weight": FLOAT16, "position_ids": torch.arange(4)[None].clone(), "attn.bias": PACKED}, DECLARED),
        ({"l.weight": FLOAT16, "codes": WEIGHT8}, {"quantization_config": None}),
        ({"l.weight": FLOAT16, "up_blocks.0.weight": FLOAT16}, {}),
    ],
)
def test_plain_weights_are_not_refused(tensors: dict[str, Tensor], config: dict[str, Any], tmp_path: Path) -> None:
    refuse(tensors, config, tmp_path)


def test_scales_beside_floats_are_a_sign_where_the_config_names_a_method(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="a scale beside a weight"):
        refuse({"l.weight": FLOAT16, "l.weight_scale": torch.ones(4)}, DECLARED, tmp_path)


@pytest.mark.parametrize(
    ("config", "methods"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["gptq"]),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, ["awq"]),
        ({"a": {"b": [{"quant_method": "fp8"}]}}, ["fp8"]),
        ({"quantization": {"group_size": 32, "bits": 4}}, ["unnamed"]),
        ({"compression_config": {"config_groups": {}}}, ["unnamed"]),
        ({"quantization_config": None, "quantize": {"embedding": 4}}, []),
        ({"vq_config": {"bits": 4}, "quantization": {"codebook_size": 1024}}, []),
    ],
)
def test_methods_are_found_at_any_depth_of_the_config(config: dict[str, Any], methods: list[str]) -> None:
    assert list(declared_methods(config)) == methods


def test_a_nested_method_is_named_with_the_tensor_that_shows_it() -> None:
    with pytest.raises(AlreadyQuantizedError, match=r"\(awq\): 'l\.weight' is F8_E4M3 \[48, 64\]"):
        refuse_shapes(
            {"l.weight": ("F8_E4M3", (48, 64))}, {"text_config": {"quantization_config": {"quant_method": "awq"}}}
        )


def test_floats_that_are_no_weights_yet_are_refused() -> None:
    with pytest.raises(AlreadyQuantizedError, match="bitnet"):
        refuse_shapes({"l.weight": ("BF16", (48, 64))}, {"quantization_config": {"quant_method": "bitnet"}})


def test_a_leftover_description_is_taken_out_of_every_config(tmp_path: Path) -> None:
    leftover = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {
        "model_type": "llava",
        "quantization": {"bits": 4, "group_size": 64},
        "text_config": {"model_type": "llama", "quantization_config": leftover},
        "vision_config": {"quantization_config": None, "patch_size": 8},
    }
    source = save_by_hand(tmp_path / "source", {"model.layers.0.mlp.up_proj.weight": torch.randn(8, 8)}, config)
    report = convert(source, tmp_path / "output", WITHOUT_COLUMNS).report
    written = read_json(tmp_path / "output" / "config.json")
    assert written.pop("quantization_config")["load_in_8bit"] is True
    assert written.pop("torch_dtype") == "float32"
    assert written == {
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "vision_config": {"patch_size": 8},
    }
    assert "config.json: quantization_config" in dict(report.passed_over)
    assert without_quantization({"quantization": {"codebook_size": 9}}) == {"quantization": {"codebook_size": 9}}


def test_nothing_is_written_for_a_quantized_source(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.trellis": torch.ones(2, 3, 64, dtype=torch.int16)}
    source = save_by_hand(tmp_path / "source", tensors, {"model_type": "llama"})
    with pytest.raises(AlreadyQuantizedError, match="integers in the place of a linear layer's weight"):
        convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert not (tmp_path / "output").exists()


def test_an_output_of_ours_is_said_to_be_ours(tmp_path: Path, nursery: Nursery) -> None:
    output = convert(save_tiny("llama", tmp_path / "source"), tmp_path / "output", WITHOUT_COLUMNS).output
    for command in (convert, estimate_memory):
        with pytest.raises(AlreadyConvertedError, match="output is already int8: int8cli wrote it"):
            command(output)
    outcome = nursery.run("convert", output, cwd=tmp_path)
    assert "To check a conversion: int8cli verify DIR" in outcome.err
    assert nursery.run("verify", output, cwd=tmp_path).code == 0


def test_layers_that_are_none_of_a_loader_s_int8_layers_are_no_conversion(tmp_path: Path) -> None:
    source = save_by_hand(tmp_path / "source", {"embed_tokens.weight": torch.randn(8, 8)}, {"model_type": "llama"})
    with pytest.raises(UnsupportedModelError, match="no tensor is recognised as the weight of a linear layer"):
        convert(source, tmp_path / "output", WITHOUT_COLUMNS)
    assert not (tmp_path / "output").exists()
    assert json.loads((source / "config.json").read_text()) == {"model_type": "llama"}
