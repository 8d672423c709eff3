"""Output layouts: the names, dtypes and config keys that each loader expects.

A layout is a module that satisfies `Layout`. In every layout, a quantized `X.weight` becomes its int8 data (out, in),
one scale for each row, and marks, whose bytes follow from its name and shape.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.planning.decisions import Acceptance, Plan
from int8cli.planning.layouts import bitsandbytes, compressed_tensors, weights_only, zero_points


class Layout(Protocol):
    """The tensors of a quantized weight in an output, and its entries in config.json."""

    NAME: str  # that of the format
    KEY: str  # its own: two layouts of one format differ in how loaders quantize inputs
    INPUTS: str
    ACCEPTS: Acceptance  # which layers its loaders support in int8
    SCALES: Literal["row_absmax", "step"]  # row_absmax undivided, or the quantization step row_absmax / 127
    PACKED: bool  # whether the data is unsigned, data + 128, in words of int32
    AS_ON_LOAD: bool  # whether the int8 weights are those that loaders make of the same source
    SKIP_KEY: str  # the key of quantization_config that lists what was left alone

    def quantized_specs(self, source: TensorSpec, *, transpose: bool) -> tuple[TensorSpec, ...]:
        """The output's tensors for a weight, int8 data first. `transpose`: the source is (in, out)."""

    def data_name(self, weight_name: str) -> str: ...

    def scale_name(self, weight_name: str) -> str: ...

    def marks(self, weight_name: str, shape: tuple[int, ...]) -> Mapping[str, bytes]:
        """Further tensors, with their bytes; `shape` is (out_features, in_features)."""

    def quantization_config(self, plan: Plan, threshold: float) -> dict[str, Any]:
        """The `quantization_config` of config.json."""

    def transformers_reads(self, tensor_names: Iterable[str]) -> bool:
        """Whether transformers loads a model of these tensors in this layout."""

    def caveats(self, plan: Plan, config: Mapping[str, Any]) -> Iterator[str]:
        """What a user should know about loading the result of this plan of a model with this config.json."""

    def leaves_alone(self, entry: str, module: str) -> bool:
        """Whether the loaders leave `module` alone because of an entry under `SKIP_KEY`."""


# Each format's own layout, by name; and every layout, by key.
LAYOUTS: Mapping[str, Layout] = {layout.NAME: layout for layout in (bitsandbytes, compressed_tensors)}
LAYOUTS_BY_KEY: Mapping[str, Layout] = {
    layout.KEY: layout for layout in (bitsandbytes, compressed_tensors, zero_points, weights_only)
}


def layout_of(name: str, inputs: str) -> Layout | None:
    """The layout of a format whose loaders quantize inputs so; None if there is none."""
    found = (layout for layout in LAYOUTS_BY_KEY.values() if (name, inputs) == (layout.NAME, layout.INPUTS))
    return next(found, None)
