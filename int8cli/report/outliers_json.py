"""Outlier statistics and suspects as one JSON document each. `schema` names the format; numbers are not rounded."""

from typing import Any

from int8cli.llm_int8.inputs import InputSummary
from int8cli.outliers.statistics import LinearStatistics, OutlierStatistics, SiteStatistics
from int8cli.outliers.suspects import (
    MEASURED_AVERAGE_PRECISION,
    MEASURED_ON,
    MEASURED_PRECISION_OF_ALL,
    WeightSuspects,
)

OUTLIERS_SCHEMA = "int8cli.outliers/1"
LARGEST_DIMENSIONS = 16


def statistics_to_json(statistics: OutlierStatistics) -> dict[str, Any]:
    """Features, massive activations and sites, and the dimensions of each site with the largest |x|.

    The statistics of all dimensions are in the statistics file only.
    """
    of = statistics.provenance
    return {
        "schema": OUTLIERS_SCHEMA,
        "from": "activations",
        "model": of.model,
        "revision": of.revision,
        "dtype": of.dtype,
        "text": {"name": of.text, "sha256": of.text_sha256},
        "tokens": of.tokens,
        "sequence_length": of.sequence_length,
        "seed": of.seed,
        "threshold": of.threshold,
        "features": [
            {
                "dimension": located.feature.dimension,
                "stack": located.stack,
                "layers": list(located.layers),
                "layer_count": located.layer_count,
                "position_share": located.feature.position_share,
                "peak_position_share": located.feature.peak_share,
                "largest": located.feature.largest,
                "sign": located.feature.sign,
            }
            for located in statistics.features()
        ],
        "massive_activations": [
            {
                "site": located.site.name,
                "kind": located.site.kind,
                "layer": located.site.layer,
                "dimension": located.activation.dimension,
                "value": located.activation.value,
                "position": located.activation.position,
                "largest_after_first_position": located.activation.later,
            }
            for located in statistics.massive()
        ],
        "sites": [_site(site) for site in statistics.sites],
    }


def suspects_to_json(found: WeightSuspects) -> dict[str, Any]:
    """The suspects, with their measured precision."""
    return {
        "schema": OUTLIERS_SCHEMA,
        "from": "weights",
        "model": found.model,
        "revision": found.revision,
        "suspects_measured": {
            "average_precision": MEASURED_AVERAGE_PRECISION,
            "precision_of_all_suspects": MEASURED_PRECISION_OF_ALL,
            "on": MEASURED_ON,
        },
        "suspects": [
            {
                "dimension": suspect.dimension,
                "predicted_score": suspect.score,
                "layers": list(suspect.layers),
                "layer_count": suspect.layer_count,
            }
            for suspect in found.suspects
        ],
    }


def _site(site: SiteStatistics) -> dict[str, Any]:
    inputs = site.inputs
    absmax = inputs.absmax
    largest = absmax.topk(min(LARGEST_DIMENSIONS, absmax.numel())).indices.tolist()
    return {
        "name": site.name,
        "kind": site.kind,
        "stack": site.stack,
        "layer": site.layer,
        "features": inputs.features,
        "positions": inputs.positions,
        "share_of_values_over": inputs.share_of_values_over,
        "dimensions_over": int((inputs.share_over > 0).sum()),
        "mean_squared_rowmax": inputs.mean_squared_rowmax,
        "median": inputs.median,
        "largest_dimensions": [dimension_to_json(inputs, dimension) for dimension in largest],
        "linears": [
            {"name": linear.name, "shape": [linear.out_features, linear.in_features]} | _predicted_errors(site, linear)
            for linear in site.linears
        ],
        "smoothing": _smoothing(site),
    }


def _smoothing(site: SiteStatistics) -> dict[str, Any] | None:
    """What was found to smooth; None if nothing was looked for."""
    if site.smoothing is None:
        return {"scaled": [], "reason": site.not_smoothed} if site.not_smoothed else None
    after = site.once_smoothed()
    return {
        "scaled": sorted(each.tensor for each in site.smoothing.scaled),
        "alpha": site.smoothing.alpha,
        "exponents": site.smoothing.exponents.tolist(),
        "steps": site.smoothing.steps,
        "linears": [_predicted_errors(after, linear) for linear in after.linears],
        "reason": "",
    }


def _predicted_errors(site: SiteStatistics, linear: LinearStatistics) -> dict[str, Any]:
    return {
        "name": linear.name,
        "predicted_error_int8_weights": site.predicted_error(linear, int8_inputs=False),
        "predicted_error_vector_wise": site.predicted_error(linear, int8_inputs=True),
    }


def dimension_to_json(inputs: InputSummary, dimension: int) -> dict[str, Any]:
    return {
        "dimension": dimension,
        "absmax": float(inputs.absmax[dimension]),
        "absmax_after_first_position": float(inputs.absmax_later[dimension]),
        "absmax_position": int(inputs.absmax_position[dimension]),
        "minimum": float(inputs.minimum[dimension]),
        "maximum": float(inputs.maximum[dimension]),
        "mean_square": float(inputs.mean_square[dimension]),
        "share_over": float(inputs.share_over[dimension]),
        "sign": inputs.sign(dimension),
    }
