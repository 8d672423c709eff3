"""A model with more weights than the memory holds: which blocks stay in memory, and how the others get their weights.

Owns the steps from memory limits to a model that runs within them, and the note about its speed.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from int8cli.model.memory import return_memory_promptly
from int8cli.model.units import find_units
from int8cli.progress import Progress
from int8cli.results.units import human_bytes, human_seconds
from int8cli.runtime.block_feed import BlockFeed, FedBlock
from int8cli.runtime.linear import Int8Linear
from int8cli.runtime.placement import BlockPlacement, MemoryLimits, Place, place_blocks
from int8cli.runtime.stored import StoredLinear, StoredModel


class Offload:
    """Keeps a model within memory limits: call `plan` before its weights are read, and `start` after."""

    def __init__(self, limits: MemoryLimits, device: torch.device) -> None:
        self._limits, self._device = limits, device
        self._layers: dict[str, dict[str, StoredLinear]] = {}
        self._placement: BlockPlacement | None = None

    @property
    def moves(self) -> bool:
        return self._placement is not None and self._placement.moves

    def plan(self, model: Any, linears: Mapping[str, StoredLinear]) -> set[str]:
        """Place the blocks of a model that has no weights yet. Returns the tensors not to be read into memory.

        `linears` are its int8 layers by their modules' names. Raises NotEnoughMemoryError.
        """
        for block, stack, _ in find_units(model):
            inside = {name: linear for name, linear in linears.items() if name.startswith(f"{block}.")}
            if stack is not None and inside:
                self._layers[block] = inside
        sizes = {
            block: sum(linear.in_features * linear.out_features for linear in layers.values())
            for block, layers in self._layers.items()
        }
        fixed_bytes = _size_bytes(model) - sum(sizes.values())
        self._placement = place_blocks(sizes, fixed_bytes, self._limits)
        if self._placement.moves:
            return_memory_promptly()
        on_disk = self._placement.blocks_in("disk")
        return {linear.weight_name for block in on_disk for linear in self._layers[block].values()}

    def start(self, model: Any, stored: StoredModel, progress: Progress) -> None:
        """Load blocks whenever they run; all else is in memory now. `stored` stays open as long as the model."""
        placement = self._placement
        assert placement is not None
        fed = [self._fed(model, stored, block, place) for block, place in placement.places.items() if place != "device"]
        if self._device.type != "cpu":
            model.to(self._device)
        feed = BlockFeed(fed, self._device, stored.close)
        weakref.finalize(model, feed.close)
        model.hf_device_map = {"": str(self._device)} | {
            block: {"ram": "cpu", "disk": "disk"}[place]
            for block, place in placement.places.items()
            if place != "device"
        }
        progress.note(_speed(placement, feed, [place for place in placement.places.values() if place != "device"]))

    def _fed(self, model: Any, stored: StoredModel, block: str, place: Place) -> FedBlock:
        layers, weights = [], []
        for name, linear in self._layers[block].items():
            layer = model.get_submodule(name)
            assert isinstance(layer, Int8Linear)
            weights.append(
                partial(stored.map, linear.weight_name)
                if place == "disk"
                else _in_ram(layer, self._device.type == "cuda")
            )
            layer.drop_weight()
            layers.append(layer)
        if place == "disk":
            for linear in self._layers[block].values():
                stored.forget(linear.weight_name)  # so that the disk is measured, not the page cache
        return FedBlock(block, model.get_submodule(block), tuple(layers), tuple(weights))


def _size_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers. A tied pair counts once, although it is tied only after reading weights."""
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors if name not in tied)


def _in_ram(layer: Int8Linear, pinned: bool) -> Callable[[], Tensor]:
    """A function that returns the layer's weight from RAM, page-locked if a GPU copies it."""
    weight = layer.weight.as_subclass(Tensor)
    found = weight.contiguous().pin_memory() if pinned else weight
    return lambda: found


def _speed(placement: BlockPlacement, feed: BlockFeed, places: list[Place]) -> str:
    """What is loaded for each token, and how long that takes at the rate of the first block of each place."""
    parts, seconds = [], 0.0
    for place, where in (("ram", "RAM"), ("disk", "the disk")):
        if place not in places:
            continue
        first = places.index(place)
        block_bytes = placement.block_bytes[placement.blocks_in(place)[0]]
        rate = block_bytes / max(feed.seconds_for(first), 1e-9)
        seconds += placement.bytes_in(place) / rate
        count = len(placement.blocks_in(place))
        parts.append(f"{count} ({human_bytes(placement.bytes_in(place))}) from {where} at {human_bytes(rate)}/s")
    how_long = human_seconds(seconds) if seconds >= 1 else f"{seconds:.2f} s"
    return (
        f"of {len(placement.places)} blocks, {' and '.join(parts)} are loaded for each token: "
        f"{how_long} per token, plus the arithmetic"
    )
