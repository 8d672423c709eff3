"""A transformers model without its weights: built from config.json on the meta device, and cut into units.

Owns everything that depends on how transformers builds a model and names its weights; the only module that reaches into
`transformers.core_model_loading`. No code but transformers' own is ever run: a config that asks for remote code is
refused.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8cli.checkpoint.tensor import QUANTIZABLE_DTYPES, TensorSpec
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import CannotRunError, CheckpointError
from int8cli.model.extra import require_transformers

_RESIDENT_TABLE_BYTES = 16 << 20
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the model whose weights are in memory together: a block, or one module outside of the blocks.

    `stack` and `index` place a block in its list (`model.layers`, 11); a module outside has None. `sources` are the
    checkpoint's tensors that its weights are made of, `targets` the parameters they become. `mapped` units are not
    read: their file is mapped, since only rows of an embedding are ever looked up.
    """

    name: str
    stack: str | None
    index: int | None
    targets: tuple[str, ...]
    sources: tuple[str, ...]
    weight_bytes: int
    mapped: bool

    @property
    def is_block(self) -> bool:
        return self.stack is not None


class Skeleton:
    """The model, on the meta device but for what units have been given, and the way from tensor names to weights."""

    def __init__(self, model: Any, dtype: torch.dtype, specs: Mapping[str, TensorSpec]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model = model
        self.dtype = dtype
        self._device = torch.device("cpu")
        self._conversions: Any = get_model_conversion_mapping(model)
        self._target_of = name_targets(model, specs)
        self._sources_of: dict[str, list[str]] = {}
        for source, target in self._target_of.items():
            self._sources_of.setdefault(target, []).append(source)
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        units = [self._unit(*found, specs) for found in _find_units(model)]
        # Small tables stay: some models (DeBERTa) take the weight of one without calling the module.
        head = self.output_head()
        tables = [unit for unit in units if unit.mapped and self.module(unit) is not head]
        small = [unit for unit in tables if unit.weight_bytes <= _RESIDENT_TABLE_BYTES]
        self.units = tuple(unit for unit in units if unit not in small)
        resident = [*_resident_weights(model), *(target for unit in small for target in unit.targets)]
        resident = [name for name in resident if self._parameter(name).is_meta]
        self.resident = Unit("", None, None, tuple(resident), self._sources(resident), 0, False)

    def module(self, unit: Unit) -> nn.Module:
        module: nn.Module = self.model.get_submodule(unit.name)
        return module

    def weight_name(self, module_name: str) -> str:
        """What the checkpoint calls the module: its weight's name there without `.weight`; its own if it has none."""
        sources = self._sources_of.get(f"{module_name}.weight", [])
        return sources[0].removesuffix(".weight") if len(sources) == 1 else module_name

    def output_head(self) -> nn.Module | None:
        """The layer that makes logits, after which there is nothing to learn about inputs."""
        head = self.model.get_output_embeddings()
        return head if isinstance(head, nn.Module) else None

    def to(self, device: torch.device) -> None:
        """Move what is not weights, such as rotary frequencies, to the device that units will be loaded on."""
        self._device = device
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(device))

    def load(self, unit: Unit, tensors: CheckpointTensors) -> None:
        """Give a unit its weights. Raises CheckpointError for those that the checkpoint does not have."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        read = tensors.map if unit.mapped else tensors.read
        lazy = {name: _Lazy(read, name) for name in unit.sources}
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._conversions,
            device_map={"": "cpu" if unit.mapped else self._device},
        )
        with _quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, lazy, config)
        for name, found, expected in info.mismatched_keys:
            raise CheckpointError(
                f"{name} has the shape {tuple(found)}, the model's config.json wants {tuple(expected)}"
            )
        for target in unit.targets:
            self._tie(target)
            if self._parameter(target).is_meta:
                raise CheckpointError(
                    f"the checkpoint has no tensor for {target}, which the model needs", hint="Files may be missing."
                )

    def unload(self, unit: Unit) -> None:
        """Take a unit's weights from it again."""
        for target in {*unit.targets, *map(self._untied, unit.targets)}:
            owner, _, leaf = target.rpartition(".")
            module = self.model.get_submodule(owner)
            old = getattr(module, leaf)
            meta = torch.empty_like(old, device="meta")
            setattr(module, leaf, nn.Parameter(meta, requires_grad=False) if leaf in module._parameters else meta)

    def _untied(self, target: str) -> str:
        """The parameter that the checkpoint has tensors for: the target, or what it is tied to, in either direction."""
        if target in self._sources_of:
            return target
        partners = [self._tied.get(target)] + [tied for tied, to in self._tied.items() if to == target]
        partners += [tied for tied, to in self._tied.items() if to == self._tied.get(target)]
        return next((partner for partner in partners if partner in self._sources_of), target)

    def _tie(self, target: str) -> None:
        owner, _, leaf = target.rpartition(".")
        given = self._parameter(self._untied(target))
        if given is not self._parameter(target):
            setattr(self.model.get_submodule(owner), leaf, given)

    def _parameter(self, target: str) -> Tensor:
        owner, _, leaf = target.rpartition(".")
        parameter: Tensor = getattr(self.model.get_submodule(owner), leaf)
        return parameter

    def _sources(self, targets: list[str]) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys(source for target in targets for source in self._sources_of.get(self._untied(target), ()))
        )

    def _unit(self, name: str, stack: str | None, index: int | None, specs: Mapping[str, TensorSpec]) -> Unit:
        module = self.model.get_submodule(name)
        targets = [f"{name}.{key}" for key, weight in module.state_dict().items() if weight.is_meta]
        # A tensor that is split belongs to its first target; one that is merged from many lists them all.
        sources = self._sources(targets)
        width = self.dtype.itemsize
        weight_bytes = sum(specs[source].numel * width for source in sources)
        tables = all(
            isinstance(child, nn.Embedding) for child in module.modules() if any(True for _ in child.parameters(False))
        )
        mapped = stack is None and (tables or module is self.output_head())
        return Unit(name, stack, index, tuple(targets), sources, weight_bytes, mapped)


def build_skeleton(directory: Path, specs: Mapping[str, TensorSpec]) -> Skeleton:
    """The model that a directory's config.json describes, for a checkpoint with these tensors.

    The class is the one that config.json names, so that heads are as they were saved, or the bare model of its type.
    Raises CannotRunError for a model that only remote code can build, MissingExtraError without transformers.
    """
    config = read_config(directory)
    model_class = model_class_of(config)
    dtype = dtype_of(config, specs)
    try:
        with contextlib.ExitStack() as stack:
            for context in model_class.get_init_context(dtype, False, False, None):
                stack.enter_context(context)
            model = model_class(config)
        computed = _computed_weights(model)
        model._move_missing_keys_from_meta_to_device(computed, {"": "cpu"}, None, None)
        model._initialize_missing_keys(False)
    except Exception as error:  # what a model class makes of a config is not for us to list
        raise CannotRunError(
            f"transformers cannot build {model_class.__name__} from this config.json: {error!s:.300}"
        ) from error
    return Skeleton(model.eval(), dtype, specs)


def name_targets(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The parameter that each tensor becomes (the first, where it is split); tensors of no use are not in it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions: Any = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    found = {}
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, _ = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if target in wanted:
            found[name] = target
    return found


def _computed_weights(model: Any) -> set[str]:
    """Weights that checkpoints need not have, since the model computes them when it is made (Marian's positions)."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for name in model.state_dict() if name not in tied and any(re.search(p, name) for p in patterns)}


def read_config(directory: Path) -> Any:
    """The directory's config.json as transformers reads it, never with code of the model's own."""
    require_transformers()
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not (directory / "config.json").is_file():
        raise CannotRunError("there is no config.json, so the model cannot be built", hint="Put it beside the weights.")
    raw, _ = PretrainedConfig.get_config_dict(directory, local_files_only=True)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        asks = "asks for code of its own (trust_remote_code), which is never run" if "auto_map" in raw else ""
        raise CannotRunError(
            f"the installed transformers does not know the model type {model_type!r}"
            + (f"; its config.json {asks}" if asks else ""),
            hint="A newer transformers may know it.",
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CannotRunError(f"transformers does not accept this config.json: {error!s:.300}") from error


def model_class_of(config: Any) -> Any:
    """The class that a config names, or the bare model of its type. Raises CannotRunError."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, (list, tuple)) else found
    raise CannotRunError(f"transformers has no model for {config.architectures or config.model_type}")


def dtype_of(config: Any, specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """The dtype of the weights: what the config says, as transformers' `dtype="auto"` has it, or what most are."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    totals = dict.fromkeys(QUANTIZABLE_DTYPES, 0)
    for spec in specs.values():
        if spec.dtype in totals:
            totals[spec.dtype] += spec.numel
    return _TORCH_DTYPES[max(sorted(totals), key=lambda dtype: totals[dtype])]


def _find_units(model: nn.Module) -> Iterator[tuple[str, str | None, int | None]]:
    """Name, stack and index of each unit: the members of the outermost lists of layers, then what lies outside.

    Outside, a unit is the outermost module with weights of its own; one with blocks inside it keeps its own weights
    resident instead.
    """
    blocks: dict[str, tuple[str, int]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.ModuleList) and not inside and _holds_layers(module):
            for index, child in enumerate(module):
                if any(True for _ in child.parameters()):
                    blocks[f"{name}.{index}"] = (name, index)
    outside: list[str] = []
    for name, module in model.named_modules():
        if name in blocks:
            yield name, *blocks[name]
        elif not any(name.startswith(f"{taken}.") for taken in (*blocks, *outside)):
            owns = any(True for _ in module.parameters(False)) or _persistent_buffers(module)
            if owns and not _has_below(name, blocks):
                outside.append(name)
                yield name, None, None


def _holds_layers(modules: nn.ModuleList) -> bool:
    """A list of layers, not one of embeddings or norms."""
    return any(len(list(child.modules())) > 1 for child in modules)


def _has_below(name: str, blocks: Mapping[str, object]) -> bool:
    return not name or any(block.startswith(f"{name}.") for block in blocks)


def _persistent_buffers(module: nn.Module) -> bool:
    return any(name not in module._non_persistent_buffers_set for name in module._buffers)


def _resident_weights(model: nn.Module) -> Iterator[str]:
    """Weights that belong to modules with blocks inside."""
    blocks = {name: None for name, stack, _ in _find_units(model) if stack}
    for name, module in model.named_modules():
        if _has_below(name, blocks):
            prefix = f"{name}." if name else ""
            yield from (prefix + key for key in module.state_dict() if "." not in key)


class _Lazy:
    """A tensor that is read when transformers slices it, as it slices those of safetensors."""

    def __init__(self, read: Any, name: str) -> None:
        self._read, self._name = read, name

    def __getitem__(self, _: object) -> Tensor:
        tensor: Tensor = self._read(self._name)
        return tensor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers shows a bar for each load; a unit's takes a moment."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
