"""The methods that `evaluate` compares: what they are called, and what each needs. Needs no torch.

Owns the names, and their order in every table. What a method computes is in `evaluation.methods`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from int8cli.errors import UnknownMethodError
from int8cli.results.evaluation import REFERENCE, Evaluation

ALL = "all"
SMOOTHED_WEIGHTS = "smoothed-int8-weights"


@dataclass(frozen=True, slots=True)
class MethodName:
    """A method: `key` is its name on the command line and in tables, `label` says in words what it is.

    `needs_weight`: it cannot be computed from int8 data and row_absmax alone. `needs_columns`: it uses stored ones.
    `needs_smoothing`: it uses exponents that a calibration finds and proves.
    """

    key: str
    label: str
    needs_weight: bool = True
    needs_columns: bool = False
    by_default: bool = True
    needs_smoothing: bool = False


# What loaders of compressed-tensors compute, by the inputs of the conversion.
_BY_INPUTS = {"absmax": "vector-wise", "zeropoint": "zeropoint-inputs", "none": "int8-weights"}


def _smoothed(key: str, label: str, *, needs_columns: bool = False) -> MethodName:
    return MethodName(f"smoothed-{key}", f"smoothed, {label}", True, needs_columns, False, True)


# "By row" is by row of X, one scale a token, with one scale for all of W, as in the paper's table 1.
METHOD_NAMES = (
    MethodName(REFERENCE, "16 bit"),
    MethodName("absmax-tensor", "absmax by tensor"),
    MethodName("zeropoint-tensor", "zero-point by tensor"),
    MethodName("absmax-row", "absmax by row"),
    MethodName("absmax-weight-row", "absmax by row of W", by_default=False),
    MethodName("vector-wise", "vector-wise"),
    MethodName("zeropoint-vector-wise", "zero-point vector-wise"),
    MethodName("zeropoint-inputs", "vector-wise, zero-point inputs", needs_weight=False, by_default=False),
    MethodName("bitsandbytes", "LLM.int8(), bitsandbytes", needs_weight=False),
    MethodName("llm-int8-exact", "LLM.int8(), exact columns"),
    MethodName("llm-int8-whole", "LLM.int8(), whole columns", by_default=False),
    MethodName("zeropoint-llm-int8", "zero-point LLM.int8()", by_default=False),
    MethodName("llm-int8-stored", "LLM.int8(), stored columns", needs_weight=False, needs_columns=True),
    MethodName("zeropoint-llm-int8-stored", "zero-point, stored columns", needs_weight=False, needs_columns=True),
    MethodName("int8-weights", "int8 weights, 16-bit inputs", needs_weight=False),
    _smoothed("vector-wise", "vector-wise"),
    _smoothed("zeropoint", "zero-point vector-wise"),
    _smoothed("zeropoint-inputs", "vector-wise, zero-point inputs"),
    _smoothed("bitsandbytes", "LLM.int8(), bitsandbytes"),
    _smoothed("stored", "zero-point, stored columns", needs_columns=True),
    _smoothed("int8-weights", "int8 weights, 16-bit inputs"),
)
METHOD_KEYS = tuple(method.key for method in METHOD_NAMES)


def chosen_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """These methods in the table's order, those of the default table if there are none; `all` stands for every one.

    Raises UnknownMethodError.
    """
    wanted = list(dict.fromkeys(keys))
    if not wanted:
        return tuple(method.key for method in METHOD_NAMES if method.by_default)
    if ALL in wanted:
        return METHOD_KEYS
    for key in wanted:
        if key not in METHOD_KEYS:
            raise UnknownMethodError(f"unknown method {key!r}", hint=_nearest(key))
    return tuple(key for key in METHOD_KEYS if key in wanted)


def loaders_of(found: Evaluation) -> dict[str, str]:
    """The methods that loaders compute, and so what a user gets: the loader's name by the method's key.

    In the layout compressed-tensors, for which bitsandbytes is not evaluated, loaders compute vector-wise int8, with
    the inputs that config.json asks for.
    """
    loaders = {"zeropoint-llm-int8-stored": "load_model", "bitsandbytes": "transformers and bitsandbytes"}
    if found.converted and found.method("bitsandbytes") is None:
        loaders[_BY_INPUTS[found.inputs]] = "vLLM, or transformers and compressed-tensors"
    return {key: loader for key, loader in loaders.items() if found.method(key) is not None}


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key.lower(), METHOD_KEYS, n=1, cutoff=0.5)
    listed = ", ".join(METHOD_KEYS)
    return f"Did you mean {close[0]}? The methods are: {listed}." if close else f"The methods are: {listed}."
