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
from int8cli.results.method_names import loaders_of
from int8cli.results.units import percent, perplexity_text

MOST_LAYERS = 1500
PREDICTIONS_MEAN = (
    "Perplexity is exp of the mean negative log-likelihood of the text's tokens; nats are that mean. 0.01 nats more "
    "are 1 % more perplexity. Differences within two standard errors mean little. Names in bold: what loaders compute."
)
AGREEMENT_MEANS = (
    "KL divergence: how far the predicted probabilities are from the 16-bit model's, in nats, averaged over positions. "
    "It separates methods on less text than perplexity. Most likely token: how often it stays the same."
)
LAYERS_MEAN = (
    "Output error: ‖Y - Y₀‖ / ‖Y₀‖, Y₀ = X Wᵀ, with the inputs X of the 16-bit model, so that errors do not add up "
    "from layer to layer. Click a method in the legend to see it alone, shift-click for more, double-click for all."
)
INPUTS_MEAN = (
    "Norm-fed: the input comes straight from a norm. Attention output: what attention hands to its output projection. "
    "Second feed-forward: what comes out of the activation function."
)


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
    lines = [*summary_lines(found), *(f"Note: {note}" for note in found.notes)]
    body = [
        f"<h1>Evaluation of {markup.escape(found.model)}</h1>",
        *(f'<p class="verdict">{markup.escape(line)}</p>' for line in verdict_lines(found)),
        *(f"<p>{markup.escape(line)}</p>" for line in lines),
    ]
    body.append(f'<p class="note">{markup.escape(_provenance(found))}</p>')
    drawn = {}
    if found.predicts:
        body.append(markup.section("Predictions", "perplexity", PREDICTIONS_MEAN))
        drawn["perplexity"] = finished(perplexity_by_method(found))
    if has_agreement(found):
        body.append(markup.section("Agreement", "agreement", AGREEMENT_MEANS))
        drawn["agreement"] = finished(agreement_by_method(found))
    if has_errors(found):
        body.append(markup.section("Layers", "errors", LAYERS_MEAN))
        drawn["errors"] = finished(errors_by_layer(found))
    body += [markup.heading("Table of methods", _marks_mean(found)), _methods_table(found)]
    if has_errors(found):
        body += [markup.heading("Table of layers", INPUTS_MEAN), *_layers_table(found)]
    return markup.page(f"Evaluation of {found.model}", body, drawn)


def _marks_mean(found: Evaluation) -> str:
    """Which rows are marked."""
    loaded = [(found.method(key), loader) for key, loader in loaders_of(found).items()]
    named = "; ".join(f"{method.label}, in {loader}" for method, loader in loaded if method is not None)
    return f"What you will get is marked: {named}." if named else ""


def verdict_lines(found: Evaluation) -> list[str]:
    """The result in short: perplexity in 16 bit, and what the methods lose that loaders compute.

    Where none of those was evaluated, the method closest to 16 bit, and that no loader is known to compute it.
    """
    label, reference = reference_label(found), found.method(REFERENCE)
    lines = []
    if reference is not None and reference.scores is not None:
        lines.append(f"Perplexity {perplexity_text(reference.scores.perplexity)} in {label}.")
    loaded = [(loader, found.method(key)) for key, loader in loaders_of(found).items()]
    lines += [f"In {loader}: {_figures_of(method)}." for loader, method in loaded if method is not None]
    if loaded:
        return lines
    ranked = sorted((method for method in compared(found) if _distance(method) is not None), key=_rank)
    if ranked:
        lines.append(f"Closest to {label} of the methods that were compared: {_figures_of(ranked[0])}.")
        lines.append("None of them is what transformers with bitsandbytes or load_model compute.")
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
            error = "" if scores.standard_error is None else f" ± {scores.standard_error:.2g}"
            figures[-1] += f" ({scores.nats_over_reference:+.2g}{error} nats)"
        if scores.kl_divergence is not None:
            figures.append(f"KL divergence {scores.kl_divergence:.2g}")
        if scores.same_top_share is not None:
            figures.append(f"same most likely token at {100 * scores.same_top_share:.1f} % of positions")
    if method.mean_error is not None:
        figures.append(f"mean output error of the layers {percent(method.mean_error)}")
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
    shown = [method for method in found.methods if found.predicts or method.layers]
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
        for method in shown
    ]
    marked = [place for place, method in enumerate(shown) if method.key in loaders_of(found)]
    return markup.table(heads, rows, "Nothing was compared.", name="Methods", marked=marked)


def _score_cells(method: MethodResult) -> Iterator[markup.Cell]:
    scores = method.scores
    if scores is None:
        yield from (markup.NOTHING,) * 5
        return
    yield scores.perplexity, perplexity_text(scores.perplexity)
    yield _cell(scores.nats_over_reference, "+.2g")
    yield _cell(scores.standard_error, ".2g")
    yield _cell(scores.kl_divergence, ".2g")
    share = scores.same_top_share
    yield markup.NOTHING if share is None else (share, f"{100 * share:.1f} %")


def _error_cells(method: MethodResult) -> Iterator[markup.Cell]:
    worst = method.worst_layer
    yield markup.share(method.mean_error)
    yield markup.share(None if worst is None else worst.error)
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
    rows = [(of[0].name, of[0].kind, *(markup.share(error.error) for error in of)) for of in layers]
    yield markup.table(heads, rows, "None.", name="Layers")


def _cell(value: float | None, form: str) -> markup.Cell:
    if value is None:
        return markup.NOTHING
    return value, format(value, form) if math.isfinite(value) else "not finite"
