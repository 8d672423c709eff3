"""The names that transformers gives the modules of a checkpoint which was saved under older ones.

Owns the renames of whole parts of a model: since transformers 4.52 the language model of a model with several parts,
its towers and its projector stand inside `model` (conversion_mapping.py). An entry of a list of modules is matched
with the loader's names, while a conversion goes by those of the file.
"""

import re
from collections.abc import Collection, Iterator

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


def names_on_load(module: str, modules: Collection[str]) -> Iterator[str]:
    """Other names than its own that a module of the file may have in the model. `modules` are all of the file."""
    for pattern, replacement in _RENAMES:
        if pattern.match(module):
            yield pattern.sub(replacement, module, count=1)
    if _OTHER_PART.match(module) and any(map(_LANGUAGE_MODEL.match, modules)):
        yield f"model.{module}"
    if _LAYERS_OF_LANGUAGE_MODEL.match(module) and any(map(_OTHER_PART.match, modules)):
        yield _LAYERS_OF_LANGUAGE_MODEL.sub("model.language_model.", module, count=1)
