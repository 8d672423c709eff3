"""One unit of the model under evaluation: its linear layers switched from method to method while sequences pass.

Owns the switching, the order in which sequences pass, and the output error of each layer. The 16-bit model's sequences
come first; a method's forms of the weights are made once and forgotten after its last sequence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from int8cli.evaluation.layers import ErrorMeter, Layer
from int8cli.evaluation.methods import Method
from int8cli.model.forwards import Forward
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import Site


@dataclass(frozen=True, slots=True)
class LayerSums:
    """Of one layer: ‖Y‖² in 16 bit, and ‖Y_method - Y‖² for each method but the 16-bit model, in their order."""

    name: str
    kind: str
    stack: str | None
    layer: int | None
    energy: float
    squares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Trajectories:
    """The sequences of the engine: every passage once by each of `methods`, passage after passage.

    `measured` is the number of passages, from the first, whose 16-bit inputs the layers' errors are measured on.
    """

    methods: tuple[Method, ...]
    passages: int
    measured: int

    @property
    def count(self) -> int:
        return self.passages * len(self.methods)

    def place(self, sequence: int) -> tuple[int, int]:
        """The passage and the method of one of the engine's sequences, both by their place."""
        return divmod(sequence, len(self.methods))

    def by_method(self, sequence: int) -> tuple[int, int]:
        """A sort key that brings all passages of a method together."""
        passage, method = self.place(sequence)
        return method, passage


class UnitEvaluation:
    """A loaded unit and its int8 layers, by the names of `loaded.linears`.

    `compared` are the methods whose output errors are measured; none without the 16-bit weights.
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
        """Bring every sequence through. A unit with the output head keeps their order: logits are compared as they
        come. Returns what the layers' errors are made of."""
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
        """A layer's forward that computes what the method of the turn computes."""
        if name not in self._layers:
            return original
        layer = self._layers[name]
        bias = getattr(self._loaded.linears[name], "bias", None)

        def forward(inputs: Tensor) -> Any:
            product = self._method.product
            if product is None or not inputs.numel():
                if self._measuring and self._meters:
                    self._meters[name].take(self._copied(inputs), layer.weight)
                return original(inputs)
            output = product(layer, inputs.reshape(-1, inputs.shape[-1]), bias)
            return output.to(inputs.dtype).reshape(*inputs.shape[:-1], -1)

        return forward

    def _copied(self, inputs: Tensor) -> Tensor:
        """A copy of a layer's input as (tokens, in); layers that share an input share the copy."""
        if self._last is None or self._last[0] is not inputs:
            self._last = (inputs, inputs.reshape(-1, inputs.shape[-1]).clone())
        return self._last[1]

    def _measured(self, sites: Sequence[Site]) -> Iterator[LayerSums]:
        """Each layer's error by each method, on the inputs that were taken down."""
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
