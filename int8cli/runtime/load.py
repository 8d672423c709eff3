"""From a converted directory to a transformers model that computes the exact decomposition.

Owns the use of transformers for this. Its loader builds the model, matches names and ties weights. Before it reads any
weights, each linear layer that is int8 in the directory is replaced by an Int8Linear.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from int8cli.checkpoint.disk import raise_if_of_the_system, system_errors
from int8cli.checkpoint.torch_dtypes import TORCH_DTYPES
from int8cli.errors import CheckpointError, Int8cliError, OptionError, UnsupportedModelError
from int8cli.llm_int8.matmul import DEFAULT_INPUTS, INPUT_SCHEMES, InputScheme
from int8cli.model.config import dtype_of, model_class_of, read_config
from int8cli.model.extra import require_installed
from int8cli.model.loading import as_large_as, name_targets
from int8cli.progress import SILENT, Progress
from int8cli.runtime.device import usable_device
from int8cli.runtime.experts import ExpertPlace, find_experts, replace_experts
from int8cli.runtime.linear import Int8Linear
from int8cli.runtime.offload import Offload
from int8cli.runtime.packing import pack_layers
from int8cli.runtime.placement import MaxMemory, memory_limits
from int8cli.runtime.stored import StoredLinear, StoredModel

_GENERATION_CONFIG = "generation_config.json"
_CHECK_CONFIG = "Check config.json, or convert the model again."
_OTHER_LOADERS_HINT = "If transformers loads the directory itself, use AutoModel...from_pretrained(DIR)."


@system_errors()
def load_model(
    directory: str | Path,
    *,
    inputs: InputScheme = DEFAULT_INPUTS,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    progress: Progress = SILENT,
) -> Any:
    """The transformers model in a directory that `convert` wrote. Its int8 layers compute LLM.int8() exactly.

    Stored columns are removed from X and multiplied in floats, all others in int8 with exact integer sums. `inputs`
    says how X is quantized: "zeropoint" (at most half the error of absmax) or "absmax". `device` defaults to the GPU if
    there is one, as for transformers' own int8 models. `dtype` applies to everything that is not int8 and defaults to
    the dtype in the config. The model is in eval mode. Adapters can be trained with it; it cannot be saved.
    bitsandbytes is not needed.

    With `device_map="auto"`, the model may be larger than the memory. Whole blocks stay on the device while they fit,
    then in RAM. The others are read from the shards each time they run, in int8, one block ahead. `max_memory` limits
    the memory for weights, {"cpu": "8GB", 0: "10GB"}; the default is four fifths of the free memory. `progress` gets a
    note with the time that this takes for each token. Nothing is written: `offload_folder` is accepted, because
    transformers needs one, and not used.

    Raises MissingExtraError without transformers, UnsupportedModelError if the directory is not a conversion or
    transformers has no class for the model, CheckpointError for tensors that do not fit, OptionError for an invalid
    `inputs`, `device`, `device_map` or `max_memory`, NotEnoughMemoryError if two blocks do not fit.
    """
    _check_options(inputs, device_map)
    require_installed("accelerate")
    place = usable_device(device)
    limits = memory_limits(place.type, max_memory) if device_map == "auto" or max_memory is not None else None
    offload = Offload(limits, place) if limits is not None else None
    stored = StoredModel(Path(directory))
    try:
        config = _config(Path(directory))
        model = _load(
            stored, Path(directory), config, inputs, dtype or dtype_of(config, stored.float_specs), offload, place
        )
        if offload is not None and offload.moves:
            offload.start(model, stored, progress)
            return model
    except BaseException:
        stored.close()
        raise
    stored.close()
    return model if offload is None else model.to(place)


def _check_options(inputs: str, device_map: str | None) -> None:
    """Raise OptionError for values that callers without a type checker may give."""
    if inputs not in INPUT_SCHEMES:
        raise OptionError(f"{inputs!r} is not one of {', '.join(INPUT_SCHEMES)}", option="inputs")
    if device_map not in (None, "auto"):
        raise OptionError(f"{device_map!r} is not 'auto'", option="device_map", hint="One device is `device`.")


def _config(directory: Path) -> Any:
    """The model's config without its quantization_config, which would make transformers use another quantizer."""
    try:
        config = read_config(directory)
        model_class_of(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(str(error), hint="load_model runs only classes of transformers itself.") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _load(
    stored: StoredModel,
    directory: Path,
    config: Any,
    inputs: InputScheme,
    dtype: torch.dtype,
    offload: Offload | None,
    device: torch.device,
) -> Any:
    from int8cli.runtime.quantizer import Int8cliConfig

    model_class = model_class_of(config)
    with _rejections(model_class):
        experts = find_experts(model_class, config, stored.linears)
    tensors = stored.state_dict({name: place.name for name, place in experts.items()})
    with _rejections(model_class), as_large_as(len(tensors)):
        model, info = model_class.from_pretrained(
            None,  # a directory and a state dict exclude each other
            config=config,
            generation_config=_generation_config(model_class, directory),
            state_dict=tensors,
            quantization_config=Int8cliConfig(_Replacing(stored, inputs, offload, experts)),
            dtype=dtype,
            device_map={"": device if offload is None else "cpu"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    del tensors  # packing a weight frees the one that was read
    for name, found, wanted in info["mismatched_keys"]:
        raise CheckpointError(
            f"{name} has the shape {tuple(found)}, but config.json requires {tuple(wanted)}", hint=_CHECK_CONFIG
        )
    _prepare_layers(model, info["missing_keys"], packing=device.type == "cpu")
    model.name_or_path = model.config._name_or_path = str(directory)  # what finds the tokenizer
    return model


def _prepare_layers(model: Any, missing: Iterable[str], *, packing: bool) -> None:
    """Call `prepare` on every int8 layer that has its weight."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    lost = sorted(key for key in missing if key.rpartition(".")[0] in layers)
    if lost:
        raise CheckpointError(f"transformers needs {lost[0]}, which is missing", hint=_OTHER_LOADERS_HINT)
    # A weight without strides stands for a tensor that stays on the disk.
    here = [layer for layer in layers.values() if layer.weight.stride(0)]
    if packing:
        pack_layers(here)
    else:
        for layer in here:
            layer.prepare(packing=False)


@contextmanager
def _rejections(model_class: Any) -> Iterator[None]:
    """Raise UnsupportedModelError for whatever transformers raises over a config that it cannot use."""
    try:
        yield
    except (Int8cliError, OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise_if_of_the_system(error)
        raise UnsupportedModelError(
            f"transformers cannot load this directory as {model_class.__name__}: {error!s:.300}",
            hint="Check config.json and generation_config.json.",
        ) from error


def _generation_config(model_class: Any, directory: Path) -> Any:
    """From generation_config.json or, for older models, from config.json: the places where transformers looks."""
    from transformers import GenerationConfig

    if not model_class.can_generate():
        return None
    if (directory / _GENERATION_CONFIG).is_file():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return GenerationConfig.from_pretrained(directory, "config.json", local_files_only=True, _from_model_config=True)


@dataclass(frozen=True, slots=True)
class _Replacing:
    """Replaces each linear layer that is stored in int8 by an Int8Linear. `experts` are those that are fused."""

    stored: StoredModel
    inputs: InputScheme
    offload: Offload | None
    experts: Mapping[str, ExpertPlace]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Replacing":
        return self  # transformers copies the config that this is handed over in

    def __call__(self, model: Any) -> None:
        linears = {linear.weight_name: linear for linear in self.stored.linears if linear.name not in self.experts}
        modules = _modules_of(model, linears)
        for module_name, linear in modules.items():
            model.set_submodule(module_name, self._replacement(model.get_submodule(module_name), linear))
        fused = {
            each.name: (self.experts[each.name], each) for each in self.stored.linears if each.name in self.experts
        }
        replace_experts(model, fused, partial(self._new_linear, None, conv1d=False, device=model.device))
        modules |= {place.path: linear for place, linear in fused.values()}
        if self.offload is not None:
            self.stored.left_on_disk |= self.offload.plan(model, modules)

    def _replacement(self, module: nn.Module, linear: StoredLinear) -> Int8Linear:
        from transformers.pytorch_utils import Conv1D

        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UnsupportedModelError(
                f"{linear.name} is int8, but its module in transformers is a {type(module).__name__}",
                hint=_OTHER_LOADERS_HINT,
            )
        shape = tuple(module.weight.shape) if isinstance(module, nn.Linear) else tuple(reversed(module.weight.shape))
        if shape != (linear.out_features, linear.in_features):
            raise CheckpointError(
                f"{linear.weight_name} has the shape {(linear.out_features, linear.in_features)}, the model's "
                f"config.json requires {shape}",
                hint=_CHECK_CONFIG,
            )
        conv1d = isinstance(module, Conv1D)
        return self._new_linear(module.bias, linear, conv1d=conv1d, device=module.weight.device)

    def _new_linear(
        self, bias: nn.Parameter | None, linear: StoredLinear, *, conv1d: bool, device: torch.device
    ) -> Int8Linear:
        return Int8Linear(
            linear.in_features,
            linear.out_features,
            bias,
            inputs=self.inputs,
            columns=linear.columns,
            columns_dtype=TORCH_DTYPES[linear.columns_dtype],
            conv1d=conv1d,
            device=device,
        )


def _modules_of(model: Any, linears: Mapping[str, StoredLinear]) -> dict[str, StoredLinear]:
    """The linears by the names of their modules in the model. Linears of a head that the model lacks are left out."""
    found: dict[str, StoredLinear] = {}
    for weight_name, target in name_targets(model, linears).items():
        module_name, _, leaf = target.rpartition(".")
        if leaf != "weight" or module_name in found:
            raise UnsupportedModelError(
                f"{weight_name} is int8, but transformers merges it with others into {target}", hint=_OTHER_LOADERS_HINT
            )
        found[module_name] = linears[weight_name]
    return found
