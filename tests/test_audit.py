"""What is said of pip-audit's answer: a finding fails, and silence is not taken for a clean bill."""

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
    ("packages", "verdict", "fails", "fails_in_ci"),
    [
        ([CLEAN, CLEAN], "2 packages without known vulnerabilities", False, False),
        ([CLEAN, UNKNOWN], "1 packages without known vulnerabilities, 1 not known to the service", False, False),
        ([CLEAN, FOUND], "known vulnerabilities\n  torch 2.0: PYSEC-1, PYSEC-2", True, True),
        ([UNKNOWN], "not run: the service that can be reached here knows none of the packages", False, True),
    ],
)
def test_an_answer_is_judged(packages: list[Any], verdict: str, fails: bool, fails_in_ci: bool) -> None:
    answer = json.dumps({"dependencies": packages, "fixes": []})
    assert judged(answer, "", in_ci=False) == (verdict, fails)
    assert judged(answer, "", in_ci=True) == (verdict, fails_in_ci)


@pytest.mark.parametrize("out", ["", "null", "[]", "{}"])
def test_no_answer_is_said_and_fails_in_ci_alone(out: str) -> None:
    assert judged(out, "ERROR: a\nERROR: cannot connect\n", in_ci=False) == ("not run: ERROR: cannot connect", False)
    assert judged(out, "", in_ci=True) == ("not run: no answer", True)
