"""Whether the tensors of a checkpoint are those of its model, by their names: not those of what trained it.

Owns the signs of three leftovers of training: an adapter that is not merged, the prefix of a wrapper, and weights whose
parts were not gathered. Loaders open such files and fill what they miss with random weights.
"""

import re
from collections.abc import Mapping, Sequence

from int8cli.checkpoint.tensor import ShardContents, TensorSpec
from int8cli.errors import UnsupportedModelError
from int8cli.planning.architectures import LINEAR_NAME

# PEFT's names: the one of an adapter without a name of its own is "default".
_ADAPTER = re.compile(r"\.(?:lora_(?:A|B|embedding_A|embedding_B)(?:\.default)?\.weight|modules_to_save\.default\.)")
# DeepSpeed, torch.compile, FSDP, and activation checkpointing, around the model or some of its parts.
_WRAPPED = re.compile(r"(?:^|\.)(_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# DataParallel, around the whole model. A model may have a part of this name.
_WHOLE = "module."
_WEIGHT = ".weight"


def refuse_leftovers_of_training(shards: Sequence[ShardContents]) -> None:
    """Raise UnsupportedModelError if tensors are not under the names of their model, or have no elements."""
    specs = [stored.spec for contents in shards for stored in contents.tensors]
    for spec in specs:
        if _ADAPTER.search(spec.name):
            raise UnsupportedModelError(
                f"{spec.name!r} belongs to an adapter that is not merged into the weights",
                hint="Merge it first (peft: merge_and_unload), save the model, and convert that.",
            )
        if _is_ungathered(spec):
            raise UnsupportedModelError(
                f"{spec.name!r} has no elements: the model was saved without gathering its parts",
                hint="With DeepSpeed ZeRO-3: zero_to_fp32.py makes whole weights of a checkpoint, or save again with "
                "stage3_gather_16bit_weights_on_model_save.",
            )
    wrapped = next((match for spec in specs if (match := _WRAPPED.search(spec.name))), None)
    name = wrapped[1] if wrapped else "module" if specs and all(s.name.startswith(_WHOLE) for s in specs) else None
    if name is not None:
        raise UnsupportedModelError(
            f"names of tensors have {name!r} in them, which a wrapper added in training and no loader removes",
            hint=f"Save the model inside the wrapper (its attribute {name}), or remove that part of the names.",
        )


def _is_ungathered(spec: TensorSpec) -> bool:
    module = spec.name.removesuffix(_WEIGHT)
    return module != spec.name and spec.shape == (0,) and LINEAR_NAME.search(module) is not None


def modules_without_weight(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The linear layers, by their names, of which there is a bias and nothing else: loaders make the weight up."""
    beside = {module for name in specs for module in _owners(name) if not name.endswith(".bias")}
    found = (name.removesuffix(".bias") for name, spec in specs.items() if name.endswith(".bias") and _is_bias(spec))
    return [module for module in found if LINEAR_NAME.search(module) and module not in beside]


def _owners(tensor_name: str) -> list[str]:
    """The modules that a tensor is in, however deep."""
    parts = tensor_name.split(".")
    return [".".join(parts[:place]) for place in range(1, len(parts))]


def _is_bias(spec: TensorSpec) -> bool:
    return len(spec.shape) == 1 and spec.numel > 0
