"""What was pushed to a repository, with its JSON form."""

from dataclasses import asdict, dataclass
from typing import Any

PUSH_SCHEMA = "int8cli.push/1"


@dataclass(frozen=True, slots=True)
class Pushed:
    """A conversion that is in a repository, as `commit` on the branch `revision`.

    `files` and `bytes` count all files of the conversion there; `uploaded_bytes` those of shards that this run sent.
    `new` is False if the repository had all of them before.
    """

    repository: str
    revision: str
    commit: str
    new: bool
    files: int
    bytes: int
    uploaded_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"schema": PUSH_SCHEMA, **asdict(self)}
