"""The JSON files under `int8/`, read as input like any other.

Owns what they have in common: the size limit, the schema field, and which names and shapes are valid. Knows no document
by name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from int8cli.checkpoint.output_names import OWN_DIRECTORY, is_output_name, is_own
from int8cli.checkpoint.reader import read_small
from int8cli.checkpoint.tensor import DTYPE_BITS
from int8cli.errors import OutputError
from int8cli.records import entries
from int8cli.typed_json import InvalidJsonError, parse_json, shown

_LIMIT_BYTES = 1 << 30  # a record of 10,000 tensors has 7 MB
_LARGEST_TENSOR_BITS = 2**63 - 1

Read = TypeVar("Read")


class TensorDescription(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def read_document(path: Path, parse: Callable[[Any], Read], hint: str = "") -> Read | None:
    """Read a JSON file and return what `parse` returns for it; None if there is no such file.

    Raises OutputError if the file cannot be read, or, naming file and field, if `parse` raises InvalidJsonError.
    """
    try:
        return parse(parse_json(read_small(path, _LIMIT_BYTES)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InvalidJsonError as error:
        raise OutputError(f"{path} is damaged or was edited: {error}", hint=hint) from error
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror})", hint="Check its permissions.") from error


def without_schema(document: Any, *known: str) -> dict[str, Any]:
    """The document's other fields. Raises InvalidJsonError unless its schema is in `known`."""
    if not isinstance(document, dict):
        raise InvalidJsonError(f"is {shown(document)}, not an object")
    if document.get("schema") not in known:
        raise InvalidJsonError(
            f"is {shown(document.get('schema'))}, but this version reads {' and '.join(known)}", "schema"
        )
    return {name: value for name, value in document.items() if name != "schema"}


def check_file_name(name: str, place: str) -> None:
    """Raise InvalidJsonError unless `name` can be a file of a conversion. `place` is the field it was read from."""
    state = is_own(name) and (name.split("/")[0] != OWN_DIRECTORY or [*name.split("/"), ""][1] in {"", *entries.ALL})
    if not is_output_name(name) or state:
        raise InvalidJsonError(f"is {shown(name)}, which is not a file of a conversion", place)


def check_shard_name(name: str, place: str) -> None:
    """The same for a shard, which is never in our own directory."""
    if not is_output_name(name) or is_own(name) or not name.endswith(".safetensors"):
        raise InvalidJsonError(f"is {shown(name)}, which is not a shard of a conversion", place)


def check_tensor(tensor: TensorDescription, place: str) -> None:
    """Raise InvalidJsonError for an unknown dtype, or for a shape with more bits than fit in a file."""
    bits = DTYPE_BITS.get(tensor.dtype)
    if bits is None:
        raise InvalidJsonError(f"has the unknown dtype {shown(tensor.dtype)}", place)
    for extent in sorted(tensor.shape):  # zeros first
        bits *= extent
        if bits > _LARGEST_TENSOR_BITS:
            raise InvalidJsonError(f"is {shown(list(tensor.shape))}, larger than any file", f"{place}.shape")
