"""`int8cli estimate-memory`."""

import enum
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import Json, LayoutName, Model, Revision, default_output

if TYPE_CHECKING:
    from int8cli.estimate.cards import Card
    from int8cli.estimate.estimate import Estimate, Use
    from int8cli.report.memory import MemoryReport

EXAMPLES = """\
int8cli estimate-memory bigscience/bloom
int8cli estimate-memory bigscience/bloom --gpu '8x RTX 3090' --context 1024
int8cli estimate-memory ./my-model --gpu 24GiB --gpu 2x16GiB --batch 4
int8cli estimate-memory org/name --json > memory.json
"""


class KvDtype(enum.StrEnum):
    """What the cache is kept in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float8 = "float8"


@shows_errors
def estimate_memory(
    model: Model,
    revision: Revision = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in each sequence.", show_default="the model's own length, up to 8192", min=1),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    kv_dtype: Annotated[KvDtype, typer.Option(help="Dtype of the KV cache.")] = KvDtype.float16,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CARDS",
            help="Will these hold it? A card ('RTX 3090'), a size (24GiB), several (8x24GiB). Repeatable.",
        ),
    ] = None,
    layout: Annotated[LayoutName, typer.Option(help="The layout of the conversion.")] = LayoutName.bitsandbytes,
    as_json: Json = False,
) -> None:
    """Tell what a model needs, and which GPUs hold it, from config.json and its files' headers alone.

    Weights as stored, in 32 and 16 bit and in LLM.int8(), the KV cache, and what a conversion takes. The exit code is 0
    whether or not the cards of --gpu hold it: --json says that in cards.answers[].fits.
    """
    from int8cli.checkpoint.locate import open_source
    from int8cli.estimate.estimate import Use, estimate_memory
    from int8cli.planning.blocks import THREADS_FOR_A_SHARD
    from int8cli.planning.layouts import LAYOUTS
    from int8cli.planning.plan import PlanOptions
    from int8cli.planning.survey import survey_source
    from int8cli.report.memory import show_memory
    from int8cli.report.memory_json import memory_to_json

    cards = _cards(gpu or [])
    output = default_output(model)
    source = open_source(model, revision=revision, download_dir=output, on_wait=_say_waiting)
    try:
        survey = survey_source(source, PlanOptions(), LAYOUTS[layout.value])
        estimate = estimate_memory(source, survey, output, threads=THREADS_FOR_A_SHARD)
    finally:
        source.close()
    use = Use(context or estimate.cache.default_context, batch, kv_dtype.value)
    report = _report(estimate, use, cards)
    with writing_result():
        if as_json:
            print(json.dumps(memory_to_json(report), indent=2))
        else:
            show_memory(report)


def _report(estimate: "Estimate", use: "Use", cards: tuple["Card", ...]) -> "MemoryReport":
    from int8cli.estimate.cards import SHOWN_CARDS, card_named, cards_of_this_machine
    from int8cli.estimate.estimate import PRECISIONS
    from int8cli.estimate.fit import answer, fit_table
    from int8cli.report.memory import MemoryReport

    here = cards_of_this_machine()
    return MemoryReport(
        estimate,
        use,
        fit_table(estimate, use, [card_named(name) for name in SHOWN_CARDS]),
        tuple(answer(estimate, use, here, precision) for precision in PRECISIONS) if here else (),
        tuple(answer(estimate, use, cards, precision) for precision in PRECISIONS) if cards else (),
    )


def _cards(wanted: list[str]) -> tuple["Card", ...]:
    from int8cli.estimate.cards import UnknownCardError, parse_cards

    try:
        return tuple(card for text in wanted for card in parse_cards(text))
    except UnknownCardError as error:
        raise typer.BadParameter(f"{error}. {error.hint}", param_hint="'--gpu'") from None


def _say_waiting(what: str, why: str, pause_s: float) -> None:
    print(f"{what}: {why}; trying again in {pause_s:.0f} s", file=sys.stderr, flush=True)
