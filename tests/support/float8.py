"""Checkpoints of 8-bit floats with scales, made of 16-bit ones, and what they stand for by the formats' definition."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoints import read_all, read_json

_LARGEST = 448.0  # of float8_e4m3fn


@dataclass(frozen=True)
class Float8:
    """How to store weights: rows and columns to a scale (0: all), the scale's name, dtype and number of dimensions.

    `section` is the quantization_config. Modules whose name ends with one of `floats` stay as they are.
    """

    block: tuple[int, int]
    scale: str
    section: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    dimensions: int = 2
    floats: tuple[str, ...] = ("lm_head", "embed_tokens", "gate", "norm", "layernorm")
    others: Mapping[str, Tensor] = field(default_factory=dict)  # leaves beside each scale


BLOCKS = Float8((4, 4), "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [4, 4]})
_CONFIG_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
}
STYLES = {
    "block": BLOCKS,
    "compressed-tensors": Float8(
        (1, 0),
        "weight_scale",
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": _CONFIG_GROUP},
            "ignore": ["lm_head"],
        },
        torch.bfloat16,
    ),
    "fbgemm": Float8(
        (1, 0),
        "weight_scale",
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []},
    ),
    "modelopt": Float8(
        (0, 0),
        "weight_scale",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        dimensions=0,
        others={"input_scale": torch.tensor(0.5)},
    ),
    "scale_weight": Float8((0, 0), "scale_weight", {"quant_method": "fp8"}, dimensions=1),
    "exponents": Float8(
        (1, 4),
        "scale",
        {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 4]},
        torch.float8_e8m0fnu,
    ),
}


def encoded(weight: Tensor, style: Float8) -> tuple[Tensor, Tensor]:
    """The codes of a matrix and its scales: float8_e4m3fn (out, in), and a grid in the style's dtype."""
    rows, columns = style.block[0] or weight.shape[0], style.block[1] or weight.shape[1]
    grid_rows, grid_columns = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scales = torch.empty(grid_rows, grid_columns)
    codes = torch.empty_like(weight, dtype=torch.float32)
    for row in range(grid_rows):
        for column in range(grid_columns):
            part = (slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
            scale = (weight[part].float().abs().amax() / _LARGEST).clamp(min=1e-12)
            if style.dtype == torch.float8_e8m0fnu:
                scale = scale.log2().ceil().exp2()
            scales[row, column] = scale = scale.to(style.dtype).float()
            codes[part] = (weight[part].float() / scale).clamp(-_LARGEST, _LARGEST)
    return codes.to(torch.float8_e4m3fn), scales.to(style.dtype)


def meant(codes: Tensor, scales: Tensor, style: Float8, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What codes and their grid of scales stand for, one element after the other's block."""
    rows, columns = style.block[0] or codes.shape[0], style.block[1] or codes.shape[1]
    grid = scales.float().reshape(-(-codes.shape[0] // rows), -(-codes.shape[1] // columns))
    wide = grid.repeat_interleave(rows, 0)[: codes.shape[0]].repeat_interleave(columns, 1)[:, : codes.shape[1]]
    return (codes.float() * wide).to(dtype)


def write_float8(source: Path, directory: Path, style: Float8 = BLOCKS, *, apart: bool = False) -> dict[str, Tensor]:
    """Write a 16-bit checkpoint as one of 8-bit floats. Returns the tensors that it stands for.

    `apart`: each scale lies in the shard after that of its weight.
    """
    directory.mkdir(parents=True)
    floats: dict[str, Tensor] = {}
    files: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for place, (name, tensor) in enumerate(sorted(read_all(source).items())):
        module = name.rpartition(".")[0]
        home = place % 2 if apart else 0
        if tensor.ndim != 2 or not name.endswith(".weight") or module.endswith(style.floats):
            files[home][name] = floats[name] = tensor
            continue
        codes, scales = encoded(tensor, style)
        floats[name] = meant(codes, scales, style)
        files[home][name] = codes
        scales = (
            scales.reshape(()) if style.dimensions == 0 else scales.reshape(-1) if style.dimensions == 1 else scales
        )
        other = files[1 - home if apart else 0]
        other[f"{module}.{style.scale}"] = scales
        other.update({f"{module}.{leaf}": value.clone() for leaf, value in style.others.items()})
    _write(directory, files)
    for path in source.iterdir():
        if path.suffix == ".json" and "index" not in path.name and path.name != "config.json":
            shutil.copy(path, directory)
    config = {**read_json(source / "config.json"), "quantization_config": dict(style.section)}
    (directory / "config.json").write_text(json.dumps(config))
    return floats


def _write(directory: Path, files: tuple[dict[str, Tensor], ...]) -> None:
    files = tuple(tensors for tensors in files if tensors)
    if len(files) == 1:
        _save(files[0], directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _save(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file with safetensors. Exponents are written as bytes first: older releases have no dtype for them."""
    exponents = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e8m0fnu}
    as_bytes = {name: tensor.view(torch.uint8) if name in exponents else tensor for name, tensor in tensors.items()}
    save_file(as_bytes, path, metadata={"format": "pt"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name in exponents:
        header[name]["dtype"] = "F8_E8M0"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
