"""The 16-bit model that a conversion was made from, as transformers loads it: to be compared with.

Owns how a source, a directory or a Hub id, becomes that model. No code but transformers' own is ever run.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8cli.checkpoint.config_file import CONFIG_FILE
from int8cli.checkpoint.config_file import read_config as read_config_file
from int8cli.checkpoint.directory import DirectorySource
from int8cli.checkpoint.disk import raise_if_of_the_system
from int8cli.checkpoint.locate import looks_like_a_path
from int8cli.errors import ReferenceModelError
from int8cli.planning.quantized import declared_methods

if TYPE_CHECKING:
    import torch

_HINT = "Give the directory or Hub id that was converted."


def check_reference(source: str) -> None:
    """Raise ReferenceModelError for what cannot be the 16-bit model, before anything large is read.

    That is a path with nothing there, a directory without config.json, a quantized model, and a Hub id whose
    configuration transformers cannot load.
    """
    path = Path(os.path.expanduser(source))
    if path.exists():
        if not (path / CONFIG_FILE).is_file():
            raise ReferenceModelError(f"{source} is not a directory with a {CONFIG_FILE}", hint=_HINT)
        _refuse_quantized(source, read_config_file(DirectorySource(path)))
    elif looks_like_a_path(source):
        raise ReferenceModelError(f"{source}: no such directory", hint=_HINT)
    else:
        with _rejections(source):
            _config(source)


def load_reference(source: str, device: "torch.device") -> Any:
    """The model in the dtype of its config, in eval mode.

    Raises ReferenceModelError if transformers cannot load it, or if it is quantized: it would not be a 16-bit model.
    """
    from int8cli.model.config import model_class_of

    path = Path(os.path.expanduser(source))
    with _rejections(source):
        config = _config(source)
        model_class = model_class_of(config)
        return model_class.from_pretrained(
            str(path) if path.exists() else source, config=config, dtype="auto", device_map={"": device}
        )


def _config(source: str) -> Any:
    from transformers import AutoConfig

    from int8cli.model.config import read_config

    path = Path(os.path.expanduser(source))
    found = read_config(path) if path.exists() else AutoConfig.from_pretrained(source, trust_remote_code=False)
    _refuse_quantized(source, found.to_dict())
    return found


@contextmanager
def _rejections(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise_if_of_the_system(error)
        first_line = (str(error) or repr(error)).splitlines()[0]
        raise ReferenceModelError(
            f"{source} cannot be loaded as the 16-bit model: {first_line:.200}", hint=_HINT
        ) from error


def _refuse_quantized(source: str, config: Mapping[str, Any]) -> None:
    methods = ", ".join(dict.fromkeys(declared_methods(config)))
    if methods:
        raise ReferenceModelError(f"{source} is a quantized model ({methods}), not the 16-bit one", hint=_HINT)
