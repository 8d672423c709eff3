"""What a bug report needs to say of a machine and its installation, as plain objects with their JSON form."""

from dataclasses import asdict, dataclass
from typing import Any

ENVIRONMENT_SCHEMA = "int8cli.environment/1"


@dataclass(frozen=True, slots=True)
class Environment:
    """Versions, the machine, and the settings of the Hub. `packages` are None where they are not installed.

    `hub` never holds a token, only whether there is one. `gpus` are names with bytes of memory. Sizes are in bytes.
    """

    int8cli: str
    python: str
    system: str
    packages: dict[str, str | None]
    cpu: str
    cores: int
    memory_bytes: int | None
    memory_available_bytes: int | None
    gpus: tuple[tuple[str, int], ...]
    disk_free_bytes: dict[str, int]
    hub: dict[str, str]
    speed: dict[str, float] | None

    def to_json(self) -> dict[str, Any]:
        return {"schema": ENVIRONMENT_SCHEMA, **asdict(self)}
