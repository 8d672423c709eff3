"""A transformers model without its weights, built from config.json on the meta device. Its weights are loaded by unit.

Owns everything that depends on how transformers builds a model and names its weights. Only transformers' own code is
ever run: a config that needs remote code is refused.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8cli.checkpoint.disk import raise_if_of_the_system
from int8cli.checkpoint.tensor import TensorSpec
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import CannotRunError, CheckpointError, Int8cliError
from int8cli.model.config import bare_class_of, dtype_of, model_class_of, read_config
from int8cli.model.loading import as_large_as, conversions_of, initialize, laid_out, load_weights, name_targets
from int8cli.model.units import Unit, find_units, resident_weights

_RESIDENT_TABLE_BYTES = 16 << 20


class Skeleton:
    """The model, on the meta device except for loaded units, and which tensors of a checkpoint become which weights.

    `stands_for` is the class that config.json names, where the checkpoint lacks its heads and `model` is the bare one.
    """

    def __init__(self, model: Any, dtype: torch.dtype, specs: Mapping[str, TensorSpec], stands_for: str = "") -> None:
        self.model = model
        self.dtype = dtype
        self.stands_for = stands_for
        self._device = torch.device("cpu")
        self._conversions = conversions_of(model)
        self._target_of = name_targets(model, specs)
        self._sources_of: dict[str, list[str]] = {}
        for source, target in self._target_of.items():
            self._sources_of.setdefault(target, []).append(source)
        self._float16 = frozenset(name for name, spec in specs.items() if spec.dtype == "F16")
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        units = [self._unit(*found, specs) for found in find_units(model)]
        # Small tables stay in memory: some models (DeBERTa) use a table's weight without calling its module.
        head = self.output_head()
        tables = [unit for unit in units if unit.mapped and self.module(unit) is not head]
        small = [unit for unit in tables if unit.weight_bytes <= _RESIDENT_TABLE_BYTES]
        self.units = tuple(unit for unit in units if unit not in small)
        resident = [*resident_weights(model), *(target for unit in small for target in unit.targets)]
        resident = [name for name in resident if self._parameter(name).is_meta]
        self.resident = Unit("", None, None, tuple(resident), self._sources(resident), 0, False)

    def module(self, unit: Unit) -> nn.Module:
        module: nn.Module = self.model.get_submodule(unit.name)
        return module

    def weight_name(self, module_name: str) -> str:
        """The checkpoint's name for a module: its weight's name without `.weight`, or the module's own name."""
        sources = self._sources_of.get(f"{module_name}.weight", [])
        return sources[0].removesuffix(".weight") if len(sources) == 1 else module_name

    def is_float16(self, source: str) -> bool:
        """Whether the checkpoint has a tensor in float16, whatever dtype the model has."""
        return source in self._float16

    def is_sole(self, source: str) -> bool:
        """Whether a tensor of the checkpoint alone becomes one parameter, which is not tied to another."""
        target = self._target_of.get(source)
        if target is None or self._sources_of[target] != [source]:
            return False
        return target not in self._tied and target not in self._tied.values()

    def output_head(self) -> nn.Module | None:
        """The layer that computes the logits; None if the model has none."""
        head = self.model.get_output_embeddings()
        return head if isinstance(head, nn.Module) else None

    def lacks_heads(self) -> bool:
        """Whether the model has weights of its own around its bare model, and the checkpoint has none of these."""
        if self.model.base_model is self.model:
            return False
        inside = f"{self.model.base_model_prefix}."
        around = {name for name in self.model.state_dict() if not name.startswith(inside) and name not in self._tied}
        around = {name for name in around if self._parameter(name).is_meta}
        return bool(around) and around.isdisjoint(self._sources_of)

    def to(self, device: torch.device) -> None:
        """Load units on this device from now on, and move buffers such as rotary frequencies to it."""
        self._device = device
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(device))

    def load(self, unit: Unit, tensors: CheckpointTensors) -> None:
        """Load a unit's weights. Raises CheckpointError if the checkpoint lacks one or its shape is wrong."""
        read = tensors.map if unit.mapped else tensors.read
        lazy = {name: _Lazy(read, name) for name in unit.sources}
        device = "cpu" if unit.mapped else self._device
        with _quiet():
            misfits = load_weights(self.model, lazy, self._conversions, self.dtype, device)
        for name, found, expected in misfits:
            raise CheckpointError(f"{name} has the shape {tuple(found)}, but config.json requires {tuple(expected)}")
        for target in unit.targets:
            self._tie(target)
            if self._parameter(target).is_meta:
                raise CheckpointError(
                    f"the checkpoint has no tensor for {target}, which the model needs", hint="Files may be missing."
                )

    def unload(self, unit: Unit) -> None:
        """Move a unit's weights back to the meta device, which frees their memory."""
        for target in {*unit.targets, *map(self._untied, unit.targets)}:
            owner, _, leaf = target.rpartition(".")
            module = self.model.get_submodule(owner)
            old = getattr(module, leaf)
            meta = torch.empty_like(old, device="meta")
            setattr(module, leaf, nn.Parameter(meta, requires_grad=False) if leaf in module._parameters else meta)

    def _untied(self, target: str) -> str:
        """The parameter whose tensors are in the checkpoint: the target, or one that it is tied to."""
        if target in self._sources_of:
            return target
        partners = [self._tied.get(target)] + [tied for tied, to in self._tied.items() if to == target]
        partners += [tied for tied, to in self._tied.items() if to == self._tied.get(target)]
        return next((partner for partner in partners if partner in self._sources_of), target)

    def _tie(self, target: str) -> None:
        owner, _, leaf = target.rpartition(".")
        loaded = self._parameter(self._untied(target))
        if loaded is not self._parameter(target):
            setattr(self.model.get_submodule(owner), leaf, loaded)

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
        # A tensor that is split on load belongs to its first target. A merged weight has several sources.
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

    The class is the one that config.json names, with its heads, or else the bare model of its type; likewise where the
    checkpoint has nothing of the heads, as sentence encoders often do (all-mpnet-base-v2). Raises CannotRunError if
    only remote code can build the model, MissingExtraError without transformers.
    """
    config = read_config(directory)
    model_class = model_class_of(config)
    dtype = dtype_of(config, specs)
    skeleton = Skeleton(_built(model_class, config, dtype, specs), dtype, specs)
    bare_class = bare_class_of(config)
    if bare_class is None or not skeleton.lacks_heads():
        return skeleton
    return Skeleton(_built(bare_class, config, dtype, specs), dtype, specs, stands_for=model_class.__name__)


def _built(model_class: Any, config: Any, dtype: torch.dtype, specs: Mapping[str, TensorSpec]) -> Any:
    """The model on the meta device, without the pooler of bare encoders if the checkpoint has none."""
    may_lack = "add_pooling_layer" in inspect.signature(model_class).parameters
    options = {"add_pooling_layer": False} if may_lack and not any("pooler." in name for name in specs) else {}
    try:
        with as_large_as(len(specs)), laid_out(model_class, dtype):
            model = model_class(config, **options)
        initialize(model, _computed_weights(model))
    except Int8cliError:
        raise
    except Exception as error:  # a model class may raise anything for an unusual config
        raise_if_of_the_system(error)
        raise CannotRunError(
            f"transformers cannot build {model_class.__name__} from this config.json: {error!s:.300}"
        ) from error
    return model.eval()


def _computed_weights(model: Any) -> set[str]:
    """Weights that a checkpoint may lack, since the model computes them when it is built (Marian's positions)."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for name in model.state_dict() if name not in tied and any(re.search(p, name) for p in patterns)}


class _Lazy:
    """A tensor that is read when transformers slices it, like a slice of a safetensors file."""

    def __init__(self, read: Any, name: str) -> None:
        self._read, self._name = read, name

    def __getitem__(self, _: object) -> Tensor:
        tensor: Tensor = self._read(self._name)
        return tensor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bar, which would appear for every unit."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
