"""Reads the pickle inside a `.bin`, if it is a plain state dict as torch.save writes it, into descriptions of tensors.

It interprets the opcodes itself. It imports and calls nothing, and builds only tuples, dicts and descriptions, whose
number is bounded by the pickle's length. A model's shapes are thus known without torch, which takes a second to import.
Any other pickle is left to torch's own unpickler (see `pickled`), which reads more and explains errors.
"""

import math
import pickletools
from dataclasses import dataclass
from typing import Any

from int8cli.checkpoint.header_json import MOST_TENSORS
from int8cli.checkpoint.pickle_bounds import MOST_STACKED
from int8cli.checkpoint.tensor import DTYPE_BITS, TORCH_NAMES

_STORAGE_DTYPES = {
    "torch BoolStorage": "bool",
    "torch ByteStorage": "uint8",
    "torch CharStorage": "int8",
    "torch ShortStorage": "int16",
    "torch IntStorage": "int32",
    "torch LongStorage": "int64",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64",
    "torch ComplexFloatStorage": "complex64",
    "torch.storage UntypedStorage": "",
}
_WIDTHS = {torch_name: DTYPE_BITS[name] // 8 for name, torch_name in TORCH_NAMES.items()}
_LITERALS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_LARGEST = 2**63 - 1
_OPCODES_A_TENSOR = 60  # about 40 are needed


class NotAStateDictError(Exception):
    """The pickle does not have the form that this module reads; torch may read it. Never reaches a user."""


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as torch.save describes it: a view into a storage, with offset and strides in elements.

    `dtype` is torch's name of the dtype, `storage` the name of the record with its
    `storage_bytes` bytes.
    """

    dtype: str
    storage: str
    storage_bytes: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_row_major(self) -> bool:
        return _row_major(self.shape, self.strides)

    @property
    def is_column_major(self) -> bool:
        """Whether the bytes are those of the row-major transpose, as with a saved `W.t()`."""
        return len(self.shape) == 2 and _row_major(self.shape[::-1], self.strides[::-1])


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that the pickle would import. It is never imported."""

    text: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        """The length of an untyped storage is in bytes."""
        return self.numel * _WIDTHS[self.dtype] if self.dtype else self.numel


def read_state_dict(pickle: bytes) -> dict[str, PickledTensor]:
    """The tensors by name. Raises NotAStateDictError for everything except a plain state dict of torch.save."""
    try:
        result = _run(pickle)
    except (IndexError, KeyError, TypeError, ValueError) as error:  # a damaged pickle
        raise NotAStateDictError(str(error)) from error
    if not isinstance(result, dict):
        raise NotAStateDictError(f"one {type(result).__name__}")
    for name, tensor in result.items():
        if not isinstance(name, str) or not isinstance(tensor, PickledTensor) or not name.isprintable():
            raise NotAStateDictError(f"{name!r:.80} is not a tensor with a plain name")
    return result


def _run(pickle: bytes) -> Any:
    """The object that the opcodes leave on the stack at STOP."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    storages: dict[str, _Storage] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        name = opcode.name
        if count > MOST_TENSORS * _OPCODES_A_TENSOR or len(stack) > MOST_STACKED:
            raise NotAStateDictError("more than any list of tensors")
        if name == "STOP":
            return stack.pop()
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(_once(memo[argument]))
        elif name == "BINPERSID":
            storage = _storage(stack.pop())
            if storages.setdefault(storage.key, storage) != storage:
                raise NotAStateDictError(f"two storages named {storage.key!r:.40}")
            stack.append(storage)
        elif name != "PROTO":
            _step(name, argument, stack)
    raise NotAStateDictError("it has no end")


def _once(value: Any) -> Any:
    """The value itself, if it may be in two places. A tuple or dict may not: it could double with each step."""
    if isinstance(value, (tuple, dict)) and value != ():
        raise NotAStateDictError(f"a {type(value).__name__} in two places")
    return value


def _tuple(items: list[Any]) -> tuple[Any, ...]:
    """A tuple nested at most two deep. Hashing a very deep one crashes the process."""
    for item in items:
        if isinstance(item, tuple) and any(isinstance(inner, tuple) for inner in item):
            raise NotAStateDictError("tuples in tuples in tuples")
    return tuple(items)


def _step(name: str, argument: Any, stack: list[Any]) -> None:
    """One opcode that uses only the stack."""
    if name in _LITERALS:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "TUPLE":
        stack.append(_tuple(_since_mark(stack)))
    elif name in _TUPLES:
        items = [stack.pop() for _ in range(_TUPLES[name])]
        stack.append(_tuple(items[::-1]))
    elif name == "GLOBAL":
        stack.append(_Name(argument))
    elif name == "REDUCE":
        arguments = stack.pop()
        stack.append(_rebuilt(stack.pop(), arguments))
    elif name in ("SETITEM", "SETITEMS"):
        items = _since_mark(stack) if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
        if not all(isinstance(key, str) for key in items[::2]):
            raise NotAStateDictError("a key that is not a name")
        _dict_on(stack).update(zip(items[::2], items[1::2], strict=True))
    elif name == "BUILD":
        stack.pop()  # a state dict's `_metadata`: the versions of its modules
        _dict_on(stack)
    else:
        raise NotAStateDictError(f"opcode {name}")


def _since_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _dict_on(stack: list[Any]) -> dict[Any, Any]:
    if not isinstance(stack[-1], dict):
        raise NotAStateDictError("items of something that is not a dict")
    return stack[-1]


def _storage(persistent: Any) -> _Storage:
    """The storage in a persistent id: the word `storage`, its type, its record's name, its device, its length."""
    word, kind, key, _, numel = persistent
    plain = isinstance(kind, _Name) and isinstance(key, str) and type(numel) is int and numel >= 0
    if word != "storage" or not plain:
        raise NotAStateDictError("a persistent id that is not a storage")
    return _Storage(_STORAGE_DTYPES[kind.text], key, numel)


def _rebuilt(function: Any, arguments: Any) -> Any:
    """A description of what these functions of torch would return. Calls of other functions are refused."""
    called = function.text if isinstance(function, _Name) else ""
    if called == "collections OrderedDict" and arguments == ():
        return {}
    if called == "torch._utils _rebuild_parameter":
        tensor, _, _ = arguments
        return tensor
    if called == "torch._utils _rebuild_tensor_v2":
        storage, offset, shape, strides, _, _ = arguments
        return _tensor(storage, storage.dtype if isinstance(storage, _Storage) else "", offset, shape, strides)
    if called == "torch._utils _rebuild_tensor_v3":
        storage, offset, shape, strides, _, _, dtype = arguments
        name = dtype.text.removeprefix("torch ") if isinstance(dtype, _Name) else ""
        return _tensor(storage, name, offset, shape, strides)
    raise NotAStateDictError(f"a call of {called or 'something unknown'}")


def _tensor(storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> PickledTensor:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple) or not dtype:
        raise NotAStateDictError("a tensor that is not a view into a storage")
    plain = all(type(number) is int and 0 <= number <= _LARGEST for number in (offset, *shape, *strides))
    if not plain or len(shape) != len(strides):
        raise NotAStateDictError("a tensor that is not a view into a storage")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    # The length of an untyped storage is in bytes; `pickled` compares it with the record.
    if storage.dtype and math.prod(shape) and last >= storage.numel:
        raise NotAStateDictError("a tensor that goes beyond its storage")
    return PickledTensor(dtype, storage.key, storage.nbytes, offset, shape, strides)


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if not math.prod(shape):
        return True
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True
