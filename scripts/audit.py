"""Ask for known vulnerabilities of the locked packages, and say so in a line where nobody can be asked.

    python scripts/audit.py

pip-audit asks PyPI. Exits with 1 for a finding. Where the service cannot be reached, or knows none of the packages (as
a mirror may), it prints "not run" and exits with 0; with CI set in the environment that is 1 too.
"""

import json
import os
import subprocess
import sys
from typing import Any

from pins import LOCKED


def main() -> None:
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner", "off"]
    command += ["--timeout", "10", "--format", "json", "--requirement", str(LOCKED)]
    ended = subprocess.run(command, capture_output=True, text=True)
    verdict, fails = judged(ended.stdout, ended.stderr, in_ci=bool(os.environ.get("CI")))
    print(f"pip-audit: {verdict}")
    sys.exit(1 if fails else 0)


def judged(out: str, err: str, *, in_ci: bool) -> tuple[str, bool]:
    """What to say of pip-audit's answer, and whether it is a failure."""
    try:
        packages: list[dict[str, Any]] = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return f"not run: {(err.strip().splitlines() or ['no answer'])[-1][:200]}", in_ci
    answered = [package for package in packages if "vulns" in package]
    found = [package for package in answered if package["vulns"]]
    lines = [
        f"{package['name']} {package['version']}: {', '.join(v['id'] for v in package['vulns'])}" for package in found
    ]
    if lines:
        return "\n  ".join(["known vulnerabilities", *lines]), True
    if not answered:
        return "not run: the service that can be reached here knows none of the packages", in_ci
    unknown = f", {len(packages) - len(answered)} not known to the service" if len(answered) < len(packages) else ""
    return f"{len(answered)} packages without known vulnerabilities{unknown}", False


if __name__ == "__main__":
    main()
