"""What `dequantize` wrote, as a plain object with its JSON form. Needs no torch."""

from dataclasses import asdict, dataclass
from typing import Any

DEQUANTIZATION_SCHEMA = "int8cli.dequantized/1"


@dataclass(frozen=True, slots=True)
class Dequantization:
    """A conversion written in floats. `restored_layers` were int8; `dtypes` are theirs now, as torch calls them.

    `output_bytes` is the size of all shards, `shards_already_there` how many an earlier run had finished.
    """

    source: str
    output: str
    restored_layers: int
    output_bytes: int
    shards: int
    shards_already_there: int
    dtypes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": DEQUANTIZATION_SCHEMA, **asdict(self)}
