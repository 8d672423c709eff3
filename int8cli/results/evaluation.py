"""The results of an evaluation, as objects and as one JSON document.

Owns the definitions: what is compared with what, over which positions. Computes only means of these results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EVALUATION_SCHEMA = "int8cli.evaluation/1"
REFERENCE = "16-bit"  # the key of the unchanged model, in its own dtype


@dataclass(frozen=True, slots=True)
class EvaluatedText:
    """The text, and how much of it was used. `positions` counts those at which the next token was predicted."""

    name: str
    sha256: str
    tokens: int
    sequences: int
    sequence_length: int
    seed: int
    positions: int


@dataclass(frozen=True, slots=True)
class StoredColumnsSummary:
    """The outlier columns that are stored with the weights.

    `limit` is the most columns of one linear layer; None if they are those of a converted model. `text` and `tokens`:
    what they were calibrated on; empty and 0 if unknown. `mean_columns`: how many a layer has on average.
    """

    limit: int | None
    text: str
    text_sha256: str
    tokens: int
    mean_columns: float


@dataclass(frozen=True, slots=True)
class Scores:
    """How well a method predicts the text, over all positions of all sequences.

    `nats`: the mean negative log-likelihood of the tokens; `perplexity` is exp(nats). The others compare a method
    with the 16-bit model on the same sequences. They are None for that model itself, and if it was not run:
    `nats_over_reference`, the difference of nats; `standard_error`, its standard error over sequences (None with fewer
    than two); `kl_divergence`, the mean over positions of KL(16 bit ‖ method) in nats; `same_top_share`, the share of
    positions where the most likely token is the same.
    """

    nats: float
    nats_by_sequence: tuple[float, ...]
    nats_over_reference: float | None = None
    standard_error: float | None = None
    kl_divergence: float | None = None
    same_top_share: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nats); infinite if that overflows a float."""
        return math.exp(self.nats) if self.nats < 709.0 else math.inf


@dataclass(frozen=True, slots=True)
class LayerError:
    """The output error of one linear layer, ‖Y_method - Y‖ / ‖Y‖ over all its inputs, Y = X Wᵀ without the bias.

    X is the layer's input in the 16-bit model, without the errors of earlier layers. `kind` is the kind of its input
    (norm-fed, attention output, second feed-forward). `stack` and `layer` place its block; None outside the blocks.
    """

    name: str
    kind: str
    stack: str | None
    layer: int | None
    error: float


@dataclass(frozen=True, slots=True)
class MethodResult:
    """The results of one method. `key` identifies it, `label` is for people.

    `scores` is None for models that predict no next token. `layers`, in the model's order, is empty for the 16-bit
    model, and if there is no 16-bit model to compare with.
    """

    key: str
    label: str
    scores: Scores | None
    layers: tuple[LayerError, ...]

    @property
    def mean_error(self) -> float | None:
        """The mean of the layers' errors."""
        return sum(layer.error for layer in self.layers) / len(self.layers) if self.layers else None

    @property
    def worst_layer(self) -> LayerError | None:
        return max(self.layers, key=lambda layer: layer.error, default=None)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All methods on one model and text, in the order of the table. The 16-bit model comes first, if it was run.

    `converted`: the int8 tensors are those of a converted model, named `model`; `reference` is then the 16-bit model
    that was given, or None. `int8_layers` counts the linear layers that the methods compute in int8. `error_tokens`
    counts the tokens on which the layers' errors were measured. `notes` are sentences for the reader. `seconds` is the
    time of the whole evaluation, the calibration included. `inputs`: how loaders quantize the inputs of a converted
    model in the layout compressed-tensors. `smooth`: the scales of the smoothed methods, "exact" powers of two or
    "fine" steps of 2^(1/4); None without such methods.
    """

    model: str
    revision: str | None
    converted: bool
    reference: str | None
    dtype: str
    text: EvaluatedText
    threshold: float
    columns: StoredColumnsSummary | None
    int8_layers: int
    error_tokens: int
    methods: tuple[MethodResult, ...]
    notes: tuple[str, ...]
    seconds: float
    inputs: str = "absmax"
    smooth: str | None = None

    def method(self, key: str) -> MethodResult | None:
        return next((method for method in self.methods if method.key == key), None)

    @property
    def predicts(self) -> bool:
        """Whether there are perplexities. An encoder has only output errors."""
        return any(method.scores is not None for method in self.methods)


def evaluation_to_json(found: Evaluation) -> dict[str, Any]:
    """One JSON document. Numbers are not rounded; NaN and infinities become null."""
    text, columns = found.text, found.columns
    return {
        "schema": EVALUATION_SCHEMA,
        "model": found.model,
        "revision": found.revision,
        "converted": found.converted,
        "reference": found.reference,
        "dtype": found.dtype,
        "text": {"name": text.name, "sha256": text.sha256},
        "tokens": text.tokens,
        "sequences": text.sequences,
        "sequence_length": text.sequence_length,
        "seed": text.seed,
        "positions": text.positions,
        "threshold": found.threshold,
        "stored_columns": None
        if columns is None
        else {
            "limit": columns.limit,
            "mean": columns.mean_columns,
            "text": {"name": columns.text, "sha256": columns.text_sha256},
            "tokens": columns.tokens,
        },
        "smooth": found.smooth,
        "int8_layers": found.int8_layers,
        "error_tokens": found.error_tokens,
        "methods": [_method_to_json(method) for method in found.methods],
        "notes": list(found.notes),
        "seconds": found.seconds,
    }


def _method_to_json(method: MethodResult) -> dict[str, Any]:
    worst = method.worst_layer
    return {
        "key": method.key,
        "label": method.label,
        "scores": None if method.scores is None else _scores_to_json(method.scores),
        "mean_error": _number(method.mean_error),
        "worst_layer": None if worst is None else worst.name,
        "worst_error": None if worst is None else _number(worst.error),
        "layers": [_layer_to_json(layer) for layer in method.layers],
    }


def _scores_to_json(scores: Scores) -> dict[str, Any]:
    return {
        "perplexity": _number(scores.perplexity),
        "nats": _number(scores.nats),
        "nats_by_sequence": _numbers(scores.nats_by_sequence),
        "nats_over_reference": _number(scores.nats_over_reference),
        "standard_error": _number(scores.standard_error),
        "kl_divergence": _number(scores.kl_divergence),
        "same_top_share": _number(scores.same_top_share),
    }


def _layer_to_json(layer: LayerError) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "stack": layer.stack,
        "layer": layer.layer,
        "error": _number(layer.error),
    }


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
