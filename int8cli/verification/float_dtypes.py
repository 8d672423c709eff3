"""Whether the floats of an output have the digits that the loader itself would hold of the source.

Owns a judgement that shares no table with the conversion: what a model holds in float32, and what it casts, is asked of
transformers, whose loader is given the source's tensors and the output's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from int8cli.checkpoint.tensor import CAST_ON_LOAD, TORCH_NAMES, TensorSpec
from int8cli.records.shard_record import ShardRecord

# Digits of the significand, and then bits: what a cast may lose.
_PRECISION = {"float64": (53, 64), "float32": (24, 32), "float16": (11, 16), "bfloat16": (8, 16)}

Problem = tuple[str, str]  # a parameter, what is wrong with it
MissingWithout = Callable[[Sequence[TensorSpec]], frozenset[str]]


def cast_problems(output: Any, source: Any) -> Iterator[Problem]:
    """Parameters of the laid out `output` in a dtype other than the `source`'s, and not in float32 to lose nothing.

    A linear layer in float64 or in 8-bit floats loads, and fails when it runs.
    """
    wanted = {name: _name(parameter) for name, parameter in source.named_parameters()}
    for name, parameter in output.named_parameters():
        found, due = _name(parameter), wanted.get(name)
        if due in _PRECISION and parameter.dtype.is_floating_point and found not in (due, "float32"):
            yield name, f"is {found} in memory, where a load of the source holds {due}"


def rounding_problems(
    source: Any, records: Sequence[ShardRecord], missing_without: MissingWithout
) -> Iterator[Problem]:
    """Parameters that the source, loaded, holds with more digits than the output was written with.

    `missing_without` gives the parameters that find no tensor when some of the source's are left out: so the loader
    says where each goes, under whatever name.
    """
    parameters = {name: _name(parameter) for name, parameter in source.named_parameters()}
    for (was, written), names in _rounded(records).items():
        specs = [spec for record in records for spec in record.source_tensors]
        for name in sorted(missing_without([spec for spec in specs if spec.name not in names])):
            held = parameters.get(name)
            if held in _PRECISION and _loses(was, written) and _loses(held, written):
                yield name, f"was rounded from {was} to {written}, where a load of the source holds {held}"


def _rounded(records: Iterable[ShardRecord]) -> dict[tuple[str, str], frozenset[str]]:
    """The tensors that were written with fewer digits than the source has, by both dtypes as torch calls them."""
    found: dict[tuple[str, str], frozenset[str]] = {}
    for record in records:
        written = {tensor.name: tensor.dtype for tensor in record.files[0].tensors}
        for spec in record.source_tensors:
            dtype = written.get(spec.name)
            if dtype is None or dtype not in CAST_ON_LOAD:
                continue
            pair = (TORCH_NAMES[spec.dtype], TORCH_NAMES[dtype])
            if pair[0] in _PRECISION and pair[1] in _PRECISION and _loses(*pair):
                found[pair] = found.get(pair, frozenset()) | {spec.name}
    return found


def _loses(wide: str, narrow: str) -> bool:
    """Whether a cast from one dtype to the other rounds."""
    return _PRECISION[wide][0] > _PRECISION[narrow][0]


def _name(parameter: Any) -> str:
    return str(parameter.dtype).removeprefix("torch.")
