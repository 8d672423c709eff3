"""Experts that a checkpoint stores fused, one 3-D tensor for all of them, as the single matrices that they consist of.

Owns the names and the orientation of fused experts, by model type. The matrices are parts of the tensor of the file:
nothing is read here, and everything after this step handles them like experts that are stored separately. Their names
are those that vLLM's loaders expect (fused_moe/routed_experts.py, `build_expert_params_mapping`).

Two shapes exist: (experts, out, in), as transformers' `Experts` modules have them, and (experts, in, out), as those of
Llama 4 and Qwen3-VL-MoE. The two tensors of a layer have different widths, so their shapes show which it is. Of the
two halves of `gate_up_proj`, gate is the first.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from int8cli.checkpoint.tensor import DTYPE_BITS, QUANTIZABLE_DTYPES, Scaled, ShardContents, StoredTensor, TensorSpec
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.plan import model_types


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


# The families whose gate and up are halves, one after the other, and whose experts vLLM reads as gate_proj, up_proj and
# down_proj. Others are left alone: GPT-OSS interleaves the two, DBRX has no third dimension.
_FAMILIES = _types(
    """
    afmoe cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite
    glm4v_moe glm4v_moe_text granitemoe granitemoehybrid granitemoeshared llama4 llama4_text olmoe qwen2_moe
    qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe qwen3_vl_moe_text
    """
)
# Of these, no loader merges separate experts again: transformers knows them fused only.
ALWAYS_FUSED = _types(
    """
    granitemoe granitemoehybrid granitemoeshared llama4 llama4_text qwen3_5_moe qwen3_5_moe_text qwen3_vl_moe
    qwen3_vl_moe_text
    """
)
# What precedes the expert's number, then the tensor. Granite's are named after what transformers 4 made of them.
_FUSED = re.compile(
    r"(?P<experts>(?:\S+\.)?experts)\.(?P<kind>gate_up_proj|down_proj)"
    r"|(?P<granite>(?:\S+\.)?block_sparse_moe)\.(?P<linear>input_linear|output_linear)\.weight"
)
_KINDS = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}


@dataclass(frozen=True, slots=True)
class _Layer:
    """The fused tensors of one layer: gate and up together, and down. `experts` is their module's name in vLLM."""

    experts: str
    gate_up: TensorSpec
    down: TensorSpec

    @property
    def transposed(self) -> bool | None:
        """Whether the matrices are stored (in, out); None if the shapes fit neither order."""
        (count, first, second), (down_count, down_first, down_second) = self.gate_up.shape, self.down.shape
        if count != down_count or 0 in (*self.gate_up.shape, *self.down.shape):
            return None
        if (second, first) == (down_first, 2 * down_second):
            return False
        return True if (first, second) == (down_second, 2 * down_first) else None

    @property
    def modules(self) -> Iterator[str]:
        for expert in range(self.gate_up.shape[0]):
            yield from (f"{self.experts}.{expert}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))


def split_experts(
    shards: Sequence[ShardContents], config: Mapping[str, Any], options: PlanOptions
) -> tuple[ShardContents, ...]:
    """The shards with each fused tensor of experts replaced by its matrices, where that is understood.

    A layer stays fused if the options leave any of its experts alone, because loaders read all or none in int8.
    """
    if not options.loader.experts or _FAMILIES.isdisjoint(model_types(config)):
        return tuple(shards)
    mappable = [stored.spec for contents in shards if contents.mappable for stored in contents.tensors]
    layers = [layer for layer in _layers(mappable) if layer.transposed is not None and _is_wanted(layer, options)]
    by_tensor = {spec.name: layer for layer in layers for spec in (layer.gate_up, layer.down)}
    return tuple(_split(contents, by_tensor) for contents in shards)


def _layers(specs: Iterable[TensorSpec]) -> Iterator[_Layer]:
    found: dict[str, dict[str, TensorSpec]] = {}
    for spec in specs:
        match = _FUSED.fullmatch(spec.name)
        if match is None or len(spec.shape) != 3 or spec.dtype not in QUANTIZABLE_DTYPES:
            continue
        experts = match["experts"] or f"{match['granite']}.experts"
        found.setdefault(experts, {})[match["kind"] or _KINDS[match["linear"]]] = spec
    for experts, tensors in found.items():
        if len(tensors) == 2:
            yield _Layer(experts, tensors["gate_up_proj"], tensors["down_proj"])


def _is_wanted(layer: _Layer, options: PlanOptions) -> bool:
    fused = (layer.experts, layer.gate_up.name, layer.down.name)
    if any(fnmatchcase(name, pattern) for pattern in options.skip for name in (*fused, *layer.modules)):
        return False
    return not options.only or all(
        any(fnmatchcase(module, pattern) for pattern in options.only) for module in layer.modules
    )


def _split(contents: ShardContents, layers: Mapping[str, _Layer]) -> ShardContents:
    tensors: list[StoredTensor] = []
    for stored in contents.tensors:
        layer = layers.get(stored.spec.name)
        tensors += [stored] if layer is None else _parts(stored, layer)
    return replace(contents, tensors=tuple(tensors))


def _parts(whole: StoredTensor, layer: _Layer) -> Iterator[StoredTensor]:
    """The matrices (out, in) of a fused tensor, in file order: by expert, gate before up."""
    transposed = bool(layer.transposed)
    names = ("gate_proj", "up_proj") if whole.spec.name == layer.gate_up.name else ("down_proj",)
    count, first, second = whole.spec.shape
    in_features, together = (first, second) if transposed else (second, first)
    out_features = together // len(names)
    width_bytes = DTYPE_BITS[whole.file_dtype] // 8
    # From one part's first element to the next part's: the next column, or the next row.
    step = out_features if transposed else out_features * in_features
    for expert in range(count):
        for place, name in enumerate(names):
            spec = TensorSpec(f"{layer.experts}.{expert}.{name}.weight", whole.spec.dtype, (out_features, in_features))
            start = expert * first * second + place * step
            pitch = together if transposed and len(names) > 1 else None
            scaled = _part_of_scaled(whole, start, transposed=transposed)
            yield StoredTensor(spec, whole.offset_bytes + start * width_bytes, transposed, whole, pitch, scaled)


def _part_of_scaled(whole: StoredTensor, start: int, *, transposed: bool) -> Scaled | None:
    """What the codes of a part stand for that begins at the element `start` of the whole tensor."""
    if whole.scaled is None:
        return None
    return replace(whole.scaled, first=divmod(start, whole.spec.shape[-1]), turned=transposed)
