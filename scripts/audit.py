"""Ask for known vulnerabilities of the locked packages, and say so in a line where nobody can be asked.

    python scripts/audit.py [--strict]

pip-audit asks PyPI. Prints what is found, or "not run" where the service cannot be reached or knows none of the
packages (as a mirror may). Exits with 0 all the same: what passed yesterday passes today, whatever is published. With
--strict, which the workflow uses in a step of its own, a finding and "not run" both exit with 1.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from pins import LOCKED

# pip-audit asks for one package after the other, and waits for each.
LIMIT_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 for a finding, and if nothing could be checked"
    )
    strict = parser.parse_args().strict
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner", "off"]
    command += ["--timeout", "10", "--format", "json", "--requirement", str(LOCKED)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        verdict, clean = judged(ended.stdout, ended.stderr)
    except subprocess.TimeoutExpired:
        verdict, clean = f"not run: no answer within {LIMIT_S} seconds", False
    print(f"pip-audit: {verdict}")
    sys.exit(1 if strict and not clean else 0)


def judged(out: str, err: str) -> tuple[str, bool]:
    """What to say of pip-audit's answer, and whether it is one without a finding."""
    try:
        packages: list[dict[str, Any]] = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return f"not run: {(err.strip().splitlines() or ['no answer'])[-1][:200]}", False
    answered = [package for package in packages if "vulns" in package]
    found = [package for package in answered if package["vulns"]]
    lines = [
        f"{package['name']} {package['version']}: {', '.join(v['id'] for v in package['vulns'])}" for package in found
    ]
    if lines:
        return "\n  ".join(["known vulnerabilities", *lines]), False
    if not answered:
        return "not run: the service that can be reached here knows none of the packages", False
    unknown = f", {len(packages) - len(answered)} not known to the service" if len(answered) < len(packages) else ""
    return f"{len(answered)} packages without known vulnerabilities{unknown}", True


if __name__ == "__main__":
    main()
