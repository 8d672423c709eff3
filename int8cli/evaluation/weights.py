"""The int8 layers of a loaded unit: which of its linears are one, and the weights that each is given.

Owns where a layer's weights come from: the unit's own 16-bit weight, a converted model's int8 tensors, chosen columns.
"""

import torch
from torch import nn

from int8cli.errors import NonFiniteError
from int8cli.evaluation.columns import ChosenColumns
from int8cli.evaluation.layers import Layer
from int8cli.evaluation.subject import Subject
from int8cli.model.loaded_unit import LoadedUnit
from int8cli.model.sites import weight_of
from int8cli.runtime.converted import ConvertedTensors, ExactColumns, Int8Data


class LayerWeights:
    """Makes the layers of units.

    `int8` are a converted model's own tensors, `columns` those chosen for a 16-bit one.
    """

    def __init__(
        self, subject: Subject, int8: ConvertedTensors | None, columns: ChosenColumns | None, threshold: float
    ) -> None:
        self._subject, self._int8, self._threshold = subject, int8, threshold
        self._columns = columns
        if int8 is not None:
            int8.expect(int8.names_of(sorted(subject.modules)))

    def layers(self, loaded: LoadedUnit) -> dict[str, Layer]:
        """By name, those of the unit's linears that are int8. Raises NonFiniteError."""
        names = [name for name in loaded.linears if name in self._subject.modules]
        return {name: self._layer(name, loaded.linears[name]) for name in names}

    def release(self, loaded: LoadedUnit) -> None:
        """Done with a unit's int8 tensors."""
        if self._int8 is not None:
            self._int8.release(self._int8.names_of([name for name in loaded.linears if name in self._subject.modules]))

    def _layer(self, name: str, module: nn.Module) -> Layer:
        weight = weight_of(module)
        low, high = weight.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteError(
                f"{name}: its weight contains NaN or infinity",
                hint="The checkpoint is damaged there: download the file again.",
            )
        stored = exact_columns = None
        if self._int8 is not None:
            found, beside = self._int8.int8(name), self._int8.exact_columns(name)
            stored = Int8Data(found.data.to(weight.device), found.row_absmax.to(weight.device))
            exact_columns = beside and ExactColumns(beside.columns.to(weight.device), beside.weight.to(weight.device))
        elif self._columns is not None:
            columns = torch.tensor(self._columns.by_layer.get(name, ()), dtype=torch.int64, device=weight.device)
            exact_columns = ExactColumns(columns, weight[:, columns])
        exact = weight if self._subject.has_reference else None
        return Layer(name, exact, stored=stored, exact_columns=exact_columns, threshold=self._threshold)
