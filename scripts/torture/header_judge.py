"""Our reader of safetensors headers, held against the package's own.

Owns what may differ between them: int8cli refuses a few files that the package reads, for the reasons below. It reads
nothing that the package refuses, and no tensor otherwise.
"""

import io
import re

from safetensors import SafetensorError, deserialize

from int8cli.checkpoint.header import read_header
from int8cli.errors import CheckpointError
from torture.fuzzing import WrongResultError

# The reasons for which int8cli alone may refuse a file.
STRICTER = {
    "tensors, or as many values": "more than 262,144 tensors: a bound of memory and time; no model has as many",
    "names .* twice": "readers differ in which of two tensors of one name counts",
    "an extent beyond 63 bits": "torch has no tensor with it, not even an empty one",
    "a number beyond 64 bits|a negative number": "it stands in a field that neither reads",
}
_Described = dict[str, tuple[str, list[int], bytes]]


def compare_with_safetensors(content: bytes) -> None:
    """Returns where both read the file, alike. Raises CheckpointError where int8cli refuses it, WrongResultError."""
    theirs = _by_safetensors(content)
    try:
        layout = read_header(io.BytesIO(content), "x.safetensors", len(content))
    except CheckpointError as error:
        if theirs is not None and not any(re.search(reason, str(error)) for reason in STRICTER):
            raise WrongResultError(f"is refused, but safetensors reads it: {error!s:.100}") from error
        raise
    ours = {
        stored.spec.name: (stored.spec.dtype, list(stored.spec.shape), content[stored.offset_bytes : stored.end_bytes])
        for stored in layout.tensors
    }
    if theirs is None:
        raise WrongResultError("is read, but safetensors refuses it")
    if ours != theirs:
        raise WrongResultError("is read as other tensors than by safetensors")


def _by_safetensors(content: bytes) -> _Described | None:
    """Each tensor's dtype, shape and bytes; None where the file is refused."""
    try:
        return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(content)}
    except (SafetensorError, OSError, ValueError, OverflowError):
        return None
