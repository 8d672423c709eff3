"""What a bug report needs: versions, the machine, the settings of the Hub. Imports neither torch nor transformers."""

import os
import platform
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from int8cli import __version__
from int8cli.checkpoint.disk import refused_setting, system_errors
from int8cli.checkpoint.writer import free_bytes
from int8cli.commands.places import cache_directory
from int8cli.errors import Int8cliError
from int8cli.estimate.cards import cards_of_this_machine
from int8cli.machine.speed import cpu_name, remembered, usable_cores
from int8cli.model.memory import available_bytes
from int8cli.results.environment import Environment

# Ours first, then those of the extras, then what opens the output.
PACKAGES = (
    *("torch", "safetensors", "huggingface_hub", "typer", "rich", "xxhash"),
    *("transformers", "accelerate", "tokenizers", "altair", "vl-convert-python", "ray"),
    *("bitsandbytes", "compressed-tensors", "vllm", "numpy"),
)
_HUB_SETTINGS = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT")


@system_errors()
def env() -> Environment:
    """What is installed, and on what machine. Tokens are never in it, nor credentials in an address."""
    speed = remembered(cache_directory())
    return Environment(
        int8cli=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        memory_available_bytes=available_bytes("cpu"),
        gpus=tuple((card.name, card.total_bytes) for card in cards_of_this_machine()),
        disk_free_bytes=dict(_disks()),
        hub=_hub(),
        speed=None if speed is None else asdict(speed),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory_bytes() -> int | None:
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _disks() -> list[tuple[str, int]]:
    """Free room in the current directory and in the Hub cache, where they can be asked."""
    cache = None if (constants := _hub_constants()) is None else Path(constants.HF_HUB_CACHE)
    found = []
    for directory in (Path("."), *((cache,) if cache is not None else ())):
        with suppress(Int8cliError, OSError):  # the current directory may have been removed
            found.append((str(directory.absolute()), free_bytes(directory)))
    return found


def _hub() -> dict[str, str]:
    """The settings that are set; addresses without credentials."""
    settings = {name: _without_credentials(os.environ[name]) for name in _HUB_SETTINGS if os.environ.get(name)}
    if (constants := _hub_constants()) is None:
        return {**settings, "endpoint": "huggingface_hub refuses one of these settings"}
    from huggingface_hub import get_token

    settings["endpoint"] = _without_credentials(constants.ENDPOINT)
    settings["token"] = "set" if get_token() else "none"
    return settings


def _hub_constants() -> ModuleType | None:
    """The settings as huggingface_hub has read them; None if it refuses one."""
    try:
        from huggingface_hub import constants
    except ValueError as error:
        if refused_setting(error) is None:
            raise
        return None
    return constants


def _without_credentials(text: str) -> str:
    """The text without the part before an @ and the part after a question mark, even if it is no valid address."""
    scheme, found, rest = text.rpartition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"
