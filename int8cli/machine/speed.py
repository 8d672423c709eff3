"""How fast this machine computes: measured once, and remembered. Needs no torch in this process.

Owns the file of measured rates, and the process that measures for those who do not import torch.
"""

import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from int8cli.checkpoint.reader import read_small
from int8cli.checkpoint.writer import write_file
from int8cli.errors import Int8cliError
from int8cli.typed_json import InvalidJsonError, parse_json, read_as

FILE = "speed.json"
_SCHEMA = "int8cli.speed/1"
_MEASURE = "int8cli.machine.measure"
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Speed:
    """Rates with all cores at work: operations a second of a matrix product by dtype, bytes a second of 16-bit weights
    that become int8 with their error measured."""

    bfloat16: float
    float16: float
    float32: float
    quantized_bytes: float

    def product(self, dtype: str) -> float:
        """Operations a second, by the dtype's name in safetensors."""
        return {"BF16": self.bfloat16, "F16": self.float16}.get(dtype, self.float32)

    def fastest(self, other: "Speed | None") -> "Speed":
        """The better of two measurements: the other one was disturbed by what ran beside it."""
        if other is None:
            return self
        mine, theirs = asdict(self), asdict(other)
        return Speed(**{name: max(value, theirs[name]) for name, value in mine.items()})


@dataclass(frozen=True, slots=True)
class _SpeedFile:
    schema: str
    machine: str
    speed: Speed


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remembered(directory: Path) -> Speed | None:
    """What was measured on this machine with this torch; None if nothing was.

    The file is a cache: if something is wrong with it, the machine is measured again.
    """
    with suppress(OSError, InvalidJsonError):
        found = read_as(_SpeedFile, parse_json(read_small(directory / FILE)))
        if found.schema == _SCHEMA and found.machine == _machine():
            return found.speed
    return None


def remember(speed: Speed, directory: Path) -> Speed:
    """The better of this measurement and the remembered one, which is then remembered where the disk allows it."""
    best = speed.fastest(remembered(directory))
    document = {"schema": _SCHEMA, "machine": _machine(), "speed": asdict(best)}
    with suppress(OSError, Int8cliError):  # it can be measured again
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / FILE, (json.dumps(document) + "\n").encode())
    return best


def measured_beside(directory: Path) -> Speed | None:
    """The remembered speed, or one measured now in a process that imports torch; None where that does not work."""
    known = remembered(directory)
    if known is not None:
        return known
    command = [sys.executable, "-m", _MEASURE, str(usable_cores())]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)
        return remember(read_as(Speed, parse_json(done.stdout)), directory)
    except (OSError, subprocess.SubprocessError, InvalidJsonError):
        return None


def cpu_name() -> str:
    """What the system calls the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _machine() -> str:
    torch: Any = None
    with suppress(PackageNotFoundError):
        torch = version("torch")
    return f"{cpu_name()}, {usable_cores()} cores, torch {torch}"
