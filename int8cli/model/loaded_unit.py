"""One unit with its weights in memory, and the sequences that pass through it.

Owns how a sequence is computed in a unit and who may observe its inputs and outputs. Knows neither the order of the
units nor where their outputs go.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from int8cli.checkpoint.disk import raise_if_of_the_system
from int8cli.errors import Int8cliError, NotEnoughGpuMemoryError
from int8cli.model.forwards import Forward, HeadReachedError, UnitCall, not_streamable
from int8cli.model.sites import (
    Kind,
    Site,
    SiteFinder,
    is_norm,
    linears_of,
    map_tensors,
    mark,
    moved_to,
    product_of,
    tensors_in,
)
from int8cli.model.skeleton import Skeleton
from int8cli.model.units import Unit
from int8cli.results.units import human_bytes

Observer = Callable[[str, Tensor], None]


class LoadedUnit:
    """A unit with its weights in memory, and every sequence waiting in front of it. Call `run` once.

    `linears` are its linear layers except the output head, by their names in the checkpoint. `pass_on(sequence,
    output)` is called with each output. `forwards` are the units' own forwards, by unit name.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        unit: Unit,
        waiting: dict[int, UnitCall],
        forwards: dict[str, Forward],
        device: torch.device,
        pass_on: Callable[[int, Any], None],
    ) -> None:
        self.unit = unit
        self.module: nn.Module = skeleton.module(unit)
        self.done = False
        self.limits = False  # whether the unit limits values (clip_qkv): one run cannot prove what happens at the limit
        self._model = skeleton.model
        self._waiting = waiting
        self._forwards = forwards
        self._device = device
        self._pass_on = pass_on
        head = skeleton.output_head()
        self._weight_name, self._is_sole = skeleton.weight_name, skeleton.is_sole
        self.is_float16 = skeleton.is_float16  # whether the checkpoint has a tensor, by its name, in float16
        self._example: UnitCall | None = None
        self._unused: frozenset[str] = frozenset()
        self._copies = True  # whether the arguments of a call can be copied
        self._modules: dict[nn.Module, str] = {module: name for name, module in self.module.named_modules()}
        self._names = {
            module: skeleton.weight_name(f"{unit.name}.{name}" if name else unit.name)
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
        on_input: Observer | None = None,
        on_linear_output: Observer | None = None,
        on_output: Callable[[Any], None] | None = None,
        repeatable: bool = False,
    ) -> tuple[Site, ...]:
        """Run every sequence through the unit and return the sites found.

        `repeatable`: keep the input of the first sequence, so that `again` can run it once more.
        `order` is a sort key for the sequences' numbers; by default they run in their given order.
        on_sequence(number): before each sequence.
        on_input(site's name, x): once for each input (…, positions, in_features), however many linears share it.
        on_linear_output(linear's name, y): after each linear. on_output(output): the unit's output for a sequence.
        """
        self.done = True
        saw_input, saw_output = self._by_module(on_input), self._by_module(on_linear_output)
        finder = SiteFinder(saw_input)
        sites: tuple[Site, ...] = ()
        with ExitStack() as hooks:
            for linear in self._names:
                hook = linear.register_forward_hook(lambda module, x, y: saw_output(module, product_of(module, x, y)))
                hooks.callback(hook.remove)
            for turn, sequence in enumerate(sorted(self._waiting, key=order)):
                if on_sequence is not None:
                    on_sequence(sequence)
                call = self._waiting.pop(sequence)
                if turn == 0 and repeatable:
                    self._example = self._copied(call)
                output = self._compute(call, finder if turn == 0 else None)
                if turn == 0:
                    self.limits, self._unused = finder.limits, frozenset(finder.unused(self.module))
                    sites = tuple(self._site(*found) for found in finder.found())
                    del finder
                    for linear in (self.linears[site.name] for site in sites):
                        hook = linear.register_forward_pre_hook(lambda module, inputs: saw_input(module, inputs[0]))
                        hooks.callback(hook.remove)
                if on_output is not None and not isinstance(output, HeadReachedError):
                    on_output(output)
                self._pass_on(sequence, output)
                del output  # it may be large, and the sequence no longer needs it here
        return sites

    def owns(self, source: str) -> bool:
        """Whether a tensor of the checkpoint becomes one parameter of this unit, and nothing else in the model."""
        return source in self.unit.sources and self._is_sole(source)

    def again(self) -> Any:
        """What the unit computes, with its weights as they are now, for the sequence that `run` kept.

        That is its output and its arguments afterwards: it may write to them what later blocks read (shared keys).
        """
        assert self._example is not None, "run(repeatable=True) comes first"
        call = self._copied(self._example)
        return self._compute(call, None), call.args, call.kwargs

    def ran_beside(self, names: Sequence[str]) -> bool:
        """Whether `run` used all weights of the smallest module that holds these norms and linears.

        If not, one run does not show all that reads them: the rest may run for other inputs (global attention). Nor
        does it if the unit was called with objects that cannot be copied, and so not be compared.
        """
        if not self._copies:
            return False
        paths = [self._modules[self.module_of(name)].split(".") for name in names]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        prefix = "".join(f"{parts[0]}." for parts in shared)
        return not any(name.startswith(prefix) for name in self._unused)

    def module_of(self, name: str) -> nn.Module:
        """The norm or the linear of this name in the checkpoint."""
        return next(module for module in self._modules if self._name_of(module) == name)

    def _name_of(self, module: nn.Module) -> str:
        inner = self._modules[module]
        return self._weight_name(f"{self.unit.name}.{inner}" if inner else self.unit.name)

    @contextmanager
    def changed(self, change: Callable[[str, Forward], Forward]) -> Iterator[None]:
        """Replace the forward of each linear layer by `change(its name, its forward)` while the context lasts."""
        with ExitStack() as stack:
            for module, name in self._names.items():
                if module is self.module:  # the unit is a linear itself, and its forward is patched
                    original = self._forwards[self.unit.name]
                    self._forwards[self.unit.name] = change(name, original)
                    stack.callback(self._forwards.__setitem__, self.unit.name, original)
                else:
                    module.forward = change(name, module.forward)
                    stack.callback(delattr, module, "forward")
            yield

    def _by_module(self, observer: Observer | None) -> Callable[[nn.Module, Tensor], None]:
        """`observer` as a function of a linear module instead of its name."""

        def observe(linear: nn.Module, values: Tensor) -> None:
            if observer is not None:
                observer(self._names[linear], values)

        return observe

    def _site(self, kind: Kind, in_features: int, linears: list[nn.Module], norm: nn.Module | None) -> Site:
        names = tuple(self._names[linear] for linear in linears)
        norm_name = None if norm is None else self._name_of(norm)
        return Site(names[0], names, kind, self.unit.stack, self.unit.index, in_features, norm_name)

    def _copied(self, call: UnitCall) -> UnitCall:
        """The same call with objects of its own: a block may add to its input in place, or to what blocks share."""
        try:
            return UnitCall(call.unit, *copy.deepcopy((call.args, call.kwargs)))
        except (TypeError, RuntimeError, NotImplementedError):  # locks, generators, tensors with a graph
            self._copies = False
            args, kwargs = map_tensors((call.args, call.kwargs), lambda tensor: tensor.clone())
            return UnitCall(call.unit, args, kwargs)

    def _compute(self, call: UnitCall, finder: SiteFinder | None) -> Any:
        """The unit's output for one sequence, computed on the device of its weights. HeadReachedError is returned."""
        forward = self._forwards[self.unit.name]
        device = torch.device("cpu") if self.unit.mapped else self._device
        args, kwargs = map_tensors((call.args, call.kwargs), lambda tensor: moved_to(tensor, device))
        try:
            with finder.watching(self.module, self.linears.values(), (args, kwargs)) if finder else nullcontext():
                output = forward(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise NotEnoughGpuMemoryError(
                f"{self.unit.name}: {self._device} has too little memory for {human_bytes(self.unit.weight_bytes)} of "
                "weights and one sequence",
                hint="Use shorter sequences, or the CPU.",
            ) from error
        except HeadReachedError as reached:  # the head is part of the unit
            return reached
        except Int8cliError:
            raise
        except Exception as error:
            raise_if_of_the_system(error)
            raise not_streamable(self._model, error, self.unit.name) from error
        for tensor in tensors_in(output):
            if is_norm(self.module) or (finder is not None and finder.made_by_norm(tensor)):
                mark(tensor)
        return map_tensors(output, lambda tensor: moved_to(tensor, self._device))
