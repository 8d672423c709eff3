"""How a model is cut into units, parts whose weights are in memory together.

Owns which modules are a unit. Knows no tensor of a checkpoint but by name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn


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


def find_units(model: nn.Module) -> Iterator[tuple[str, str | None, int | None]]:
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


def resident_weights(model: nn.Module) -> Iterator[str]:
    """Weights that belong to modules with blocks inside."""
    blocks = {name: None for name, stack, _ in find_units(model) if stack}
    for name, module in model.named_modules():
        if _has_below(name, blocks):
            prefix = f"{name}." if name else ""
            yield from (prefix + key for key in module.state_dict() if "." not in key)
