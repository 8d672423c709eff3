"""What a pickle may ask of whoever unpickles it, counted without unpickling anything.

A pickle of a hundred bytes can stand for an object of 2^50 parts, and one of a few hundred kilobytes for tuples in one
another so deep that hashing them ends the process. Owns the bounds within which a pickle is given to torch's unpickler,
which has none. Follows the opcodes as far as what holds what; builds nothing.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

MOST_NESTED = 100
MOST_OPCODES = 5_000_000  # a tensor takes about 40
_MOST_TEXT = 1 << 27

_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
# These change the object below what they take, and leave it there.
_FILLS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
_DUPLICATES = "DUP"
_MARK = pickletools.markobject
_REBUILD = "torch._utils _rebuild_"
_FLAT_RESULTS = frozenset({"torch Size", "torch device", "torch.serialization _get_layout", "_codecs encode"})


class PickleBoundsError(Exception):
    """A pickle asks for more than any list of tensors; the message says of what, and at which byte."""


class BoundedReader:
    """The next `limit_bytes` bytes of a file as pickletools reads them; more are refused before they are read."""

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
class _Thing:
    """What an object on the stack is, for our purpose: how deep it nests, and the length of all text in it.

    `is_container`: in two places, it could make the whole grow with each of them; `makes_tensors`: a function whose
    results hold nothing else.
    """

    depth: int = 0
    text: int = 0
    is_container: bool = False
    makes_tensors: bool = False


_ATOM = _Thing()


def check_pickle(file: BinaryIO | BoundedReader) -> None:
    """Follow one pickle up to its end. Raises PickleBoundsError, ValueError where it is damaged.

    Within the bounds every object is a tree: no tuple, list or dict of the pickle stands in two places.
    """
    stack: list[_Thing | None] = []  # None is a mark
    memo: dict[int, _Thing] = {}
    for count, (opcode, argument, place) in enumerate(pickletools.genops(cast(IO[bytes], file))):
        try:
            _step(opcode, argument, stack, memo)
        except (IndexError, KeyError, AttributeError) as error:
            raise ValueError(f"the opcode {opcode.name} at byte {place} has nothing to work on") from error
        except PickleBoundsError as error:
            raise PickleBoundsError(f"{error}, at byte {place:,}") from None
        if count >= MOST_OPCODES:
            raise PickleBoundsError(f"it has more than {MOST_OPCODES:,} steps")


def _step(opcode: Any, argument: Any, stack: list[_Thing | None], memo: dict[int, _Thing]) -> None:
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
        taken = list(_taken(opcode, stack))
        if opcode.stack_after:
            stack.append(_made(name, argument, taken))


def _top(stack: list[_Thing | None]) -> _Thing:
    top = stack[-1]
    if top is None:
        raise IndexError
    return top


def _taken(opcode: Any, stack: list[_Thing | None]) -> Iterator[_Thing]:
    """What an opcode takes off the stack, the topmost first."""
    for wanted in reversed(opcode.stack_before):
        if wanted is pickletools.stackslice:
            while stack[-1] is not None:
                yield _top(stack)
                stack.pop()
        elif wanted is _MARK:
            if stack.pop() is not None:
                raise IndexError
        else:
            yield _top(stack)
            stack.pop()


def _made(name: str, argument: Any, taken: list[_Thing]) -> _Thing:
    """What an opcode puts on the stack, from what it took."""
    if not taken:
        return _leaf(name, argument)
    function = taken[-1]
    if name == "BINPERSID" or (name == "REDUCE" and function.makes_tensors):
        _sum_of(name, taken)
        return _ATOM
    return _sum_of(name, taken)


def _sum_of(name: str, taken: list[_Thing]) -> _Thing:
    filled = taken[-1] if name in _FILLS else _ATOM
    inside = taken[:-1] if name in _FILLS else taken
    depth = max(filled.depth, 1 + max((thing.depth for thing in inside), default=0))
    text = filled.text + len(inside) + sum(thing.text for thing in inside)
    if depth > MOST_NESTED:
        raise PickleBoundsError(f"it nests more than {MOST_NESTED} deep")
    if text > _MOST_TEXT:
        raise PickleBoundsError("it repeats text over and over")
    if name == "BUILD" and not filled.is_container:
        return filled  # state that is set on a tensor
    return _Thing(depth, text, is_container=True)


def _leaf(name: str, argument: Any) -> _Thing:
    if name == "GLOBAL":
        return _Thing(text=len(argument), makes_tensors=argument.startswith(_REBUILD) or argument in _FLAT_RESULTS)
    if name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "DICT", "LIST", "FROZENSET"):
        return _Thing(is_container=True)
    return _Thing(text=len(argument) if isinstance(argument, (str, bytes, bytearray)) else 1)
