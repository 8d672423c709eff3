"""What a conversion set out to do: `int8/conversion.json`.

Owns the settings that decide the bytes of an output, and the schema of the file. Reads and writes nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from int8cli.checkpoint.source import SourceIdentity
from int8cli.llm_int8.limits import EXACT_STEPS, FINE_STEPS, Steps
from int8cli.records.documents import check_file_name, check_shard_name, without_schema
from int8cli.typed_json import InvalidJsonError, read_as

CONVERSION_SCHEMA = "int8cli.conversion/1"
VIA_FLOAT16 = "float16"  # a value of Settings.float32
# The values of Settings.outliers: where the choice of the stored columns comes from.
NO_OUTLIERS = "none"
FROM_ACTIVATIONS = "activations"
FROM_STATISTICS = "statistics"
FROM_WEIGHTS = "weights"
# The values of Settings.smooth: nothing, by powers of two, in finer steps.
NO_SMOOTHING = "none"
EXACT_SMOOTHING = "exact"
FINE_SMOOTHING = "fine"
STEPS: Mapping[str, Steps] = {EXACT_SMOOTHING: EXACT_STEPS, FINE_SMOOTHING: FINE_STEPS}
# Values of Settings.inputs: the default, and inputs that stay in 16 bit.
ABSMAX_INPUTS = "absmax"
WEIGHTS_ONLY = "none"


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the bytes of an output. Two runs with equal settings on one source write the same files.

    `outliers` is the strategy that chooses the stored columns ("none" where none are stored), `outlier_columns` the
    most columns of one linear. With an `outlier_budget`, all linears together store no more than this share of the
    output's bytes, and one linear has no limit of its own. `calibration` names the text and how much of it is used, or
    the statistics. `figures`: whether the error of every layer is measured. `smooth`: whether what the calibration
    proved is smoothed, and by which scales. `inputs` says how loaders quantize inputs, where the layout leaves that
    open.
    """

    layout: str
    threshold: float
    skip: tuple[str, ...]
    only: tuple[str, ...]
    float32: str
    outliers: str = NO_OUTLIERS
    outlier_columns: int = 0
    calibration: str = ""
    figures: bool = True
    smooth: str = NO_SMOOTHING
    inputs: str = ABSMAX_INPUTS
    outlier_budget: float = 0.0

    @property
    def most_columns(self) -> int | None:
        """The most stored columns of one linear; None if there is only a limit for all of them."""
        return None if self.outlier_budget else self.outlier_columns


def budget_bytes(share: float, output_bytes: int) -> int:
    """The bytes that stored columns may take together, beside output shards of so many bytes."""
    return int(share * output_bytes)


@dataclass(frozen=True, slots=True)
class ShardSource:
    """One shard to convert: its file in the source, a fingerprint of its content, and its file in the output."""

    file: str
    size_bytes: int
    fingerprint: str
    output: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is converted, how, and every file that it will write to the output directory (relative names).

    `plan` is a digest of all planned headers. It differs if config.json or this version of int8cli plans differently.
    """

    source: SourceIdentity
    settings: Settings
    plan: str
    shards: tuple[ShardSource, ...]
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": CONVERSION_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, document: Any) -> "Conversion":
        """Raises InvalidJsonError for values or file names that no conversion has."""
        found = read_as(cls, without_schema(document, CONVERSION_SCHEMA))
        for index, shard in enumerate(found.shards):
            check_shard_name(shard.output, f"shards[{index}].output")
        for index, name in enumerate(found.files):
            check_file_name(name, f"files[{index}]")
        if len({shard.output for shard in found.shards}) != len(found.shards):
            raise InvalidJsonError("has one output for two of them", "shards")
        return found

    def first_difference(self, other: "Conversion") -> tuple[str, object, object]:
        """The first setting or input in which two unequal conversions differ, with its value here and in the other."""
        here, there = _comparable(self), _comparable(other)
        name = next(name for name in there if here.get(name) != there[name])
        return name, here.get(name), there[name]


def _comparable(conversion: Conversion) -> dict[str, object]:
    """The names and values that describe a difference to a user, the plainest first."""
    fields: dict[str, object] = {"model": conversion.source.name, "revision": conversion.source.revision}
    fields.update(asdict(conversion.settings))
    fields["on_hub"] = conversion.source.on_hub
    for shard in conversion.shards:
        fields[f"source shard {shard.file}"] = f"{shard.size_bytes:,} bytes, {shard.fingerprint}"
    fields["plan (made from config.json by this version of int8cli)"] = conversion.plan
    fields["shards"] = [shard.output for shard in conversion.shards]
    fields["files"] = list(conversion.files)
    return fields
