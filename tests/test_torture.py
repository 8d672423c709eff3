"""The machines of scripts/torture, each for some seconds: the corpus of what they found, and a few new cases.

`make torture SECONDS=3600` runs them for as long as that.
"""

import importlib
import sys
from pathlib import Path

import pytest
import safetensors
from packaging.version import Version

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from torture import MACHINES

SEED = 1
SECONDS = 4.0  # for each, beside its corpus


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_finds_nothing(name: str) -> None:
    if name == "headers" and Version(safetensors.__version__) < Version("0.8"):
        pytest.skip(f"safetensors {safetensors.__version__} does not know every dtype that is tried")
    figures = importlib.import_module(f"torture.{name}").run(SECONDS, SEED)
    if figures.unable:
        pytest.skip(figures.unable)
    assert figures.runs > 0
    assert figures.wrong == 0, "\n".join(figures.found)
