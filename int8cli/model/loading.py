"""transformers' own loading, called step by step: building a model, mapping names, loading the weights of a part of it.

The only module that uses `transformers.core_model_loading`. Its functions are not public and have changed since 5.0.0;
this module looks at their parameters to support every release from 5.0.0 on. transformers 4 has none of them.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from int8cli.errors import CannotRunError

_MODULES_AT_LEAST = 10_000
_MODULES_A_TENSOR = 16


@contextlib.contextmanager
def laid_out(model_class: Any, dtype: torch.dtype) -> Iterator[None]:
    """The context in which `from_pretrained` builds a model: on the meta device, in this dtype."""
    count = len(inspect.signature(model_class.get_init_context).parameters)
    with contextlib.ExitStack() as stack:
        for context in model_class.get_init_context(*(dtype, False, False, None)[:count]):
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def as_large_as(tensors: int) -> Iterator[None]:
    """Raise CannotRunError where a model is built that is too large for a checkpoint of so many tensors.

    Each number of a config can ask for a model without end. A module has a tensor or holds others; what has none, as
    activations and dropout, comes a few times in a block.
    """
    left = _MODULES_AT_LEAST + _MODULES_A_TENSOR * tensors

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise CannotRunError(f"config.json describes a model with far more parts than the {tensors:,} tensors here")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def initialize(model: Any, names: set[str]) -> None:
    """Compute these weights, and every buffer that checkpoints do not hold, on the CPU."""
    model._move_missing_keys_from_meta_to_device(names, {"": "cpu"}, None, None)
    model._initialize_missing_keys(False)


def conversions_of(model: Any) -> Any:
    """transformers' rules for turning a checkpoint's names and tensors into those of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: Any = get_model_conversion_mapping(model)
    return mapping


def name_targets(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Tensor name → the parameter that it becomes (the first one if it is split). Unused tensors are left out."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = conversions_of(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    targets = {}
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], prefix, state)
        if target in state:
            targets[name] = target
    return targets


def load_weights(
    model: Any, tensors: Mapping[str, Any], conversions: Any, dtype: torch.dtype, device: str | torch.device
) -> list[tuple[str, Any, Any]]:
    """Load these tensors into a model, in the dtypes that transformers gives them.

    Returns name, shape and expected shape of each tensor whose shape is wrong.
    """
    from transformers import modeling_utils
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan
    options: dict[str, Any] = {"dtype": dtype, "weight_mapping": conversions, "device_map": {"": device}}
    load: Any = convert_and_load_state_dict_in_model
    config: Any = modeling_utils.LoadStateDictConfig
    if "dtype_plan" in inspect.signature(load).parameters:
        found = load(model, tensors, config(**options), tp_plan=None, dtype_plan=plan)
        return list(found[2])
    info, _ = load(model, tensors, config(**options, dtype_plan=plan))
    return list(info.mismatched_keys)
