"""What all tests share: a Hub client that ignores this machine's cache, token and settings, a working Ctrl-C, and a
nursery of processes for each module that uses one.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.program import Nursery

# huggingface_hub reads these when it is first imported, so they are set before any test module imports it.
_home = tempfile.TemporaryDirectory(prefix="int8cli-hf-home-")
for _name in (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
):
    os.environ.pop(_name, None)
os.environ["HF_HOME"] = _home.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# A shell ignores SIGINT for background jobs, and all their child processes inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Nursery]":
    from support.program import nursery_in

    with nursery_in(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery
