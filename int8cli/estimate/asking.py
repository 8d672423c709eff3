"""Asks transformers' configuration class what it puts in the place of fields that config.json leaves out.

Owns the process in which transformers runs, and when it is started: at most once for a config, and only if an answer
is needed, because importing transformers takes seconds. Whatever happens in that process, the result is an answer or a
reason. It runs offline.
"""

import importlib.util
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from int8cli.loaders.config_class import NoConfigClassError, completed_config

ANSWER_LIMIT_S = 120.0
# A class may make a list as long as any number of the config says.
_MEMORY_LIMIT_BYTES = 8 << 30
_PACKAGE = "transformers"
# The path is set first: with -c alone, a file in the working directory could stand in for a module.
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from int8cli.estimate.asking import answer; answer()"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(slots=True)
class ConfigClass:
    """The configuration class of a config.json, as far as transformers is installed and knows one."""

    config: Mapping[str, Any]
    _answer: dict[str, Any] | str | None = field(default=None, init=False)

    def completed(self) -> Mapping[str, Any]:
        """The config with what its class adds. Raises NoConfigClassError with the reason if there is no answer."""
        if self._answer is None:
            self._answer = _ask(self.config)
        if isinstance(self._answer, str):
            raise NoConfigClassError(self._answer)
        return self._answer


def _ask(config: Mapping[str, Any]) -> dict[str, Any] | str:
    """The completed config, or why there is none."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"{_PACKAGE} is not installed"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            input=json.dumps(config).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_OFFLINE},
            timeout=ANSWER_LIMIT_S,
            check=False,
        )
        found = json.loads(ended.stdout)
    except subprocess.TimeoutExpired:
        return f"{_PACKAGE} did not answer within {ANSWER_LIMIT_S:.0f} s"
    except OSError as error:
        return f"{_PACKAGE} could not be started ({error.strerror})"
    except ValueError:  # no document: the process ended before its answer
        return f"{_PACKAGE} failed here (exit code {ended.returncode})"
    return found if isinstance(found, (dict, str)) else f"{_PACKAGE} gave no config"


def _limit_memory() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _MEMORY_LIMIT_BYTES if most == resource.RLIM_INFINITY else min(most, _MEMORY_LIMIT_BYTES)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def answer() -> None:
    """The program of the process: a config from stdin; to stdout the completed config, or a reason as a JSON string."""
    _limit_memory()
    config = json.load(sys.stdin)
    document = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing else may print there
    found: dict[str, Any] | str
    try:
        found = completed_config(config)
    except NoConfigClassError as error:
        found = str(error)
    except Exception as error:  # a broken installation
        found = f"{_PACKAGE} cannot be imported here ({type(error).__name__})"
    with document:
        json.dump(found, document)
    os._exit(0)
