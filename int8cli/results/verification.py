"""The result of verify: checks that passed, failed (with every failure) or were skipped, and their JSON form.

Owns the schema of the result.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

VERIFICATION_SCHEMA = "int8cli.verification/1"

Status = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True, slots=True)
class Failure:
    """One problem: the file, the tensor or layer if there is one, and what is wrong."""

    file: str
    problem: str
    tensor: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result. `detail` says what was checked, or why it was not."""

    name: str
    status: Status
    detail: str
    failures: tuple[Failure, ...] = ()

    @classmethod
    def of(cls, name: str, detail: str, failures: Iterable[Failure]) -> "Check":
        found = tuple(failures)
        return cls(name, "failed" if found else "passed", detail, found)

    @classmethod
    def not_made(cls, name: str, why: str) -> "Check":
        return cls(name, "not checked", why)


@dataclass(frozen=True, slots=True)
class Verification:
    """The checks of one directory. `source` is the name of the source it was compared with, if any."""

    directory: str
    model: str
    layout: str
    source: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": VERIFICATION_SCHEMA,
            "directory": self.directory,
            "model": self.model,
            "layout": self.layout,
            "source": self.source,
            "holds": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }
