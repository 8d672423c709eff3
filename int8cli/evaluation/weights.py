"""The int8 layers of a loaded unit, with the weights of each.

Owns where the weights of a layer come from: the 16-bit weight of the unit, the int8 tensors of a converted model, and
the chosen columns.
"""

import torch
from torch import Tensor

from int8cli.errors import NonFiniteError
from int8cli.evaluation.columns import ChosenColumns, SmoothedColumns
from int8cli.evaluation.layers import Layer, SmoothedLayer
from int8cli.evaluation.subject import Subject
from int8cli.llm_int8.limits import EXACT_STEPS, Steps
from int8cli.llm_int8.scales import scaled, scales
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import weight_of
from int8cli.runtime.converted_tensors import ConvertedTensors, ExactColumns, Int8Data


class LayerWeights:
    """Makes the layers of each unit.

    `int8` has the tensors of a converted model, `columns` the columns chosen for a 16-bit model.
    """

    def __init__(
        self, subject: Subject, int8: ConvertedTensors | None, columns: ChosenColumns | None, threshold: float
    ) -> None:
        self._subject, self._int8, self._threshold = subject, int8, threshold
        self._columns = columns
        if int8 is not None:
            int8.expect(int8.names_of(sorted(subject.modules)))

    def layers(self, loaded: LoadedUnit) -> dict[str, Layer]:
        """The int8 layers of a unit, by name. Raises NonFiniteError for a weight with NaN or infinity."""
        names = [name for name in loaded.linears if name in self._subject.modules]
        return {name: self._layer(name, loaded) for name in names}

    def release(self, loaded: LoadedUnit) -> None:
        """Release the int8 tensors of a unit."""
        if self._int8 is not None:
            self._int8.release(self._int8.names_of([name for name in loaded.linears if name in self._subject.modules]))

    def _layer(self, name: str, loaded: LoadedUnit) -> Layer:
        weight = weight_of(loaded.linears[name])
        low, high = weight.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteError(
                f"{name}: its weight contains NaN or infinity",
                hint="The checkpoint is damaged there: download the file again.",
            )
        stored = exact_columns = None
        if self._int8 is not None:
            stored, exact_columns = self._converted(self._int8, name, weight.device)
        elif self._columns is not None:
            columns = torch.tensor(self._columns.by_layer.get(name, ()), dtype=torch.int64, device=weight.device)
            exact_columns = ExactColumns(columns, weight[:, columns])
        reference = weight if self._subject.has_reference else None
        return Layer(
            name,
            reference,
            stored=stored,
            exact_columns=exact_columns,
            threshold=self._threshold,
            smoothing=self._smoothing(name, loaded, weight.device),
            columns_of_stored=self._columns_of_stored(name, weight.device),
        )

    def _converted(
        self, int8: ConvertedTensors, name: str, device: torch.device
    ) -> tuple[Int8Data, ExactColumns | None]:
        """The int8 data and exact columns of a layer. With the source's model around it, rows have the source's size:
        what they make is not divided there."""
        data, exact = int8.int8(name), int8.exact_columns(name)
        exponents = int8.exponents(f"{name}.weight")
        absmax, weight = data.row_absmax, None if exact is None else exact.weight
        if exponents.rows is not None and self._subject.has_reference:
            rows, steps = exponents.rows, exponents.steps
            absmax = scaled(absmax[:, None], steps, rows=rows, undo=True)[:, 0]
            weight = None if weight is None else scaled(weight, steps, rows=rows, undo=True)
        columns = None
        if exact is not None and weight is not None:
            columns = ExactColumns(exact.columns.to(device), weight.to(device))
        return Int8Data(data.data.to(device), absmax.to(device)), columns

    def _columns_of_stored(self, name: str, device: torch.device) -> tuple[Tensor, Steps] | None:
        """The exponents of a converted layer's columns, for inputs of the source's model, which are not divided."""
        if self._int8 is None or not self._subject.has_reference:
            return None
        exponents = self._int8.exponents(f"{name}.weight")
        return None if exponents.columns is None else (exponents.columns.to(device), exponents.steps)

    def _smoothing(self, name: str, loaded: LoadedUnit, device: torch.device) -> SmoothedLayer | None:
        found = None if self._columns is None else (self._columns.smoothing or {}).get(name)
        if found is None:
            return None
        columns, exponents = torch.tensor(found.stored, dtype=torch.int64, device=device), found.exponents.to(device)
        return SmoothedLayer(exponents, columns, found.steps, _divisors(found, exponents, loaded))


def _divisors(smoothing: SmoothedColumns, exponents: Tensor, loaded: LoadedUnit) -> Tensor:
    """What a layer's inputs are divided by in the smoothed model: the scales or, where a norm makes them, the quotient
    of its gains, of which the smoothed ones are rounded to their dtype. float32 (in,)."""
    divisors = scales(exponents, smoothing.steps)
    gain = next((name for name in smoothing.scaled if name.endswith(".weight")), "")
    producer = gain.removesuffix(".weight")
    if smoothing.steps == EXACT_STEPS or not gain or producer in loaded.linears:
        return divisors
    before = loaded.module_of(producer).get_parameter("weight").detach()
    after = scaled(before[:, None], smoothing.steps, rows=-exponents)[:, 0]
    return torch.where(after == 0, divisors, before.float() / after.float())
