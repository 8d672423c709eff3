"""An evaluation as one HTML page, or as a picture of its two main charts.

Owns which charts and tables there are, their order, and the sentences that sum up the result.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from int8cli.checkpoint.writer import write_file
from int8cli.errors import OutputError
from int8cli.report import markup
from int8cli.report.evaluation import summary_lines
from int8cli.report.evaluation_charts import agreement_by_method, has_agreement, perplexity_by_method
from int8cli.report.layer_charts import errors_by_layer, has_errors
from int8cli.report.method_marks import compared, reference_label
from int8cli.report.vega import finished, require_altair, save_chart, stacked
from int8cli.results.evaluation import REFERENCE, Evaluation, MethodResult
from int8cli.results.units import perplexity_text

MOST_LAYERS = 1500
_WEIGHTS_ONLY = "int8-weights"  # inputs stay in 16 bit


def write_evaluation(found: Evaluation, path: Path) -> None:
    """Write the page (.html) or the picture (.png, .svg). Raises OutputError, MissingExtraError."""
    require_altair()
    if path.suffix == ".html":
        write_file(path, evaluation_page(found).encode())
    elif path.suffix in (".png", ".svg"):
        charts = [perplexity_by_method(found)] if found.predicts else []
        charts += [errors_by_layer(found)] if has_errors(found) else []
        save_chart(stacked(charts, "nothing was compared"), path)
    else:
        raise OutputError(f"{path}: an evaluation report must be .html, .png or .svg")


def evaluation_page(found: Evaluation) -> str:
    """The page: the summary, the charts that have data, the tables."""
    lines = [*verdict_lines(found), *summary_lines(found), *(f"Note: {note}" for note in found.notes)]
    body = [
        f"<h1>Evaluation of {markup.escape(found.model)}</h1>",
        *(f"<p>{markup.escape(line)}</p>" for line in lines),
    ]
    body.append(f'<p class="note">{markup.escape(_provenance(found))}</p>')
    drawn = {}
    if found.predicts:
        body.append(markup.section("Predictions", "perplexity", ""))
        drawn["perplexity"] = finished(perplexity_by_method(found))
    if has_agreement(found):
        body.append(markup.section("Agreement", "agreement", f"With {reference_label(found)}, at every position."))
        drawn["agreement"] = finished(agreement_by_method(found))
    if has_errors(found):
        note = "Click a method in the legend to see it alone, shift-click for more, double-click for all."
        body.append(markup.section("Layers", "errors", note))
        drawn["errors"] = finished(errors_by_layer(found))
    body += ["<h2>Table of methods</h2>", _methods_table(found)]
    if has_errors(found):
        body += ["<h2>Table of layers</h2>", *_layers_table(found)]
    return markup.page(f"Evaluation of {found.model}", body, drawn)


def verdict_lines(found: Evaluation) -> list[str]:
    """The result in short: perplexity in 16 bit, and the method closest to it."""
    label, reference = reference_label(found), found.method(REFERENCE)
    lines = []
    if reference is not None and reference.scores is not None:
        lines.append(f"Perplexity {perplexity_text(reference.scores.perplexity)} in {label}.")
    ranked = sorted((method for method in compared(found) if _distance(method) is not None), key=_rank)
    if not ranked:
        return lines
    lines.append(f"Closest to {label}: {_figures_of(ranked[0])}.")
    in_int8 = [method for method in ranked if method.key != _WEIGHTS_ONLY]
    if in_int8 and in_int8[0] is not ranked[0]:
        lines.append(f"Closest with int8 inputs too: {_figures_of(in_int8[0])}.")
    return lines


def _distance(method: MethodResult) -> tuple[int, float] | None:
    """How far a method is from 16 bit, by the best known figure, and which one that is.

    KL divergence is the best, because it separates methods with less text than perplexity, which is second. The error
    of the layers is third.
    """
    scores = method.scores
    known = (None, None) if scores is None else (scores.kl_divergence, scores.nats)
    for place, value in enumerate((*known, method.mean_error)):
        if value is not None and math.isfinite(value):
            return place, value
    return None


def _rank(method: MethodResult) -> tuple[int, float]:
    return _distance(method) or (3, 0.0)


def _figures_of(method: MethodResult) -> str:
    scores = method.scores
    figures = []
    if scores is not None:
        figures.append(f"perplexity {perplexity_text(scores.perplexity)}")
        if scores.nats_over_reference is not None:
            error = "" if scores.standard_error is None else f" ± {scores.standard_error:.4f}"
            figures[-1] += f" ({scores.nats_over_reference:+.4f}{error} nats)"
        if scores.kl_divergence is not None:
            figures.append(f"KL divergence {scores.kl_divergence:.3g}")
        if scores.same_top_share is not None:
            figures.append(f"same most likely token at {scores.same_top_share:.1%} of positions")
    if method.mean_error is not None:
        figures.append(f"mean output error {method.mean_error:.4f}")
    return f"{method.label}: {', '.join(figures)}"


def _provenance(found: Evaluation) -> str:
    text = found.text
    revision = f", revision {found.revision}" if found.revision else ""
    at = f", {text.positions:,} positions" if text.positions else ""
    return (
        f"{text.tokens:,} tokens{at}, seed {text.seed}, {found.dtype}, threshold {found.threshold:g}{revision}; "
        f"text sha256 {text.sha256[:16]}…"
    )


def _methods_table(found: Evaluation) -> str:
    errors = ("mean error", "worst error", "worst layer") if has_errors(found) else ()
    if not found.predicts:
        heads: tuple[str, ...] = ("method", *errors)
    else:
        heads = ("method", "perplexity", "Δ nats", "± s.e.", "KL", "same top", *errors)
    rows = [
        (
            method.label,
            *(_score_cells(method) if found.predicts else ()),
            *(_error_cells(method) if errors else ()),
        )
        for method in found.methods
        if found.predicts or method.layers
    ]
    return markup.table(heads, rows, "Nothing was compared.")


def _score_cells(method: MethodResult) -> Iterator[markup.Cell]:
    scores = method.scores
    if scores is None:
        yield from (markup.NOTHING,) * 5
        return
    yield scores.perplexity, perplexity_text(scores.perplexity)
    yield _cell(scores.nats_over_reference, "+.4f")
    yield _cell(scores.standard_error, ".4f")
    yield _cell(scores.kl_divergence, ".4g")
    yield _cell(scores.same_top_share, ".2%")


def _error_cells(method: MethodResult) -> Iterator[markup.Cell]:
    worst = method.worst_layer
    yield _cell(method.mean_error, ".4g")
    yield _cell(None if worst is None else worst.error, ".4g")
    yield "" if worst is None else worst.name


def _layers_table(found: Evaluation) -> Iterator[str]:
    """The error of each layer by each method. If there are very many layers, those with the largest errors."""
    methods = [method for method in compared(found) if method.layers]
    layers = list(zip(*(method.layers for method in methods), strict=True))
    if len(layers) > MOST_LAYERS:
        largest = sorted(layers, key=lambda of: max(error.error for error in of), reverse=True)[:MOST_LAYERS]
        shown = {of[0].name for of in largest}
        note = f"The {MOST_LAYERS:,} largest errors of {len(layers):,} layers. The JSON output has all."
        yield f'<p class="note">{note}</p>'
        layers = [of for of in layers if of[0].name in shown]
    heads = ("layer", "input", *(method.label for method in methods))
    rows = [(of[0].name, of[0].kind, *(_cell(error.error, ".4f") for error in of)) for of in layers]
    yield markup.table(heads, rows, "None.")


def _cell(value: float | None, form: str) -> markup.Cell:
    if value is None:
        return markup.NOTHING
    return value, format(value, form) if math.isfinite(value) else "not finite"
