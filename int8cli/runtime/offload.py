"""A model whose weights are more than its machine holds: which blocks stay, and feeding the others.

Owns the way from memory limits to a model that runs within them, and what is said of its speed beforehand.
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
    """What becomes of the blocks of one model: `plan` before its weights are read, `start` after."""

    def __init__(self, limits: MemoryLimits, device: torch.device) -> None:
        self._limits, self._device = limits, device
        self._layers: dict[str, dict[str, StoredLinear]] = {}
        self._placement: BlockPlacement | None = None

    @property
    def moves(self) -> bool:
        return self._placement is not None and self._placement.moves

    def plan(self, model: Any, linears: Mapping[str, StoredLinear]) -> set[str]:
        """Place the blocks of a model without weights; returns the tensors that are not to be read into memory.

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
        """Have the blocks fed, now that everything else is in memory. `stored` stays open as long as the model."""
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
                else _held(layer, self._device.type == "cuda")
            )
            layer.drop_weight()
            layers.append(layer)
        if place == "disk":
            for linear in self._layers[block].values():
                stored.forget(linear.weight_name)  # so that the disk is measured, not the page cache
        return FedBlock(block, model.get_submodule(block), tuple(layers), tuple(weights))


def _size_bytes(model: Any) -> int:
    """All parameters and buffers, but one of each tied pair: they are tied only once weights have been read."""
    tied = getattr(model, "all_tied_weights_keys", {})
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors if name not in tied)


def _held(layer: Int8Linear, pinned: bool) -> Callable[[], Tensor]:
    """A layer's weight, held in RAM: page-locked where a GPU copies it."""
    weight = layer.weight.as_subclass(Tensor)
    held = weight.contiguous().pin_memory() if pinned else weight
    return lambda: held


def _speed(placement: BlockPlacement, feed: BlockFeed, places: list[Place]) -> str:
    """What is brought for each token, and how long that takes at the rate of the first block of each place."""
    parts, seconds = [], 0.0
    for place, where in (("ram", "RAM"), ("disk", "the disk")):
        if place not in places:
            continue
        first = places.index(place)
        block_bytes = placement.block_bytes[placement.blocks_in(place)[0]]
        rate = block_bytes / max(feed.seconds_for(first), 1e-9)
        seconds += placement.bytes_in(place) / rate
        count = len(placement.blocks_in(place))
        parts.append(f"{count} with {human_bytes(placement.bytes_in(place))} from {where} at {human_bytes(rate)}/s")
    how_long = human_seconds(seconds) if seconds >= 1 else f"{seconds:.2f} s"
    return (
        f"{len(placement.places)} blocks, of which are brought for each token: {', '.join(parts)}; "
        f"that is {how_long} a token, beside the arithmetic"
    )
