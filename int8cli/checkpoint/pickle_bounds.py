"""Bounds on what a pickle may build, checked without unpickling it.

A pickle of a hundred bytes can describe an object of 2^50 parts, and one of a few hundred kilobytes tuples nested so
deep that hashing them crashes the process. Torch's unpickler has no bounds; this module owns those that are checked
before torch gets a pickle. It follows which objects contain which, and builds nothing. Some functions that torch would
call grow without bounds (`bytearray(10**12)`, codecs by name), so it owns also what may be named and called.
"""

import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

MOST_NESTED = 100
MOST_OPCODES = 5_000_000  # a tensor takes about 40
MOST_STACKED = 1 << 17  # pickle adds the entries of a dict a thousand at a time
_MOST_TEXT = 1 << 27

_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
# These change the object below what they pop, and leave it on the stack.
_FILLS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
_DUPLICATES = "DUP"
_MARK = pickletools.markobject
_CALLS = ("REDUCE", "NEWOBJ")
_REBUILD = "torch._utils _rebuild_"
_FLAT_RESULTS = frozenset({"torch Size", "torch device", "torch.serialization _get_layout"})
_CONTAINERS = frozenset({"collections OrderedDict", "torch._tensor _rebuild_from_type_v2"})
# What pickles of tensors name besides functions: their classes, storages and dtypes, and the schemes of quantized ones.
_NAMED = re.compile(
    r"torch\.nn\.parameter Parameter|torch Tensor|torch\.storage (?:Untyped|Typed)Storage|torch(?:\.cuda)? \w+Storage"
    r"|torch (?:(?:b?float|q?u?int|complex|bits)\d\w*|bool|half|float|double|short|int|long)"
    r"|torch per_(?:tensor|channel)_\w+"
)


class PickleBoundsError(Exception):
    """A pickle exceeds what any list of tensors needs. The message says what it exceeds, and at which byte."""


class BoundedReader:
    """The next `limit_bytes` bytes of a file, for pickletools. Reading more raises PickleBoundsError."""

    def __init__(self, file: BinaryIO, limit_bytes: int) -> None:
        self._file, self._left = file, limit_bytes

    def read(self, count: int) -> bytes:
        if count > self._left:
            raise PickleBoundsError("it is longer than any list of tensors")
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise PickleBoundsError("it is longer than any list of tensors")
        return line

    def tell(self) -> int:
        return self._file.tell()


@dataclass(frozen=True, slots=True)
class _Item:
    """An object on the stack: how deep it nests, and the length of all text in it.

    `is_container`: if it were in two places, the whole could double with each step. `is_function`: it may be called.
    `makes_tensors`: a function whose results contain no other objects.
    """

    depth: int = 0
    text: int = 0
    is_container: bool = False
    is_function: bool = False
    makes_tensors: bool = False


_ATOM = _Item()


def check_pickle(file: BinaryIO | BoundedReader) -> None:
    """Follow one pickle to its end. Raises PickleBoundsError, or ValueError if it is damaged.

    Within the bounds every object is a tree: no tuple, list or dict is in two places. Only functions that make tensors,
    or a dict of them, are called.
    """
    stack: list[_Item | None] = []  # None is a mark
    memo: dict[int, _Item] = {}
    for count, (opcode, argument, place) in enumerate(pickletools.genops(cast(IO[bytes], file))):
        try:
            _step(opcode, argument, stack, memo)
        except (IndexError, KeyError, AttributeError) as error:
            raise ValueError(f"the opcode {opcode.name} at byte {place} has nothing to work on") from error
        except PickleBoundsError as error:
            raise PickleBoundsError(f"{error}, at byte {place:,}") from None
        if count >= MOST_OPCODES:
            raise PickleBoundsError(f"it has more than {MOST_OPCODES:,} steps")
        if len(stack) > MOST_STACKED:
            raise PickleBoundsError(f"it piles up more than {MOST_STACKED:,} objects")


def _step(opcode: Any, argument: Any, stack: list[_Item | None], memo: dict[int, _Item]) -> None:
    name = opcode.name
    if name == "MARK":
        stack.append(None)
    elif name in _PUTS:
        memo[len(memo) if name == "MEMOIZE" else argument] = _top(stack)
    elif name in _GETS:
        found = memo[argument]
        if found.is_container:
            raise PickleBoundsError("it puts one list, tuple or dict in two places")
        stack.append(found)
    elif name == _DUPLICATES:
        raise PickleBoundsError("it puts one object in two places")
    elif name not in ("PROTO", "FRAME", "STOP"):
        popped = list(_pop(opcode, stack))
        if opcode.stack_after:
            stack.append(_result(name, argument, popped))


def _top(stack: list[_Item | None]) -> _Item:
    top = stack[-1]
    if top is None:
        raise IndexError
    return top


def _pop(opcode: Any, stack: list[_Item | None]) -> Iterator[_Item]:
    """Pop what an opcode removes from the stack, the topmost first."""
    for expected in reversed(opcode.stack_before):
        if expected is pickletools.stackslice:
            while stack[-1] is not None:
                yield _top(stack)
                stack.pop()
        elif expected is _MARK:
            if stack.pop() is not None:
                raise IndexError
        else:
            yield _top(stack)
            stack.pop()


def _result(name: str, argument: Any, popped: list[_Item]) -> _Item:
    """What an opcode pushes on the stack, given what it popped."""
    if not popped:
        return _leaf(name, argument)
    function = popped[-1]
    if name in _CALLS and not function.is_function:
        raise PickleBoundsError("it calls what makes no tensor")
    if name == "BINPERSID" or (name in _CALLS and function.makes_tensors):
        _combined(name, popped)
        return _ATOM
    return _combined(name, popped)


def _combined(name: str, popped: list[_Item]) -> _Item:
    """An object that contains what was popped. Raises PickleBoundsError if it is too deep or too long."""
    filled = popped[-1] if name in _FILLS else _ATOM
    inside = popped[:-1] if name in _FILLS else popped
    depth = max(filled.depth, 1 + max((item.depth for item in inside), default=0))
    text = filled.text + len(inside) + sum(item.text for item in inside)
    if depth > MOST_NESTED:
        raise PickleBoundsError(f"it nests more than {MOST_NESTED} deep")
    if text > _MOST_TEXT:
        raise PickleBoundsError("it repeats text over and over")
    if name == "BUILD" and not filled.is_container:
        return filled  # state that is set on a tensor
    return _Item(depth, text, is_container=True)


def _leaf(name: str, argument: Any) -> _Item:
    if name == "GLOBAL":
        return _named(argument)
    if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "DICT", "LIST", "FROZENSET"):
        return _Item(is_container=True)
    return _Item(text=len(argument) if isinstance(argument, (str, bytes, bytearray)) else 1)


def _named(name: str) -> _Item:
    """What a pickle names, as `module name`. Raises PickleBoundsError for what no pickle of tensors names."""
    makes_tensors = name.startswith(_REBUILD) or name in _FLAT_RESULTS
    is_function = makes_tensors or name in _CONTAINERS
    if not is_function and not _NAMED.fullmatch(name):
        raise PickleBoundsError(f"it names {name.replace(' ', '.'):.100}")
    return _Item(text=len(name), is_function=is_function, makes_tensors=makes_tensors)
