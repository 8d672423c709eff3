"""The 16-bit model that a conversion was made from, as transformers loads it: to be compared with.

Owns how a source, a directory or a Hub id, becomes that model. No code but transformers' own is ever run.
"""

from pathlib import Path
from typing import Any

import torch

from int8cli.errors import ReferenceModelError
from int8cli.model.config import model_class_of, read_config


def load_reference(source: str, device: torch.device) -> Any:
    """The model in the dtype of its config, in eval mode. Raises ReferenceModelError where transformers cannot."""
    from transformers import AutoConfig

    path = Path(source).expanduser()
    try:
        config = read_config(path) if path.exists() else AutoConfig.from_pretrained(source, trust_remote_code=False)
        model_class = model_class_of(config)
        return model_class.from_pretrained(
            str(path) if path.exists() else source, config=config, dtype="auto", device_map={"": device}
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = (str(error) or repr(error)).splitlines()[0]
        raise ReferenceModelError(
            f"{source} cannot be loaded as the 16-bit model: {first_line:.200}",
            hint="Give the directory or Hub id that was converted.",
        ) from error
