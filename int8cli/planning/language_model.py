"""Which modules make up the language model of a model that also sees or hears.

Owns the names of its parts. Knows them from the checkpoints on the Hub and from the model classes of transformers.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

# Keys of the configs inside config.json. Many speech models call theirs `encoder_config`, as text models do.
_OTHER_MODALITY = re.compile(r"\w*(?:vision|visual|image|img|video|audio|speech|acoustic)\w*")
_TEXT = ("text_config", "llm_config", "language_config")
_SPEECH_ENCODER = "encoder_config"

_LANGUAGE_MODEL = re.compile(
    r"""^(?:(?:model|thinker|base_model)\.)*
    (?:language(?:_model)? | text_model | text_decoder | llm | layers | decoder\.layers
      | gated_cross_attn_layers  # between the layers of Idefics, where its text looks at images
      | transformer\.(?:h|blocks|layers|encoder\.layers))
    (?:\.|$)""",
    re.VERBOSE,
)
# A model that compares texts with images or sounds, in which neither side is the main one.
_COMPARES = re.compile(r"(?:^|\.)(?:logit_scale\w*|temperature)$")


def outside_language_model(tensor_names: Collection[str], config: Mapping[str, Any]) -> frozenset[str]:
    """The modules beside the language model; none if config.json describes a model of one modality.

    None either if no module goes by the known names of a language model, or the model compares texts with others.
    """
    if not _has_other_modality(config) or any(_COMPARES.search(name) for name in tensor_names):
        return frozenset()
    modules = frozenset(name.rpartition(".")[0] for name in tensor_names)
    inside = frozenset(module for module in modules if _LANGUAGE_MODEL.search(module))
    return modules - inside if inside else frozenset()


def _has_other_modality(config: Mapping[str, Any]) -> bool:
    inner = {key for key, value in config.items() if isinstance(value, Mapping) and value}
    thinker = config.get("thinker_config")
    if isinstance(thinker, Mapping):
        return _has_other_modality(thinker)
    return any(_OTHER_MODALITY.fullmatch(key) for key in inner) or (
        _SPEECH_ENCODER in inner and not inner.isdisjoint(_TEXT)
    )
