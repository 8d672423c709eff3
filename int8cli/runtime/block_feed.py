"""Blocks whose int8 weights stay in RAM or on the disk, and are on the computing device only while the block runs.

Owns when weights are loaded and dropped: those of the next block are loaded while one computes. Weights on the disk are
mapped from the shards only while they are used, so that neither memory nor address space grows with the model.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from int8cli.errors import UnsupportedOperationError
from int8cli.runtime.linear import Int8Linear

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class FedBlock:
    """A block and its int8 layers. `weights` has a function per layer that returns its weight, in RAM or mapped."""

    name: str
    module: nn.Module
    layers: tuple[Int8Linear, ...]
    weights: tuple[Callable[[], Tensor], ...]


class BlockFeed:
    """Loads the weights of a block before it runs and drops them after, in hooks on the block.

    Blocks may run in any order. The one that is loaded ahead is the one that followed the last time or, in the first
    pass, the next in the list.
    """

    def __init__(self, blocks: Sequence[FedBlock], device: torch.device, close: Callable[[], None]) -> None:
        self._blocks, self._device, self._close = tuple(blocks), device, close
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="int8cli-read-ahead")
        self._ahead: tuple[int, Future[list[Tensor]]] | None = None
        self._last: int | None = None
        self._followed_by: dict[int, int] = {}
        for index, block in enumerate(self._blocks):
            block.module.register_forward_pre_hook(partial(self._enter, index))
            block.module.register_forward_hook(partial(self._leave, index), always_call=True)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
        self._close()

    def seconds_for(self, index: int) -> float:
        """How long it takes to load one block's weights: they are loaded, and dropped."""
        begin = time.perf_counter()
        self._load(index)
        return time.perf_counter() - begin

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        weights = self._taken(index)
        if self._last is not None:
            self._followed_by[self._last] = index
        self._last = index
        following = self._followed_by.get(index, (index + 1) % len(self._blocks))
        if following != index:
            self._ahead = (following, self._pool.submit(self._load, following))
        for layer, weight in zip(self._blocks[index].layers, weights, strict=True):
            layer.take_weight(weight)

    def _leave(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        for layer in self._blocks[index].layers:
            layer.drop_weight()

    def _taken(self, index: int) -> list[Tensor]:
        """The weights of a block. They may have been loaded ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._load(index)
        found, future = ahead
        weights = future.result()
        return weights if found == index else self._load(index)

    def _load(self, index: int) -> list[Tensor]:
        loaded = []
        for weight in self._blocks[index].weights:
            tensor = weight()
            if self._device.type == "cpu":
                tensor.view(-1)[::_PAGE_BYTES].sum()  # reads every page: in this thread, not when it is multiplied
            loaded.append(tensor.to(self._device))
        return loaded

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise _refusal()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _refusal()


def _refusal() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "a model whose blocks are on the disk or in RAM cannot be copied or pickled: load its directory again"
    )
