"""What is said of pip-audit's answer: silence is not taken for a clean bill."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

from audit import judged

CLEAN: dict[str, Any] = {"name": "rich", "version": "15.0.0", "vulns": []}
FOUND: dict[str, Any] = {"name": "torch", "version": "2.0", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]}
UNKNOWN: dict[str, Any] = {"name": "xxhash", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "verdict", "clean"),
    [
        ([CLEAN, CLEAN], "2 packages without known vulnerabilities", True),
        ([CLEAN, UNKNOWN], "1 packages without known vulnerabilities, 1 not known to the service", True),
        ([CLEAN, FOUND], "known vulnerabilities\n  torch 2.0: PYSEC-1, PYSEC-2", False),
        ([UNKNOWN], "not run: the service that can be reached here knows none of the packages", False),
    ],
)
def test_an_answer_is_judged(packages: list[Any], verdict: str, clean: bool) -> None:
    assert judged(json.dumps({"dependencies": packages, "fixes": []}), "") == (verdict, clean)


@pytest.mark.parametrize("out", ["", "null", "[]", "{}"])
def test_no_answer_is_said_to_be_none(out: str) -> None:
    assert judged(out, "ERROR: a\nERROR: cannot connect\n") == ("not run: ERROR: cannot connect", False)
    assert judged(out, "") == ("not run: no answer", False)
