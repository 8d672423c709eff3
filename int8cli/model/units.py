"""How a model is cut into units, whose weights are in memory together.

Owns which modules are a unit. Knows tensors of a checkpoint only by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the model whose weights are in memory together: a block, or one module outside the blocks.

    `stack` and `index` place a block in its list (`model.layers`, 11); both are None for other modules. `sources` are
    the checkpoint's tensors for its weights, `targets` the parameters that they become. The weights of a `mapped` unit
    are a mapping of their file, since only a few rows of an embedding are used.
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


def find_units(model: nn.Module) -> Iterator[tuple[str, str | None, int | None]]:
    """Name, stack and index of each unit, in the model's order.

    Units are the members of the outermost lists of layers and, outside of them, the outermost modules that own weights.
    A module with blocks inside it is not a unit: `resident_weights` names its own weights, which stay in memory.
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
        elif not any(name.startswith(f"{unit}.") for unit in (*blocks, *outside)):
            owns = any(True for _ in module.parameters(False)) or _persistent_buffers(module)
            if owns and not _has_below(name, blocks):
                outside.append(name)
                yield name, None, None


def _holds_layers(modules: nn.ModuleList) -> bool:
    """Whether a list has layers, rather than embeddings or norms."""
    return any(len(list(child.modules())) > 1 for child in modules)


def _has_below(name: str, blocks: Mapping[str, object]) -> bool:
    return not name or any(block.startswith(f"{name}.") for block in blocks)


def _persistent_buffers(module: nn.Module) -> bool:
    return any(name not in module._non_persistent_buffers_set for name in module._buffers)


def resident_weights(model: nn.Module) -> Iterator[str]:
    """The names of weights that belong to modules with blocks inside."""
    blocks = {name: None for name, stack, _ in find_units(model) if stack}
    for name, module in model.named_modules():
        if _has_below(name, blocks):
            prefix = f"{name}." if name else ""
            yield from (prefix + key for key in module.state_dict() if "." not in key)
