"""Opens pages in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
needs_browser = pytest.mark.skipif(not _CHROMIUM, reason="needs Chromium")


def seen_by(probe: str, page: Path) -> Any:
    """What `probe`, HTML put at the head of the page's body, leaves as JSON in an element `seen`.

    Nothing may have been written to the browser's console.
    """
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("<body>", f"<body>{probe}", 1))
    profile = page.with_name("profile")
    result = subprocess.run(
        [
            *(_CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
            *("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"),
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert not console, "\n".join(console)
    [told] = re.findall(r'<pre id="seen">(.*?)</pre>', result.stdout, re.DOTALL)
    return json.loads(told.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
