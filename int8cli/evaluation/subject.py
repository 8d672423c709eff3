"""The model to evaluate: a 16- or 32-bit model, or a converted model with or without the model it was made from.

Owns which tensors the running model uses, and which of its linear layers the methods compute in int8.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from int8cli.checkpoint.config_file import CONFIG_FILE, read_config
from int8cli.checkpoint.source import Source
from int8cli.checkpoint.tensor import ShardContents, TensorSpec
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.checkpoint.weight_files import WeightFiles, find_weights, read_headers
from int8cli.errors import CheckpointError, NothingToQuantizeError, ReferenceModelError, UnsupportedModelError
from int8cli.llm_int8.inputs import THRESHOLD
from int8cli.planning.decisions import Plan, PlanOptions
from int8cli.planning.experts import were_fused
from int8cli.planning.layouts import LAYOUTS_BY_KEY
from int8cli.planning.survey import Survey, survey_source
from int8cli.runtime.converted import Converted, ConvertedTensors, find_converted
from int8cli.typed_json import InvalidJsonError, read_as

_WEIGHT = ".weight"
_THRESHOLD_FIELD = "llm_int8_threshold"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to evaluate. `source` is the model that the user named, `runs` the model whose weights are run.

    `survey` is that of the 16-bit model, None without one. `specs` are the tensors of the running model, `modules` its
    linear layers that are or become int8, by their names in the checkpoint. `threshold` is the outlier threshold in a
    converted model's config.json, `inputs` how it asks loaders to quantize inputs.
    """

    source: Source
    runs: Source
    weights: WeightFiles
    shards: tuple[ShardContents, ...]
    specs: Mapping[str, TensorSpec]
    modules: frozenset[str]
    survey: Survey | None
    converted: Converted | None
    threshold: float = THRESHOLD
    inputs: str = "absmax"

    @property
    def has_reference(self) -> bool:
        """Whether the 16-bit weights are available."""
        return self.survey is not None

    @property
    def has_columns(self) -> bool:
        """Whether the conversion has stored columns."""
        return self.converted is not None and bool(self.converted.sidecars)

    def open_tensors(self) -> CheckpointTensors:
        """The tensors of the running model."""
        if self.survey is None and self.converted is not None:
            return ConvertedTensors(self.runs, self.converted)
        return CheckpointTensors(self.runs, self.shards)

    def open_int8(self) -> ConvertedTensors | None:
        """The int8 tensors of a converted model; None for a 16-bit model, which the methods quantize themselves."""
        return None if self.converted is None else ConvertedTensors(self.source, self.converted)


def find_subject(source: Source, reference: Source | None) -> Subject:
    """Read the headers of the model to evaluate. `reference` is the 16-bit model that a converted one was made from.

    Raises the errors of a bad checkpoint, ReferenceModelError if there is a reference but the model is not converted or
    was made from another model, NothingToQuantizeError if no layer can become int8.
    """
    weights = find_weights(source)
    shards = read_headers(source, weights)
    converted = find_converted(source, shards)
    if converted is None:
        if reference is not None:
            raise ReferenceModelError(
                f"{source.identity.name} is not a converted model, so there is nothing to compare with a source",
                hint="Leave the source out: methods are compared with this model in 16 bit.",
            )
        survey = survey_source(source, PlanOptions())
        return _with_floats(source, source, survey, _planned(survey), None)
    _require_known_experts(source, converted)
    if reference is None:
        threshold = _threshold(source)
        of_model = weights, shards, converted.specs, converted.modules
        return Subject(source, source, *of_model, None, converted, threshold, _inputs(source))
    survey = survey_source(reference, PlanOptions())
    _require_same(source, survey, converted)
    return _with_floats(source, reference, survey, converted.modules, converted)


def _require_known_experts(source: Source, converted: Converted) -> None:
    """Raise UnsupportedModelError for experts that convert split and that the model's class has only fused."""
    config = read_config(source) if CONFIG_FILE in source.list_files() else {}
    if were_fused(converted.specs, config):
        raise UnsupportedModelError(
            f"{source.identity.name} has experts one by one that its source fused in one tensor, and the model that "
            "evaluates them has them only fused",
            hint="Evaluate the 16-bit model, or a conversion in the bitsandbytes layout. load_model runs this one.",
        )


def _with_floats(
    source: Source, runs: Source, survey: Survey, modules: frozenset[str], converted: Converted | None
) -> Subject:
    specs = {stored.spec.name: stored.spec for contents in survey.shards for stored in contents.tensors}
    threshold = _threshold(source) if converted else THRESHOLD
    inputs = _inputs(source) if converted else "absmax"
    return Subject(source, runs, survey.weights, survey.shards, specs, modules, survey, converted, threshold, inputs)


def _inputs(source: Source) -> str:
    """How config.json asks loaders to quantize inputs."""
    declared = read_config(source).get("quantization_config") if CONFIG_FILE in source.list_files() else None
    groups = declared.get("config_groups") if isinstance(declared, Mapping) else None
    known = (
        layout.INPUTS
        for layout in LAYOUTS_BY_KEY.values()
        if groups is not None and layout.quantization_config(Plan(()), 0.0).get("config_groups") == groups
    )
    return next(known, "absmax")


def _threshold(source: Source) -> float:
    """The outlier threshold in config.json, or the default."""
    if CONFIG_FILE not in source.list_files():
        return THRESHOLD
    declared = read_config(source).get("quantization_config")
    if not isinstance(declared, Mapping) or _THRESHOLD_FIELD not in declared:
        return THRESHOLD
    try:
        return read_as(float, declared[_THRESHOLD_FIELD])
    except InvalidJsonError as error:
        raise CheckpointError(f"{CONFIG_FILE}: quantization_config.{_THRESHOLD_FIELD} {error}") from error


def _planned(survey: Survey) -> frozenset[str]:
    names = [decision.spec.name for decision in survey.plan.quantized]
    found = frozenset(name.removesuffix(_WEIGHT) for name in names if name.endswith(_WEIGHT))
    if not found:
        raise NothingToQuantizeError(
            f"{survey.identity.name} has no linear layer to quantize", hint="A conversion plan shows the reasons."
        )
    return found


def _require_same(source: Source, survey: Survey, converted: Converted) -> None:
    """Raise ReferenceModelError unless the 16-bit model has each int8 weight, in the same shape or transposed."""
    specs = {stored.spec.name: stored.spec for contents in survey.shards for stored in contents.tensors}
    for name in converted.scales:
        shape = converted.specs[name].shape
        if name not in specs or specs[name].shape not in (shape, shape[::-1]):
            raise ReferenceModelError(
                f"{survey.identity.name} is not the source of {source.identity.name}: "
                f"{name} {'is missing' if name not in specs else 'has a different shape'}",
                hint="Give the 16- or 32-bit model that was converted.",
            )
