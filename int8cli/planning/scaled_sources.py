"""Checkpoints of 8-bit floats with scales (FP8), as the 16- or 32-bit floats that they stand for.

Owns the names and shapes of such scales, and which config.json says so: DeepSeek's block scales, those of channels and
tensors of compressed-tensors, FBGEMM, ModelOpt and Quark. Everything after this step handles the weights like those of
a 16-bit checkpoint. A tensor that is not understood is left as it is, and `quantized` then refuses the checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from int8cli.checkpoint.tensor import Scaled, ShardContents, StoredTensor, TensorSpec
from int8cli.planning.plan import dtype_in
from int8cli.planning.quantized import declared_methods

# Under these methods a weight is its codes times its scales. ModelOpt may say so in a file of its own.
METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark"})
MODELOPT_FILE = "hf_quant_config.json"
_CODES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_SCALES = frozenset({"F32", "F16", "BF16", "F8_E8M0"})
_WEIGHT = "weight"
# The dtype that the values get where config.json names none (transformers takes bfloat16).
_DTYPE = "BF16"
# Scales of activations and of an FP8 cache. Int8 inputs get theirs at run time.
_OF_ACTIVATIONS = frozenset(
    (
        *("input_scale", "input_scale_ub", "input_global_scale", "activation_scale", "activation_scale_ub"),
        *("output_scale", "qscale_act", "k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale"),
    )
)


@dataclass(frozen=True, slots=True)
class _Config:
    """What a config says of its 8-bit floats: the dtype of the values, the sizes of blocks, bytes as exponents."""

    dtype: str
    blocks: tuple[tuple[int, int], ...]
    byte_exponents: bool


def methods_of(config: Mapping[str, Any], files: Sequence[str]) -> tuple[str, ...]:
    """The quantization methods that a source names, in config.json or in ModelOpt's own file."""
    own = ("modelopt",) if MODELOPT_FILE in files else ()
    return tuple(dict.fromkeys((*declared_methods(config), *own)))


def understood_methods(shards: Sequence[ShardContents]) -> frozenset[str]:
    """The methods that are understood in these shards: those of 8-bit floats, where any of these are read as floats."""
    found = any(stored.scaled is not None for contents in shards for stored in contents.tensors)
    return METHODS if found else frozenset()


def with_scaled_as_floats(
    shards: Sequence[ShardContents], config: Mapping[str, Any], methods: Sequence[str]
) -> tuple[ShardContents, ...]:
    """The shards with each tensor of 8-bit floats replaced by the floats that it stands for, and without the scales.

    The result has the config's dtype, as transformers gives it to the weights that it dequantizes.
    """
    if METHODS.isdisjoint(methods):
        return tuple(shards)
    settings = _read_config(config)
    places = {stored.spec.name: (contents, stored) for contents in shards for stored in contents.tensors}
    floats: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for _, stored in places.values():
        found = _scaled(stored, places, settings)
        if found is not None and found.scaled is not None:
            floats[stored.spec.name] = found
            used.add(found.scaled.scales.spec.name)
    if not floats:
        return tuple(shards)
    used |= {name for name, (_, stored) in places.items() if _is_of_activations(stored.spec)}
    return tuple(_replaced(contents, floats, used) for contents in shards)


def _replaced(contents: ShardContents, floats: Mapping[str, StoredTensor], used: set[str]) -> ShardContents:
    kept = (stored for stored in contents.tensors if stored.spec.name not in used)
    return replace(
        contents,
        tensors=tuple(floats.get(stored.spec.name, stored) for stored in kept),
        unread=tuple(stored for stored in contents.tensors if stored.spec.name in used),
    )


def _is_of_activations(spec: TensorSpec) -> bool:
    return spec.name.rpartition(".")[2] in _OF_ACTIVATIONS and spec.numel == 1  # a longer one is a model's own


def _scaled(
    stored: StoredTensor, places: Mapping[str, tuple[ShardContents, StoredTensor]], settings: _Config
) -> StoredTensor | None:
    """The floats that a tensor of codes stands for; None if it is not understood, or holds none."""
    spec = stored.spec
    if spec.dtype not in _CODES or len(spec.shape) < 2 or not spec.numel:
        return None
    scales = [places[name] for name in _scale_names(spec.name) if name in places]
    if len(scales) != 1 or _has_other_companions(spec.name, scales[0][1].spec.name, places):
        return None
    contents, scale = scales[0]
    block = _block(spec, scale, settings)
    if block is None:
        return None
    floats = TensorSpec(spec.name, settings.dtype, spec.shape)
    exponents = scale.spec.dtype == "U8"
    scaled = Scaled(stored, scale, contents.file_name, block, exponents)
    return StoredTensor(floats, stored.offset_bytes, stored.column_major, scaled=scaled)


def _scale_names(weight: str) -> Iterator[str]:
    """What the scales of a tensor may be called."""
    yield from (f"{weight}_scale_inv", f"{weight}_scale")
    module, _, leaf = weight.rpartition(".")
    if leaf == _WEIGHT:
        yield from (f"{module}.{name}" for name in ("scale_weight", "scale", "qscale_weight"))


def _has_other_companions(weight: str, scale: str, places: Mapping[str, Any]) -> bool:
    """Whether more than a scale belongs to a weight: zero points, second scales, an order of the columns."""
    others = ("_scale_2", "_global_scale", "_zero_point", "_shape", "_g_idx", "_packed")
    return any(f"{weight}{other}" in places for other in others if f"{weight}{other}" != scale)


def _block(spec: TensorSpec, scale: StoredTensor, settings: _Config) -> tuple[int, int] | None:
    """The rows and columns that share a scale, by the shape of the scales; None if they do not fit the tensor.

    A grid may be that of blocks of a size which the config names, with smaller ones at the ends. Otherwise its rows and
    columns divide those of the tensor.
    """
    if scale.spec.dtype not in _SCALES and not (scale.spec.dtype == "U8" and settings.byte_exponents):
        return None
    grid = _grid(spec, scale.spec)
    if grid is None or 0 in grid or (scale.column_major and 1 not in grid):
        return None
    rows, columns = spec.shape[-2:]
    for block in settings.blocks:
        if (-(-rows // block[0]), -(-columns // block[1])) == grid:
            return block
    return None if rows % grid[0] or columns % grid[1] else (rows // grid[0], columns // grid[1])


def _grid(spec: TensorSpec, scale: TensorSpec) -> tuple[int, int] | None:
    """The rows and columns of scales for each matrix of a tensor; None if the two have not the same matrices."""
    *matrices, rows, _ = spec.shape
    shape = list(scale.shape)
    if scale.numel == 1 and spec.numel == rows * spec.shape[-1]:
        return 1, 1
    if shape == matrices and matrices:
        return 1, 1
    if shape == [*matrices, rows]:
        return rows, 1
    if len(shape) == len(spec.shape) and shape[:-2] == matrices:
        return shape[-2], shape[-1]
    return None


def _read_config(config: Mapping[str, Any]) -> _Config:
    sections = tuple(_sections(config))
    blocks = tuple(
        dict.fromkeys(
            (value[0], value[1])
            for section in sections
            for value in (section.get("weight_block_size"), section.get("block_structure"))
            if isinstance(value, list) and len(value) == 2 and all(type(each) is int and each > 0 for each in value)
        )
    )
    exponents = any(section.get("scale_fmt") == "ue8m0" for section in sections)
    return _Config(dtype_in(config) or _DTYPE, blocks, exponents)


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and every object in it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _sections(value)
