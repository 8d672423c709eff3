"""One unit of the model under evaluation. Its linear layers switch from method to method while sequences run.

Owns the switching, the order of the sequences, and the output error of each layer. The sequences of the 16-bit model
run first. The weights for a method are made once, and freed after its last sequence.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from int8cli.evaluation.layers import ErrorMeter, Layer
from int8cli.evaluation.methods import Method
from int8cli.model.forwards import Forward
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import Site
from int8cli.results.evaluation import LayerError


@dataclass(frozen=True, slots=True)
class LayerSums:
    """The sums for one layer: ‖Y‖² in 16 bit, and ‖Y_method - Y‖² for each other method, in their order."""

    name: str
    kind: str
    stack: str | None
    layer: int | None
    energy: float
    squares: tuple[float, ...]


def added_sums(before: Sequence[LayerSums], now: Sequence[LayerSums]) -> tuple[LayerSums, ...]:
    """The sums of a unit that is called several times in a forward pass: `now`, plus those of earlier calls."""
    earlier = {layer.name: layer for layer in before}
    return tuple(
        replace(
            layer,
            energy=layer.energy + earlier[layer.name].energy,
            squares=tuple(map(sum, zip(layer.squares, earlier[layer.name].squares, strict=True))),
        )
        if layer.name in earlier
        else layer
        for layer in now
    )


def layer_errors(layers: Sequence[LayerSums], place: int) -> tuple[LayerError, ...]:
    """The relative errors by the compared method with index `place`. Layers with zero output have none."""
    return tuple(
        LayerError(sums.name, sums.kind, sums.stack, sums.layer, math.sqrt(sums.squares[place] / sums.energy))
        for sums in layers
        if sums.energy > 0.0
    )


@dataclass(frozen=True, slots=True)
class Trajectories:
    """The sequences of the engine: all methods on the first passage, then all methods on the second, and so on.

    The errors of layers are measured on the 16-bit inputs of the first `measured` passages.
    """

    methods: tuple[Method, ...]
    passages: int
    measured: int

    @property
    def count(self) -> int:
        return self.passages * len(self.methods)

    def place(self, sequence: int) -> tuple[int, int]:
        """The indices of the passage and the method of a sequence."""
        return divmod(sequence, len(self.methods))

    def by_method(self, sequence: int) -> tuple[int, int]:
        """A sort key that groups sequences by method."""
        passage, method = self.place(sequence)
        return method, passage


class UnitEvaluation:
    """A loaded unit and its int8 layers, by their names in `loaded.linears`.

    `compared` are the methods whose output errors are measured. It is empty without the 16-bit weights.
    """

    def __init__(
        self,
        loaded: LoadedUnit,
        layers: Mapping[str, Layer],
        trajectories: Trajectories,
        compared: Sequence[Method],
    ) -> None:
        self._loaded, self._layers = loaded, layers
        self._trajectories, self._compared = trajectories, compared
        self._method = trajectories.methods[0]
        self._measuring = False
        self._meters = {name: ErrorMeter() for name in layers} if compared else {}
        self._last: tuple[Tensor, Tensor] | None = None

    def run(self, *, has_head: bool, on_output: Callable[[Any], None]) -> tuple[LayerSums, ...]:
        """Run every sequence, and return the sums for the errors of layers.

        Sequences are grouped by method, except in the unit with the output head: its logits are compared passage by
        passage.
        """
        order = None if has_head or not self._layers else self._trajectories.by_method
        with self._loaded.changed(self._switched):
            sites = self._loaded.run(order=order, on_sequence=self._turn_to, on_output=on_output)
        self._last = None
        return tuple(self._measured(sites))

    def _turn_to(self, sequence: int) -> None:
        passage, place = self._trajectories.place(sequence)
        method = self._trajectories.methods[place]
        if method is not self._method:
            self._forget()
        self._method = method
        self._measuring = method.product is None and passage < self._trajectories.measured

    def _switched(self, name: str, original: Forward) -> Forward:
        """A forward for a layer that computes the product of the current method."""
        if name not in self._layers:
            return original
        layer = self._layers[name]
        bias = getattr(self._loaded.linears[name], "bias", None)

        def forward(inputs: Tensor) -> Any:
            product = self._method.product
            if product is None or not inputs.numel():
                if self._measuring and self._meters:
                    self._meters[name].record(layer.given(self._copied(inputs)), layer.weight)
                return original(inputs)
            output = product(layer, layer.given(inputs.reshape(-1, inputs.shape[-1])), bias)
            return output.to(inputs.dtype).reshape(*inputs.shape[:-1], -1)

        return forward

    def _copied(self, inputs: Tensor) -> Tensor:
        """A copy of a layer's input as (tokens, in); layers that share an input share the copy."""
        if self._last is None or self._last[0] is not inputs:
            self._last = (inputs, inputs.reshape(-1, inputs.shape[-1]).clone())
        return self._last[1]

    def _measured(self, sites: Sequence[Site]) -> Iterator[LayerSums]:
        """The error of each layer by each method, on the recorded inputs."""
        kinds = {name: site.kind for site in sites for name in site.linears}
        squares: dict[str, list[float]] = {name: [] for name, meter in self._meters.items() if meter.inputs}
        for method in self._compared if squares else ():
            product = method.product
            assert product is not None
            self._forget()
            for name, found in squares.items():
                layer, meter = self._layers[name], self._meters[name]
                found.append(meter.squared_error(product(layer, inputs, None) for inputs in meter.inputs))
        self._forget()
        unit = self._loaded.unit
        for name, found in squares.items():
            energy = self._meters[name].energy
            yield LayerSums(name, kinds.get(name, ""), unit.stack, unit.index, energy, tuple(found))

    def _forget(self) -> None:
        for layer in self._layers.values():
            layer.forget()
