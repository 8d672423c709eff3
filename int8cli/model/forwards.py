"""A model's forward, run once for each sequence and suspended wherever it calls a unit.

Owns the patched forwards of the units and the strands that run the model. Knows nothing of weights: the caller resumes
a sequence with the output of the unit that it waits for.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from int8cli.checkpoint.disk import raise_if_of_the_system
from int8cli.errors import CannotRunError, Int8cliError
from int8cli.model.sites import map_tensors
from int8cli.model.skeleton import Skeleton
from int8cli.model.strands import Strand
from int8cli.model.units import Unit

Inputs = dict[str, Any]
Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class UnitCall:
    """A sequence has reached a unit, which the model calls with these arguments."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class HeadReachedError(BaseException):
    """Ends a forward before its output head. A BaseException, so that no `except Exception` in a model stops it."""


class SuspendedForwards:
    """One forward for each sequence, suspended in front of the unit that it calls next.

    `head` is the module at which a forward ends; None lets it run to its end. `on_result(sequence, returned)` is called
    when a forward has ended; without it, `outputs` collects what the forwards returned, by sequence. `originals` are
    the units' own forwards, by unit name.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        head: nn.Module | None,
        device: torch.device,
        on_result: Callable[[int, Any], None] | None,
    ) -> None:
        self.originals: dict[str, Forward] = {}
        self.outputs: dict[int, Any] = {}
        self._skeleton = skeleton
        self._head = head
        self._device = device
        self._on_result = on_result
        self._strands: list[Strand[UnitCall, Any]] = []
        self._waiting: dict[int, UnitCall] = {}
        self._this_strand = threading.local()

    @contextmanager
    def prepared(self, sequences: Sequence[Inputs]) -> Iterator[None]:
        """Patch the model while the context lasts. Call `close` before it ends."""
        self._strands = [self._strand(index, inputs) for index, inputs in enumerate(sequences)]
        patched: list[nn.Module] = []
        for unit in self._skeleton.units:
            module = self._skeleton.module(unit)
            if module is not self._head:
                self.originals[unit.name] = module.forward
                module.forward = self._asking_forward(unit)
                patched.append(module)
        if self._head is not None:
            self._head.forward = _stop_at_head
            patched.append(self._head)
        try:
            yield
        finally:
            for module in patched:
                del module.forward

    def start(self) -> None:
        """Run every forward up to its first unit."""
        for sequence in range(len(self._strands)):
            self.resume(sequence)

    def resume(self, sequence: int, output: Any = None) -> None:
        """Run a sequence on, with the output of the unit that it waits for, up to its next unit or its end."""
        call = self._strands[sequence].advance(output)
        if call is not None:
            self._waiting[sequence] = call
        elif self._on_result is not None and sequence in self.outputs:
            self._on_result(sequence, self.outputs.pop(sequence))

    def next_unit(self) -> Unit | None:
        """The unit that the first of the unfinished sequences waits for; None if all have ended."""
        return self._waiting[min(self._waiting)].unit if self._waiting else None

    def take_waiting(self, unit: Unit) -> dict[int, UnitCall]:
        """The sequences that wait for a unit, in order, with their calls. The caller must resume each of them."""
        waiting = {sequence: call for sequence, call in sorted(self._waiting.items()) if call.unit == unit}
        for sequence in waiting:
            del self._waiting[sequence]
        return waiting

    def close(self) -> None:
        """End every forward that has not ended."""
        for strand in self._strands:
            strand.close()

    def _strand(self, sequence: int, inputs: Inputs) -> "Strand[UnitCall, Any]":
        def forward(ask: Callable[[UnitCall], Any]) -> None:
            self._this_strand.ask = ask
            with torch.no_grad():
                try:
                    on_device = map_tensors(inputs, lambda tensor: tensor.to(self._device))
                    self.outputs[sequence] = self._skeleton.model(**on_device)
                except HeadReachedError:
                    pass
                except Int8cliError:
                    raise
                except Exception as error:
                    raise_if_of_the_system(error)
                    raise not_streamable(self._skeleton.model, error) from error

        return Strand(forward)

    def _asking_forward(self, unit: Unit) -> Forward:
        """A forward for a unit's module that asks for the unit's output instead of computing it."""

        def ask(*args: Any, **kwargs: Any) -> Any:
            answer = self._this_strand.ask(UnitCall(unit, args, kwargs))
            if isinstance(answer, HeadReachedError):
                raise answer
            return answer

        return ask


def not_streamable(model: nn.Module, error: Exception, unit: str = "") -> CannotRunError:
    """The error for a model whose own code failed, in a unit if one is named."""
    where = f" in {unit}" if unit else ""
    name = type(model).__name__
    return CannotRunError(f"{name} cannot be run block by block: {type(error).__name__}{where}: {error!s:.300}")


def _stop_at_head(*_: Any, **__: Any) -> Any:
    raise HeadReachedError
