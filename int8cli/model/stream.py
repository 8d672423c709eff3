"""The engine: a model run over sequences with the weights of one unit in memory at a time.

Owns the order of things: every sequence comes to a unit, then the unit's weights are read, once, then all sequences
pass. Each sequence is run by itself by the model's own forward, so its numbers are those of the whole model on that
sequence, to the bit. Knows nothing of outliers or int8: whoever asks for the units watches them, or changes what their
layers compute for some of the sequences.

    for block in stream.units(sequences):          # its weights are in memory now
        with hooks on block.module:
            block.run()                            # every sequence through it
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from int8cli.checkpoint.source import ShardFile
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.errors import CannotRunError, Int8cliError, NotEnoughMemoryError, UnsupportedModelError
from int8cli.model.saved_states import SavedStates
from int8cli.model.sites import (
    Kind,
    Site,
    SiteFinder,
    is_marked,
    is_norm,
    linears_of,
    map_tensors,
    mark,
    tensors_in,
)
from int8cli.model.skeleton import Skeleton
from int8cli.model.strands import Strand
from int8cli.model.units import Unit
from int8cli.results.units import human_bytes

Inputs = dict[str, Any]
Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Call:
    """A sequence has come to a unit, with these arguments."""

    unit: Unit
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _HeadReachedError(BaseException):
    """Ends a forward before its output head; no `except Exception` on the way may stop it."""


class LoadedUnit:
    """A unit with its weights in memory and every sequence waiting before it. `run` it once, then go to the next.

    `linears` are its linear layers but the output head, by the names that the checkpoint has for them.
    """

    def __init__(self, stream: "StreamedModel", unit: Unit, waiting: dict[int, _Call]) -> None:
        self.unit = unit
        self.module: nn.Module = stream.skeleton.module(unit)
        self.done = False
        self._stream = stream
        self._waiting = waiting
        head = stream.skeleton.output_head()
        self._names = {
            module: stream.skeleton.weight_name(f"{unit.name}.{name}" if name else unit.name)
            for name, module in linears_of(self.module).items()
            if module is not head
        }

    @property
    def linears(self) -> dict[str, nn.Module]:
        return {name: module for module, name in self._names.items()}

    def run(
        self,
        *,
        order: Callable[[int], Any] | None = None,
        on_sequence: Callable[[int], None] | None = None,
        on_input: Callable[[str, Tensor], None] | None = None,
        on_linear_output: Callable[[str, Tensor], None] | None = None,
        on_output: Callable[[Any], None] | None = None,
    ) -> tuple[Site, ...]:
        """Bring every sequence through, by `order` of their numbers or as they were given. Returns the sites met.

        on_sequence(its number): before each sequence.
        on_input(site's name, x): once for each input (…, positions, in_features), however many linears share it.
        on_linear_output(linear's name, y): after each linear. on_output(output): what the unit gave for a sequence.
        """
        self.done = True

        def take_input(linear: nn.Module, x: Tensor) -> None:
            if on_input is not None:
                on_input(self._names[linear], x)

        def take_output(linear: nn.Module, _: object, y: Tensor) -> None:
            if on_linear_output is not None:
                on_linear_output(self._names[linear], y)

        finder = SiteFinder(take_input)
        sites: tuple[Site, ...] = ()
        with ExitStack() as hooks:
            for linear in self._names:
                hooks.callback(linear.register_forward_hook(take_output).remove)
            for turn, sequence in enumerate(sorted(self._waiting, key=order)):
                if on_sequence is not None:
                    on_sequence(sequence)
                call = self._waiting.pop(sequence)
                output = self._stream._compute(self, call, finder if turn == 0 else None)
                if turn == 0:
                    sites = tuple(self._site(*found) for found in finder.found())
                    del finder
                    for linear in (self.linears[site.name] for site in sites):
                        hook = linear.register_forward_pre_hook(lambda module, inputs: take_input(module, inputs[0]))
                        hooks.callback(hook.remove)
                if on_output is not None and not isinstance(output, _HeadReachedError):
                    on_output(output)
                self._stream._advance(sequence, self._stream._keep(self, sequence, output))
                del call, output  # the sequence has what it needs of them
        return sites

    @contextmanager
    def changed(self, change: Callable[[str, Forward], Forward]) -> Iterator[None]:
        """Have each linear layer compute what `change(its name, its forward)` gives, while the context lasts."""
        forwards = self._stream._forwards
        with ExitStack() as stack:
            for module, name in self._names.items():
                if module is self.module:  # its own forward asks the engine
                    original = forwards[self.unit.name]
                    forwards[self.unit.name] = change(name, original)
                    stack.callback(forwards.__setitem__, self.unit.name, original)
                else:
                    module.forward = change(name, module.forward)
                    stack.callback(delattr, module, "forward")
            yield

    def _site(self, kind: Kind, in_features: int, linears: list[nn.Module]) -> Site:
        names = tuple(self._names[linear] for linear in linears)
        return Site(names[0], names, kind, self.unit.stack, self.unit.index, in_features)


class StreamedModel:
    """A model whose units are given their weights one after the other. To be run once.

    `to_head`: stop each sequence before the output head, whose logits nobody needs. `saved` has the blocks' outputs on
    disk, so that a later run can go on after the last block that is whole there. `on_result(sequence's number, what its
    forward returned)` is called as soon as a forward ends, and nothing is held of it then: logits are large.
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
        self.outputs: dict[int, Any] = {}
        self._tensors = tensors
        self._device = torch.device(device)
        self.head = skeleton.output_head() if to_head else None
        self._saved = saved
        self._on_result = on_result
        self._strands: list[Strand[_Call, Any]] = []
        self._calls: dict[int, _Call] = {}
        self._forwards: dict[str, Callable[..., Any]] = {}
        self._visits: dict[str, int] = {}
        self._recalled: set[str] = set()
        self._asking = threading.local()
        skeleton.to(self._device)

    def units(self, sequences: Sequence[Inputs]) -> Generator[LoadedUnit]:
        """Each unit in the order in which the model calls them, its weights in memory until the next one is asked for.

        `sequences` are keyword arguments of the model's forward. A unit that shares its weights with itself (ALBERT)
        comes as often as it is called. When all are done, `outputs` holds what the forwards returned, by sequence,
        unless they stopped before the head or were handed over already.
        """
        with closing(self.steps(sequences)) as steps:
            yield from (step for step in steps if isinstance(step, LoadedUnit))

    def steps(self, sequences: Sequence[Inputs]) -> Generator[LoadedUnit | ShardFile]:
        """As `units`, and each shard once all that is wanted of it has been read.

        Its file is there until the next step is asked for. Ended in the middle (`close`, `throw`), this leaves what was
        fetched of that shard for the next run.
        """
        for unit in (self.skeleton.resident, *self.skeleton.units):
            if unit.name == "" or self.skeleton.module(unit) is not self.head:
                self._tensors.expect(unit.sources)
        self._strands = [self._strand(index, inputs) for index, inputs in enumerate(sequences)]
        with self._intercepted(), torch.no_grad():
            self.skeleton.load(self.skeleton.resident, self._tensors)
            try:
                yield from self._tensors.finished(self.skeleton.resident.sources)
                for index in range(len(sequences)):
                    self._advance(index)
                while self._calls:
                    unit = self._calls[min(self._calls)].unit
                    yield from self._one(unit)
            finally:
                for strand in self._strands:
                    strand.close()
                self.skeleton.unload(self.skeleton.resident)

    def _one(self, unit: Unit) -> Iterator[LoadedUnit | ShardFile]:
        """Load a unit, yield it so that the sequences which wait for it can pass, unload it; then the shards done."""
        waiting = {index: call for index, call in sorted(self._calls.items()) if call.unit == unit}
        for index in waiting:
            del self._calls[index]
        visit = self._visits[unit.name] = self._visits.get(unit.name, 0) + 1
        if self._saved is not None and visit > 1:
            self._refuse_to_keep(unit)
        if self._saved is not None and self._saved.has(unit.name, visit):
            self._recalled.add(unit.name)
            for index in waiting:
                self._advance(index, self._recall(unit, index))
        else:
            self.skeleton.load(unit, self._tensors)
            self._tensors.prefetch(self._next_sources(unit))
            loaded = LoadedUnit(self, unit, waiting)
            try:
                yield loaded
                if not loaded.done:
                    loaded.run()
            finally:
                self.skeleton.unload(unit)
            if self._saved is not None and unit.stack is not None:
                self._saved.finish(unit.stack, unit.name, visit)
        yield from self._tensors.finished(unit.sources)

    def _advance(self, sequence: int, output: Any = None) -> None:
        """Take a sequence on with the output of the unit that it stood before, to its next unit or its end."""
        call = self._strands[sequence].advance(output)
        if call is not None:
            self._calls[sequence] = call
        elif self._on_result is not None and sequence in self.outputs:
            self._on_result(sequence, self.outputs.pop(sequence))

    def _refuse_to_keep(self, unit: Unit) -> None:
        """A unit is called again: what is watched of it spans its calls, so a run cannot go on between them."""
        assert self._saved is not None
        self._saved.abandon()
        if unit.name in self._recalled:
            raise UnsupportedModelError(f"{unit.name} is called more than once, and only some of its calls were saved")

    def _strand(self, index: int, inputs: Inputs) -> "Strand[_Call, Any]":
        def forward(ask: Callable[[_Call], Any]) -> None:
            self._asking.ask = ask
            with torch.no_grad():
                try:
                    self.outputs[index] = self.skeleton.model(**map_tensors(inputs, lambda t: t.to(self._device)))
                except _HeadReachedError:
                    pass
                except Int8cliError:
                    raise
                except Exception as error:
                    raise self._not_streamable(error) from error

        return Strand(forward)

    @contextmanager
    def _intercepted(self) -> Iterator[None]:
        """Have units ask for their output instead of computing it, and the head end the forward."""
        head = self.head
        patched: list[nn.Module] = []
        for unit in self.skeleton.units:
            module = self.skeleton.module(unit)
            if module is not head:
                self._forwards[unit.name] = module.forward

                def ask(*args: Any, _unit: Unit = unit, **kwargs: Any) -> Any:
                    answer = self._asking.ask(_Call(_unit, args, kwargs))
                    if isinstance(answer, _HeadReachedError):
                        raise answer
                    return answer

                module.forward = ask
                patched.append(module)
        if head is not None:

            def stop(*_: Any, **__: Any) -> Any:
                raise _HeadReachedError

            head.forward = stop
            patched.append(head)
        try:
            yield
        finally:
            for module in patched:
                del module.forward

    def _compute(self, loaded: LoadedUnit, call: _Call, finder: SiteFinder | None) -> Any:
        """One sequence through a unit, on the device its weights are on."""
        forward, module = self._forwards[call.unit.name], loaded.module
        device = torch.device("cpu") if call.unit.mapped else self._device
        args, kwargs = map_tensors((call.args, call.kwargs), lambda tensor: _moved(tensor, device))
        try:
            with finder.watching(module, loaded.linears.values(), (args, kwargs)) if finder else nullcontext():
                output = forward(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemoryError(
                f"{call.unit.name}: {self._device} has too little memory for {human_bytes(call.unit.weight_bytes)} of "
                "weights and one sequence",
                hint="Use shorter sequences, or the CPU.",
            ) from error
        except _HeadReachedError as reached:  # the head is part of the unit
            return reached
        except Int8cliError:
            raise
        except Exception as error:
            raise self._not_streamable(error, call.unit.name) from error
        for tensor in tensors_in(output):
            if is_norm(module) or (finder is not None and finder.made_by_norm(tensor)):
                mark(tensor)
        return map_tensors(output, lambda tensor: _moved(tensor, self._device))

    def _keep(self, loaded: LoadedUnit, sequence: int, output: Any) -> Any:
        unit = loaded.unit
        if self._saved is None or unit.stack is None:
            return output
        return self._saved.put(unit.stack, unit.name, self._visits[unit.name], sequence, output)

    def _recall(self, unit: Unit, sequence: int) -> Any:
        assert self._saved is not None
        assert unit.stack is not None
        return map_tensors(self._saved.get(unit.stack, sequence), lambda tensor: _moved(tensor, self._device))

    def _next_sources(self, unit: Unit) -> tuple[str, ...]:
        """The tensors of the unit that probably comes next: the one that follows in the model."""
        units = self.skeleton.units
        place = units.index(unit) + 1
        return units[place].sources if place < len(units) else ()

    def _not_streamable(self, error: Exception, unit: str = "") -> CannotRunError:
        where = f" in {unit}" if unit else ""
        name = type(self.skeleton.model).__name__
        return CannotRunError(f"{name} cannot be run block by block: {type(error).__name__}{where}: {error!s:.300}")


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with its mark."""
    if tensor.device == device:
        return tensor
    moved = tensor.to(device)
    return mark(moved) if is_marked(tensor) else moved
