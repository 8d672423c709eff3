"""The README.md of the output: a model card with Hub metadata, the error summary, and how to load the model.

Contains nothing that differs between two runs of the same conversion.
"""

from collections.abc import Iterator

from int8cli.checkpoint.source_card import NO_CARD, SourceCard
from int8cli.planning.layouts import compressed_tensors
from int8cli.planning.output_files import SIDECAR_DIRECTORY
from int8cli.planning.survey import Survey
from int8cli.report import markdown
from int8cli.report.smoothing import smoothing_section
from int8cli.report.stored import chosen_by, how_many, in_sidecars, percent_more
from int8cli.results.conversion import ConversionReport, summarize_kinds, worst_by_output_error
from int8cli.results.stored_columns import ErrorBasis, RelativeOutputError, StoredKind, StoredSummary
from int8cli.results.units import decibels, human_bytes, human_count

WORST_LAYERS = 10
COLUMNS_SHOWN = 8  # of one layer
TAGS = ["int8", "8-bit", "llm.int8()"]
# The auto class for each suffix of an architecture's name. Any other architecture is loaded with its own class.
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
}

# What loaders do with inputs, by the inputs of the layout compressed-tensors. Its caveats name the exceptions.
_INPUTS = {
    "absmax": "Inputs are rounded to int8 too, with one scale for each token.",
    "zeropoint": "Inputs are rounded to int8 too, with a scale and a zero point for each token.",
    "none": "Only weights are int8. Inputs stay in 16 bit, and products are computed in 16 bit.",
}


def render_card(report: ConversionReport, survey: Survey, source_card: SourceCard = NO_CARD) -> str:
    """The complete README.md. License and task are those of the source's card."""
    return "\n".join((_front_matter(report, survey, source_card), *_body(report, survey))) + "\n"


def _front_matter(report: ConversionReport, survey: Survey, source_card: SourceCard) -> str:
    from huggingface_hub import ModelCardData

    tags = [*TAGS, survey.target.NAME, "quantized"]
    data = ModelCardData(library_name="transformers", tags=tags, **source_card.fields)
    if survey.identity.on_hub:
        data["base_model"] = report.model
        data["base_model_relation"] = "quantized"
    return f"---\n{data.to_yaml()}\n---\n"


def _body(report: ConversionReport, survey: Survey) -> Iterator[str]:
    revision = f" at revision {markdown.code(report.revision)}" if report.revision else ""
    on_hub, address = survey.identity.on_hub, f"https://huggingface.co/{report.model}"
    model = markdown.link(report.model, address) if on_hub else markdown.code(report.model)
    name = report.model.rpartition("/")[2]
    yield f"# {markdown.text(name)}, LLM.int8()\n"
    yield (
        f"{model}{revision}, converted by [int8cli](https://github.com/int8cli/int8cli) to 8-bit integers as in "
        "[LLM.int8()](https://arxiv.org/abs/2208.07339): one scale for each output row, rounding half to even."
    )
    smoothing = report.smoothing
    if smoothing is not None and smoothing.smoothed:
        yield "Embeddings and the output head are unchanged. Norms and biases are [smoothed](#smoothing).\n"
    else:
        yield "Embeddings, norms, biases and the output head are unchanged.\n"
    yield from _size_table(report)
    if survey.has_config:
        yield from _loading(survey)
        yield from _too_large(survey)
    stored = report.stored
    wanted = report.settings["outlier_columns"] or report.settings.get("outlier_budget")
    if smoothing is not None:
        yield from smoothing_section(smoothing)
    if stored is not None and (stored.total.columns or wanted):
        yield from _stored_columns(report, stored, survey)
    yield from _layers(report)


def _size_table(report: ConversionReport) -> Iterator[str]:
    yield "| | original | here |"
    yield "|---|---|---|"
    yield f"| weight files | {human_bytes(report.source_bytes)} | {human_bytes(report.output_bytes)} |"
    if report.stored is not None:
        yield f"| {in_sidecars(report)}, in `{SIDECAR_DIRECTORY}` | | {human_bytes(report.sidecar_bytes)} |"
    yield (
        f"| parameters in int8 | | {human_count(report.quantized_parameters)} of {human_count(report.parameters)} "
        f"({report.percent_quantized:.1f} %) |"
    )
    if report.layers and (total := report.sums) is not None:
        yield f"| relative error of the int8 weights, ‖W-Ŵ‖/‖W‖ | | {total.relative_frobenius_error:.4f} |"
        yield f"| their SQNR | | {decibels(total.sqnr_db)} dB |"
    yield ""


def _loading(survey: Survey) -> Iterator[str]:
    package = survey.target.NAME
    yield "## Loading\n"
    if package == compressed_tensors.NAME:
        if compressed_tensors.vllm_reads(decision.module for decision in survey.plan.quantized):
            yield "In vLLM: `vllm serve .`, with this directory or its name on the Hub.\n"
        yield f"{_INPUTS[survey.target.INPUTS]}\n"
    yield from (f"Note: {markdown.text(caveat)}.\n" for caveat in survey.target.caveats(survey.plan, survey.config))
    if not survey.target.transformers_reads(survey.decisions):
        return
    loader = _loader(survey)
    yield f"With `pip install transformers accelerate {package}`; no further options are needed.\n"
    yield "```python"
    yield f"from transformers import {loader}\n"
    yield f'model = {loader}.from_pretrained(".", device_map="auto")  # this directory, or its name on the Hub'
    yield "```\n"


def _too_large(survey: Survey) -> Iterator[str]:
    """How to run the model where it does not fit into memory."""
    yield "## If it does not fit into memory\n"
    yield (
        "Install `int8cli[calibrate]`. Blocks that do not fit stay on the disk in int8, and each is read while the one "
        "before it computes. Nothing is expanded to floats or written. This does not need bitsandbytes:\n"
    )
    yield "```python"
    yield "from int8cli import load_model\n"
    yield 'model = load_model(".", device_map="auto")  # this directory'
    yield "```\n"
    if _loader(survey) == "AutoModelForCausalLM":
        yield "Or from a shell. It first says how long each token will take:\n"
        yield '    int8cli generate . "The moon rose over the harbour, and"\n'


def _loader(survey: Survey) -> str:
    """The auto class for the model's architecture, or its own class if its name can be that of a Python class."""
    architecture = next(iter(survey.config.get("architectures") or ()), "")
    loader = next((auto for end, auto in _AUTO_CLASSES.items() if architecture.endswith(end)), architecture)
    return markdown.python_class(loader, otherwise="AutoModel")


def _stored_columns(report: ConversionReport, stored: StoredSummary, survey: Survey) -> Iterator[str]:
    """What the stored columns are, where they are, how to use them, and the output error with and without them."""
    more = percent_more(report.sidecar_bytes, report.output_bytes)
    yield "## Stored columns\n"
    yield (
        f"`{SIDECAR_DIRECTORY}` has exact copies of {how_many(report, stored)}: {human_bytes(report.sidecar_bytes)}, "
        f"which is {more} of the weight files. int8cli's loader multiplies these columns in 16 bit, with the original "
        "weights, instead of in int8."
    )
    yield f"They are {markdown.text(chosen_by(report.settings))}.\n"
    yield (
        "Each weight file has a file of the same name there. For every int8 layer `X` it contains `X.outlier_cols` "
        "(int32, sorted indices of input columns) and `X.outlier_weight` (out_features x columns). Other loaders "
        "ignore these files."
    )
    if survey.has_config:
        yield "To use them, install `int8cli[calibrate]` and run:\n"
        yield "```python"
        yield "from int8cli import load_model\n"
        yield 'model = load_model(".")  # this directory'
        yield "```"
    yield ""
    yield from _stored_table(stored)


def _stored_table(stored: StoredSummary) -> Iterator[str]:
    if stored.basis is None:
        yield "| kind | layers | columns | size |"
        yield "|---|---:|---:|---:|"
    else:
        at_most = "" if stored.basis == "measured" else " (an upper bound with exact columns)"
        yield f"Mean output error of the layers, ‖error‖/‖X Wᵀ‖, {stored.basis}{at_most}:\n"
        yield "| kind | layers | columns | size | plain int8 | with exact columns |"
        yield "|---|---:|---:|---:|---:|---:|"
    for kind in (each for each in stored.kinds if each.columns or each.error):
        yield f"| {markdown.code(kind.kind)} {_stored_cells(kind, stored.basis)}"
    if len(stored.kinds) > 1:
        yield f"| all {_stored_cells(stored.total, stored.basis)}"
    yield ""


def _stored_cells(kind: StoredKind, basis: ErrorBasis | None) -> str:
    cells = f"| {kind.layers} | {kind.columns:,} | {human_bytes(kind.bytes)} |"
    return cells if basis is None else f"{cells} {_error_cells(kind.error)}"


def _error_cells(error: RelativeOutputError | None) -> str:
    return f"{error.all_int8:.4f} | {error.with_stored:.4f} |" if error is not None else "| |"


def _layers(report: ConversionReport) -> Iterator[str]:
    if not report.layers:
        return
    measured = report.sums is not None
    yield from _kinds_with_errors(report) if measured else _kinds_by_size(report)
    stored = report.stored
    if stored is not None and stored.basis is not None:
        yield from _worst_by_output(report, stored.basis)
    elif measured:
        yield from _worst_by_weights(report)
    yield f"\n`int8/report.json` lists {'the error of every layer' if measured else 'every layer'}."


def _kinds_with_errors(report: ConversionReport) -> Iterator[str]:
    yield "## Error of the weights, by kind of layer\n"
    yield "| kind | layers | relative error | SQNR (dB) | use of the int8 range |"
    yield "|---|---:|---:|---:|---:|"
    for kind in summarize_kinds(report.layers):
        if kind.sums is not None:
            yield (
                f"| {markdown.code(kind.kind)} | {kind.layers} | {kind.sums.relative_frobenius_error:.4f} "
                f"| {decibels(kind.sums.sqnr_db)} | {100 * kind.sums.mean_range_use:.0f} % |"
            )


def _kinds_by_size(report: ConversionReport) -> Iterator[str]:
    yield "## Quantized, by kind of layer\n"
    yield "The error of the weights was not measured.\n"
    yield "| kind | layers | original | here |"
    yield "|---|---:|---:|---:|"
    for kind in summarize_kinds(report.layers):
        before, after = human_bytes(kind.bytes_before), human_bytes(kind.bytes_after)
        yield f"| {markdown.code(kind.kind)} | {kind.layers} | {before} | {after} |"


def _worst_by_output(report: ConversionReport, basis: ErrorBasis) -> Iterator[str]:
    yield f"\n## Worst layers by output error ({basis})\n"
    yield "| layer | plain int8 | with exact columns | exact columns, largest share of the error first |"
    yield "|---|---:|---:|---|"
    for layer, error in worst_by_output_error(report.layers, basis)[:WORST_LAYERS]:
        columns = layer.stored.heaviest_first[:COLUMNS_SHOWN] if layer.stored is not None else ()
        indices = " ".join(str(column.index) for column in columns)
        yield f"| {markdown.code(layer.name)} | {_error_cells(error)} {indices} |"


def _worst_by_weights(report: ConversionReport) -> Iterator[str]:
    yield "\n## Worst layers\n"
    yield "| layer | shape | relative error | SQNR (dB) | largest error |"
    yield "|---|---|---:|---:|---:|"
    for layer, sums in ((each, each.sums) for each in report.layers[:WORST_LAYERS] if each.sums is not None):
        yield (
            f"| {markdown.code(layer.name)} | {layer.shape[0]} x {layer.shape[1]} "
            f"| {sums.relative_frobenius_error:.4f} | {decibels(sums.sqnr_db)} | {sums.max_abs_error:.3g} |"
        )
