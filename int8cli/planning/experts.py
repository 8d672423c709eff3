"""Experts that a checkpoint stores fused, one 3-D tensor for all of them, as the single matrices that they consist of.

Owns the orientation of fused experts; `expert_names` has their names by model type. The matrices are parts of the
tensor of the file: nothing is read here, and everything after this step handles them like experts that are stored
separately.

Two shapes exist: (experts, out, in), as transformers' `Experts` modules have them, and (experts, in, out), as those of
Llama 4 and Qwen3-VL-MoE. The two tensors of a layer have different widths, so their shapes show which it is. Of the
two halves of `gate_up_proj`, gate is the first.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from int8cli.checkpoint.tensor import DTYPE_BITS, QUANTIZABLE_DTYPES, Scaled, ShardContents, StoredTensor, TensorSpec
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.expert_names import ExpertNames, names_when_split
from int8cli.planning.language_model import outside_language_model
from int8cli.planning.plan import model_types

# What precedes the expert's number, then the tensor. Granite's are named after what transformers 4 made of them.
_FUSED = re.compile(
    r"(?P<experts>(?:\S+\.)?experts)\.(?P<kind>gate_up_proj|down_proj)"
    r"|(?P<granite>(?:\S+\.)?block_sparse_moe)\.(?P<linear>input_linear|output_linear)\.weight"
)
_KINDS = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}


@dataclass(frozen=True, slots=True)
class _Layer:
    """The fused tensors of one layer: gate and up together, and down. `experts` is their module's name when split."""

    experts: str
    gate_up: TensorSpec
    down: TensorSpec
    names: ExpertNames

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
            yield from (f"{self.experts}.{expert}.{name}" for name in (*self.names.gate_up, self.names.down))


def split_experts(
    shards: Sequence[ShardContents], config: Mapping[str, Any], options: PlanOptions
) -> tuple[ShardContents, ...]:
    """The shards with each fused tensor of experts replaced by its matrices, where that is understood.

    A layer stays fused if any of its experts is left alone, because loaders read all or none in int8.
    """
    names = names_when_split(model_types(config))
    if not options.loader.experts or names is None:
        return tuple(shards)
    mappable = [stored.spec for contents in shards if contents.mappable for stored in contents.tensors]
    everything = {stored.spec.name for contents in shards for stored in contents.tensors}
    beside = outside_language_model(everything, config) if options.loader.language_model_only else frozenset[str]()
    layers = [layer for layer in _layers(mappable, names) if layer.transposed is not None]
    wanted = [layer for layer in layers if layer.gate_up.name.rpartition(".")[0] not in beside]
    wanted = [layer for layer in wanted if _is_wanted(layer, options)]
    by_tensor = {spec.name: layer for layer in wanted for spec in (layer.gate_up, layer.down)}
    modules = frozenset(layer.gate_up.name.partition(".experts.")[0] for layer in wanted if names.renames)
    return tuple(_split(contents, by_tensor, names, modules) for contents in shards)


def _layers(specs: Iterable[TensorSpec], names: ExpertNames) -> Iterator[_Layer]:
    found: dict[str, dict[str, TensorSpec]] = {}
    for spec in specs:
        match = _FUSED.fullmatch(spec.name)
        if match is None or len(spec.shape) != 3 or spec.dtype not in QUANTIZABLE_DTYPES:
            continue
        experts = match["experts"] or f"{match['granite']}.experts"
        found.setdefault(experts, {})[match["kind"] or _KINDS[match["linear"]]] = spec
    for experts, tensors in found.items():
        if len(tensors) == 2:
            yield _Layer(names.renamed(f"{experts}.")[:-1], tensors["gate_up_proj"], tensors["down_proj"], names)


def _is_wanted(layer: _Layer, options: PlanOptions) -> bool:
    fused = (layer.experts, layer.gate_up.name.rpartition(".")[0], layer.gate_up.name, layer.down.name)
    if any(fnmatchcase(name, pattern) for pattern in options.skip for name in (*fused, *layer.modules)):
        return False
    return not options.only or all(
        any(fnmatchcase(module, pattern) for pattern in options.only) for module in layer.modules
    )


def _split(
    contents: ShardContents, layers: Mapping[str, _Layer], names: ExpertNames, modules: Collection[str]
) -> ShardContents:
    """`modules` are those whose tensors have other names once their experts are split: the router moves along."""
    tensors: list[StoredTensor] = []
    for stored in contents.tensors:
        layer = layers.get(stored.spec.name)
        if layer is not None:
            tensors += _parts(stored, layer)
        elif any(stored.spec.name.startswith(f"{module}.") for module in modules):
            tensors.append(_under_name(stored, names.renamed(stored.spec.name)))
        else:
            tensors.append(stored)
    return replace(contents, tensors=tuple(tensors))


def _under_name(stored: StoredTensor, name: str) -> StoredTensor:
    return stored if name == stored.spec.name else replace(stored, spec=replace(stored.spec, name=name), whole=stored)


def _parts(whole: StoredTensor, layer: _Layer) -> Iterator[StoredTensor]:
    """The matrices (out, in) of a fused tensor, in file order: by expert, gate before up."""
    transposed = bool(layer.transposed)
    names = layer.names.gate_up if whole.spec.name == layer.gate_up.name else (layer.names.down,)
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
