"""The machine that the figures come from, and the date: the line above every table."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> str:
    cores = len(os.sched_getaffinity(0))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    software = f"Python {platform.python_version()}, torch {version('torch')}, {platform.system()} {platform.release()}"
    return f"{datetime.date.today()}: {_processor()}, {cores} cores, {memory_gb:.0f} GB of memory; {software}"


def _processor() -> str:
    """The processor's name, from Linux if possible."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
