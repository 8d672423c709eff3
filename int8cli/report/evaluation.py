"""An evaluation on the terminal: predictions by method, then output errors by method."""

import math

from rich.table import Table

from int8cli.records.conversion import FINE_SMOOTHING
from int8cli.report.terminal import stdout_console, titled_table
from int8cli.report.text import escape, printable
from int8cli.results.evaluation import Evaluation, MethodResult
from int8cli.results.method_names import loaders_of
from int8cli.results.units import counted, human_seconds, perplexity_text


def show_evaluation(found: Evaluation) -> None:
    """Print the model and text, the two tables, and the notes."""
    console = stdout_console()
    for place, line in enumerate(summary_lines(found)):
        console.print(printable(line), soft_wrap=True, markup=False, style="bold" if place == 0 else None)
    if found.predicts:
        console.print()
        console.print_table(_predictions_table(found))
    if any(method.layers for method in found.methods):
        console.print()
        console.print_table(_errors_table(found))
    for note in found.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    end = verdict(found)
    if end:
        console.print(escape(end), soft_wrap=True)
    console.print(f"Took {human_seconds(found.seconds)}.")


def name_of(method: MethodResult) -> str:
    """What the method is called on the command line; of a 32-bit reference, what it is."""
    return method.label if method.label == "32 bit" else method.key


def verdict(found: Evaluation) -> str:
    """The end of an evaluation in a sentence: what int8 costs with the methods that a user's loaders run."""
    loaders = [(loader, found.method(key)) for key, loader in loaders_of(found).items()]
    best = [(loader, method) for loader, method in loaders if method is not None and method.scores is not None]
    if found.reference is None or not best:
        return ""
    parts = []
    for loader, method in best:
        scores = method.scores
        assert scores is not None
        lost, error = scores.nats_over_reference, scores.standard_error
        if lost is None or not math.isfinite(lost):
            parts.append(f"with {loader} ({method.key}) predictions are not finite")
            continue
        within = error is not None and abs(lost) <= 2 * error
        parts.append(
            f"with {loader} ({method.key}) the text's perplexity changes by {100 * (math.exp(lost) - 1):+.2f} %"
            + (", within the noise" if within else "")
            + (
                f", and {100 * scores.same_top_share:.1f} % of top tokens stay"
                if scores.same_top_share is not None
                else ""
            )
        )
    return f"Verdict: {'; '.join(parts)}."


def summary_lines(found: Evaluation) -> list[str]:
    """The model, the text, and how the stored columns were chosen; a line each."""
    text, columns = found.text, found.columns
    beside = f" compared with {found.reference}" if found.converted and found.reference else ""
    converted = ", with its own int8 tensors" if found.converted else ""
    lines = [
        f"{found.model}{beside}{converted}: {counted(found.int8_layers, 'linear layer')} in int8, others {found.dtype}",
        f"text: {text.name}, {text.tokens:,} tokens in {counted(text.sequences, 'sequence')} of {text.sequence_length}",
    ]
    if columns is not None:
        by = f", calibrated on {columns.text} ({columns.tokens:,} tokens)" if columns.text else ""
        lines.append(f"stored columns: {columns.mean_columns:.1f} per layer{by}")
    if found.smooth is not None:
        fine = "in steps of 2^(1/4), norms rounded to their dtype"
        lines.append(f"smoothed methods: {fine if found.smooth == FINE_SMOOTHING else 'by powers of two, exactly'}")
    return lines


def _predictions_table(found: Evaluation) -> Table:
    table = titled_table("Predictions")
    table.add_column("method", no_wrap=True)
    compared = ("Δ nats", "± s.e.", "KL", "same top") if found.reference is not None else ()
    for name in ("perplexity", *compared):
        table.add_column(name, justify="right", no_wrap=True)
    for method in found.methods:
        scores = method.scores
        if scores is None:
            continue
        cells = (
            _signed(scores.nats_over_reference),
            _figure(scores.standard_error),
            _figure(scores.kl_divergence),
            "" if scores.same_top_share is None else f"{100 * scores.same_top_share:.1f} %",
        )
        table.add_row(_marked(found, method), perplexity_text(scores.perplexity), *cells[: len(compared)])
    lines = []
    if found.reference is not None:
        float_label = escape(found.methods[0].label)
        lines.append(f"Δ nats: mean log-likelihood lost compared with {float_label}; s.e. over sequences")
        lines.append(f"KL: divergence from {float_label} in nats · same top: same most likely token")
    table.caption = "\n".join([*lines, *_stars(found)])
    return table


def _errors_table(found: Evaluation) -> Table:
    table = titled_table(f"Output error of linear layers, on {found.error_tokens:,} tokens")
    table.add_column("method", no_wrap=True)
    for name in ("mean", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    for method in found.methods:
        if method.layers:
            table.add_row(_marked(found, method), *_error_cells(method))
    table.caption = f"‖Y - Y₀‖ / ‖Y₀‖ of each layer, given its input X in {escape(found.methods[0].label)}: Y₀ = X Wᵀ"
    return table


def _error_cells(method: MethodResult) -> tuple[str, str, str]:
    worst = method.worst_layer
    assert worst is not None
    return _figure(method.mean_error), _figure(worst.error), escape(worst.name)


def _marked(found: Evaluation, method: MethodResult) -> str:
    """The method's name, in bold with a star if a loader computes it."""
    name = escape(name_of(method))
    return f"[bold]{name} *[/bold]" if method.key in loaders_of(found) else name


def _stars(found: Evaluation) -> list[str]:
    """What the stars mean, a line for each."""
    return [f"* {escape(key)}: computed by {loader}" for key, loader in loaders_of(found).items()]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}" if math.isfinite(value) else "not finite"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "not finite"
