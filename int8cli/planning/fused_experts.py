"""Experts one by one, as `experts` split them, and the fused tensors that transformers' classes want of them.

Owns the way back: which matrices of an output make up which tensor, in which order. Reads nothing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.planning.expert_names import ALWAYS_FUSED
from int8cli.planning.plan import model_types

_MATRIX = re.compile(r"(?P<experts>(?:\S+\.)?experts)\.(?P<number>\d+)\.(?P<matrix>gate|up|down)_proj\.weight")
# Of each fused tensor, the matrices of an expert.
_TENSORS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
# Granite's checkpoints have the names of transformers 4.
_GRANITE = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}
_GRANITE_MODULE = "block_sparse_moe"
# Their checkpoints store (experts, in, out).
_TRANSPOSED = frozenset({"llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"})


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """A fused tensor, and the names of the weights (out, in) that it consists of, by expert.

    `spec` is (experts, out, in), the weights of an expert one after the other along `out`; `transposed`: (experts, in,
    out).
    """

    spec: TensorSpec
    parts: tuple[tuple[str, ...], ...]
    transposed: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for expert in self.parts for name in expert)


def fused_tensors(specs: Iterable[TensorSpec], config: Mapping[str, Any]) -> tuple[FusedTensor, ...]:
    """The fused tensors that these weights make up, where the family's loaders know only such.

    Empty for other families. What is no complete set of experts of one shape and dtype is left out.
    """
    types = frozenset(model_types(config))
    if ALWAYS_FUSED.isdisjoint(types):
        return ()
    transposed = not _TRANSPOSED.isdisjoint(types)
    modules: dict[str, dict[tuple[int, str], TensorSpec]] = {}
    for spec in specs:
        match = _MATRIX.fullmatch(spec.name)
        if match is not None and len(spec.shape) == 2:
            modules.setdefault(match["experts"], {})[int(match["number"]), match["matrix"]] = spec
    return tuple(
        tensor for experts, found in modules.items() for tensor in _of_module(experts, found, transposed=transposed)
    )


def _of_module(experts: str, found: Mapping[tuple[int, str], TensorSpec], *, transposed: bool) -> Iterator[FusedTensor]:
    count = 1 + max(number for number, _ in found)
    for name, matrices in _TENSORS.items():
        parts = [[found.get((number, matrix)) for matrix in matrices] for number in range(count)]
        known = [spec for expert in parts for spec in expert if spec is not None]
        if len(known) != count * len(matrices) or len({(spec.shape, spec.dtype) for spec in known}) != 1:
            continue
        out_features, in_features = known[0].shape
        shape = (len(matrices) * out_features, in_features)
        spec = TensorSpec(_fused_name(experts, name), known[0].dtype, (count, *(shape[::-1] if transposed else shape)))
        yield FusedTensor(spec, tuple(tuple(each.name for each in expert if each) for expert in parts), transposed)


def _fused_name(experts: str, name: str) -> str:
    module = experts.removesuffix(".experts")
    granite = module.rpartition(".")[2] == _GRANITE_MODULE
    return f"{module}.{_GRANITE[name]}" if granite else f"{experts}.{name}"
