"""The names that transformers gives the modules of a checkpoint which was saved under older ones.

Owns the renames of whole parts of a model: since transformers 4.52 the language model of a model with several parts,
its towers and its projector stand inside `model` (conversion_mapping.py). An entry of a list of modules is matched
with the loader's names, while a conversion goes by those of the file.
"""

import re
from collections.abc import Iterable, Iterator

_LANGUAGE = r"language_model|text_model"
_OTHER_PARTS = "vision_tower|vision_model|visual|audio_tower|multi_modal_projector|image_projection"
_INSIDE = f"{_LANGUAGE}|{_OTHER_PARTS}|projector|vit"
_OTHER_PART = re.compile(rf"({_OTHER_PARTS})(?=\.|$)")
_LANGUAGE_MODEL = re.compile(rf"(?:{_LANGUAGE})\.model\.|language_model\.|model\.(?:layers|embed_tokens)\.")

# Applied to a module's name from its start; each gives a name that some class has.
_RENAMES = (
    (re.compile(rf"(?:model\.)?({_LANGUAGE})\.model\."), r"model.\1."),
    (re.compile(r"language_model\.(?!model\.|lm_head$)"), "model.language_model."),
    (re.compile(rf"(?:{_LANGUAGE})\.(?=lm_head$)"), ""),
)
# The language model's own parts stood beside the tower's inside `model`, or beside `model` itself.
_LAYERS_OF_LANGUAGE_MODEL = re.compile(rf"model\.(?!(?:{_INSIDE})\.)")


class OlderNames:
    """The renames that apply to one file."""

    def __init__(self, modules: Iterable[str]) -> None:
        """`modules` are all of the file. They are looked at once: a mixture has tens of thousands."""
        self._has_language_model = self._has_other_part = False
        for module in modules:
            self._has_language_model |= _LANGUAGE_MODEL.match(module) is not None
            self._has_other_part |= _OTHER_PART.match(module) is not None

    def on_load(self, module: str) -> Iterator[str]:
        """Other names than its own that a module of the file may have in the model."""
        for pattern, replacement in _RENAMES:
            if pattern.match(module):
                yield pattern.sub(replacement, module, count=1)
        if self._has_language_model and _OTHER_PART.match(module):
            yield f"model.{module}"
        if self._has_other_part and _LAYERS_OF_LANGUAGE_MODEL.match(module):
            yield _LAYERS_OF_LANGUAGE_MODEL.sub("model.language_model.", module, count=1)
