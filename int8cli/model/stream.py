"""The engine: a model run over sequences with the weights of one unit in memory at a time.

Owns the order: every sequence reaches a unit, the unit's weights are read once, and all sequences pass through it. Each
sequence is run separately by the model's own forward, so its numbers are those of the whole model on that sequence, to
the bit. Knows nothing of outliers or int8: callers observe the units, or change what their layers compute for some of
the sequences.

    for block in stream.units(sequences):          # its weights are in memory now
        with hooks on block.module:
            block.run()                            # every sequence through it
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch

from int8cli.checkpoint.source import ShardFile
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import UnsupportedModelError
from int8cli.model.forwards import Inputs, SuspendedForwards
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.saved_states import SavedStates
from int8cli.model.sites import map_tensors, moved_to
from int8cli.model.skeleton import Skeleton
from int8cli.model.units import Unit


class StreamedModel:
    """A model whose units get their weights one after the other. It can be run once.

    `to_head`: end each sequence before the output head, for callers that do not need logits. `saved` saves the blocks'
    outputs to disk, so that a later run can resume after the last finished block. `on_result(sequence's number, what
    its forward returned)` is called as soon as a forward ends, and the result is not stored: logits are large.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tensors: CheckpointTensors,
        *,
        device: str = "cpu",
        to_head: bool = True,
        saved: SavedStates | None = None,
        on_result: Callable[[int, Any], None] | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.head = skeleton.output_head() if to_head else None
        self._tensors = tensors
        self._device = torch.device(device)
        self._saved = saved
        self._forwards = SuspendedForwards(skeleton, self.head, self._device, on_result)
        self._visits: dict[str, int] = {}
        self._restored: set[str] = set()
        skeleton.to(self._device)

    @property
    def outputs(self) -> dict[int, Any]:
        """What the forwards returned, by sequence, unless they ended before the head or `on_result` received it."""
        return self._forwards.outputs

    def units(self, sequences: Sequence[Inputs]) -> Generator[LoadedUnit]:
        """Yield each unit in the order in which the model calls them; its weights are in memory until the next one.

        `sequences` are keyword arguments of the model's forward. A unit that is called several times (ALBERT shares one
        between its layers) is yielded each time. When all are done, `outputs` has the results.
        """
        with closing(self.steps(sequences)) as steps:
            yield from (step for step in steps if isinstance(step, LoadedUnit))

    def steps(self, sequences: Sequence[Inputs]) -> Generator[LoadedUnit | ShardFile]:
        """As `units`, and also yield each shard once everything needed from it has been read.

        Its file exists until the next step. If the generator is ended early (`close`, `throw`), the fetched copy of
        that shard stays for the next run.
        """
        resident = self.skeleton.resident
        for unit in (resident, *self.skeleton.units):
            if unit.name == "" or self.skeleton.module(unit) is not self.head:
                self._tensors.expect(unit.sources)
        with self._forwards.prepared(sequences), torch.no_grad():
            self.skeleton.load(resident, self._tensors)
            try:
                yield from self._tensors.finished(resident.sources)
                self._forwards.start()
                while (unit_to_run := self._forwards.next_unit()) is not None:
                    yield from self._steps_of(unit_to_run)
            finally:
                self._forwards.close()
                self.skeleton.unload(resident)

    def _steps_of(self, unit: Unit) -> Iterator[LoadedUnit | ShardFile]:
        """Yield a unit while its weights are loaded, then the shards that are finished with it.

        A unit whose outputs were saved by an earlier run is not loaded: its sequences get the saved outputs.
        """
        waiting = self._forwards.take_waiting(unit)
        visit = self._visits[unit.name] = self._visits.get(unit.name, 0) + 1
        if self._saved is not None and visit > 1:
            self._stop_saving(self._saved, unit)
        if self._saved is not None and self._saved.has(unit.name, visit):
            self._restored.add(unit.name)
            for sequence in waiting:
                self._forwards.resume(sequence, self._restore(self._saved, unit, sequence))
        else:
            yield from self._run(
                LoadedUnit(
                    self.skeleton, unit, waiting, self._forwards.originals, self._device, partial(self._pass_on, unit)
                )
            )
            if self._saved is not None and unit.stack is not None:
                self._saved.finish(unit.stack, unit.name, visit)
        yield from self._tensors.finished(unit.sources)

    def _run(self, loaded: LoadedUnit) -> Iterator[LoadedUnit]:
        """Yield a unit while its weights are in memory. If the caller did not run it, it is run here."""
        self.skeleton.load(loaded.unit, self._tensors)
        self._tensors.prefetch(self._next_sources(loaded.unit))
        try:
            yield loaded
            if not loaded.done:
                loaded.run()
        finally:
            self.skeleton.unload(loaded.unit)

    def _pass_on(self, unit: Unit, sequence: int, output: Any) -> None:
        """Save a block's output, where outputs are saved, and resume the sequence with it."""
        if self._saved is not None and unit.stack is not None:
            output = self._saved.put(unit.stack, unit.name, self._visits[unit.name], sequence, output)
        self._forwards.resume(sequence, output)

    def _restore(self, saved: SavedStates, unit: Unit, sequence: int) -> Any:
        assert unit.stack is not None
        return map_tensors(saved.get(unit.stack, sequence), lambda tensor: moved_to(tensor, self._device))

    def _stop_saving(self, saved: SavedStates, unit: Unit) -> None:
        """Delete the saved state of a model that calls a unit twice: a run cannot resume between the two calls.

        What observers collect of the unit spans all of its calls.
        """
        saved.abandon()
        if unit.name in self._restored:
            raise UnsupportedModelError(f"{unit.name} is called more than once, and only some of its calls were saved")

    def _next_sources(self, unit: Unit) -> tuple[str, ...]:
        """The tensors of the unit that probably comes next: the one after it in the model."""
        units = self.skeleton.units
        place = units.index(unit) + 1
        return units[place].sources if place < len(units) else ()
