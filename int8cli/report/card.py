"""The output's README.md: a model card with the metadata the Hub reads, the error summary, and how to load the model.

Says nothing that differs between two runs of the same conversion.
"""

from collections.abc import Iterator

from int8cli.layouts import compressed_tensors
from int8cli.report.text import printable
from int8cli.report.units import decibels, human_bytes, human_count
from int8cli.results import ConversionReport, KindSummary, summarize_kinds
from int8cli.survey import Survey

WORST_LAYERS = 10
TAGS = ["int8", "8-bit", "llm.int8()"]
# The auto class for the end of an architecture's name; any other architecture is loaded by its own class.
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
}


def render_card(report: ConversionReport, survey: Survey) -> str:
    """The whole README.md."""
    return "\n".join((_front_matter(report, survey), *_body(report, survey))) + "\n"


def _front_matter(report: ConversionReport, survey: Survey) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(library_name="transformers", tags=[*TAGS, survey.target.NAME, "quantized"])
    if survey.identity.on_hub:
        data["base_model"] = report.model
        data["base_model_relation"] = "quantized"
    return f"---\n{data.to_yaml()}\n---\n"


def _body(report: ConversionReport, survey: Survey) -> Iterator[str]:
    revision = f" at revision `{report.revision}`" if report.revision else ""
    link = f"[{report.model}](https://huggingface.co/{report.model})" if survey.identity.on_hub else f"`{report.model}`"
    name = report.model.rpartition("/")[2]
    yield f"# {name}, LLM.int8()\n"
    yield (
        f"{link}{revision}, converted by int8cli to 8-bit integers as in "
        "[LLM.int8()](https://arxiv.org/abs/2208.07339): one scale for each output row, round half to even."
    )
    yield "Embeddings, norms, biases and the output head are as in the original.\n"
    yield from _size_table(report)
    if survey.has_config:
        yield from _loading(survey)
    yield from _errors(report)


def _size_table(report: ConversionReport) -> Iterator[str]:
    yield "| | original | here |"
    yield "|---|---|---|"
    yield f"| weight files | {human_bytes(report.source_bytes)} | {human_bytes(report.output_bytes)} |"
    yield (
        f"| parameters in int8 | | {human_count(report.quantized_parameters)} of {human_count(report.parameters)} "
        f"({report.percent_quantized:.1f} %) |"
    )
    if report.layers:
        total = report.sums
        yield f"| relative error of the int8 weights, ‖W-Ŵ‖/‖W‖ | | {total.relative_frobenius_error:.4f} |"
        yield f"| their SQNR | | {decibels(total.sqnr_db)} dB |"
    yield ""


def _loading(survey: Survey) -> Iterator[str]:
    package = survey.target.NAME
    yield "## Loading\n"
    if package == compressed_tensors.NAME:
        yield "In vLLM: `vllm serve .`, with this directory or its name on the Hub.\n"
    yield from (f"Note: {caveat}.\n" for caveat in survey.target.caveats(survey.plan))
    if not survey.target.transformers_reads(survey.decisions):
        return
    architecture = next(iter(survey.config.get("architectures") or ()), "AutoModel")
    loader = next((auto for end, auto in _AUTO_CLASSES.items() if architecture.endswith(end)), architecture)
    yield f"With `pip install transformers accelerate {package}`; no further options are needed.\n"
    yield "```python"
    yield f"from transformers import {loader}\n"
    yield f'model = {loader}.from_pretrained(".", device_map="auto")  # this directory, or its name on the Hub'
    yield "```\n"


def _errors(report: ConversionReport) -> Iterator[str]:
    if not report.layers:
        return
    yield "## Error of the weights, by kind of layer\n"
    yield "| kind | layers | relative error | SQNR (dB) | use of the int8 range |"
    yield "|---|---:|---:|---:|---:|"
    for kind in summarize_kinds(report.layers):
        yield _kind_row(kind)
    yield "\n## Worst layers\n"
    yield "| layer | shape | relative error | SQNR (dB) | largest error |"
    yield "|---|---|---:|---:|---:|"
    for layer in report.layers[:WORST_LAYERS]:
        sums = layer.sums
        yield (
            f"| `{printable(layer.name)}` | {layer.shape[0]} x {layer.shape[1]} | {sums.relative_frobenius_error:.4f} "
            f"| {decibels(sums.sqnr_db)} | {sums.max_abs_error:.3g} |"
        )
    yield "\nThe error of every layer is in `int8/report.json`."


def _kind_row(kind: KindSummary) -> str:
    return (
        f"| `{printable(kind.kind)}` | {kind.layers} | {kind.sums.relative_frobenius_error:.4f} "
        f"| {decibels(kind.sums.sqnr_db)} | {100 * kind.sums.mean_range_use:.0f} % |"
    )
