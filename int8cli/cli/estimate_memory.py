"""`int8cli estimate-memory`."""

import enum
import json
import re
from collections.abc import Iterator
from typing import Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import Json, LayoutName, Model, Revision, options_of, parse_rate
from int8cli.commands.options import EstimateOptions

EXAMPLES = """\
int8cli estimate-memory bigscience/bloom
int8cli estimate-memory bigscience/bloom --gpu '8x RTX 3090' --context 1024
int8cli estimate-memory ./my-model --gpu 24GiB --gpu 2x16GiB --batch 4
int8cli estimate-memory ./my-model --gpu 'RTX 4090, 2x T4'
int8cli estimate-memory org/name --machines 1 --machines 8 --network 1Gbit/s
int8cli estimate-memory org/name --json > memory.json
"""


class KvDtype(enum.StrEnum):
    """Dtype of the KV cache."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float8 = "float8"


def complete_card(incomplete: str) -> Iterator[str]:
    """Names of known cards, after a count (`8x`) or after other cards and a comma."""
    from int8cli.estimate.cards import CARDS

    match = re.match(r"(.*,\s*|)(\d+\s*x\s*|)(.*)", incomplete, re.IGNORECASE)
    assert match is not None
    before, typed = match[1] + match[2], match[3].lower()
    yield from (f"{before}{card.name}" for card in CARDS if card.name.lower().startswith(typed))


Context = Annotated[
    int | None,
    typer.Option(help="Tokens in each sequence.", show_default="the model's maximum, up to 8192", min=1),
]
Batch = Annotated[int, typer.Option(help="Sequences at once.", min=1)]
KvCacheDtype = Annotated[KvDtype, typer.Option(help="Dtype of the KV cache.")]
Gpu = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CARDS",
        help="Does the model fit on these cards? A name ('RTX 3090'), a size (24GiB), several (8x24GiB), or several "
        "kinds in one machine ('2x RTX 3090, T4'). Repeatable; each is checked separately.",
        autocompletion=complete_card,
    ),
]
Layout = Annotated[LayoutName, typer.Option(help="Output layout of the conversion.")]
Machines = Annotated[
    list[int] | None,
    typer.Option(metavar="N", help="How long does a conversion take on N machines like this one? Repeatable."),
]
Network = Annotated[
    float | None,
    typer.Option(
        parser=parse_rate,
        metavar="RATE",
        help="Rate at which each of these machines downloads the source: 1Gbit/s, 200MB/s.",
        show_default="downloads are left out",
    ),
]


@shows_errors(hints.ESTIMATE_MEMORY)
def estimate_memory(
    model: Model,
    revision: Revision = None,
    context: Context = None,
    batch: Batch = 1,
    kv_dtype: KvCacheDtype = KvDtype.float16,
    gpu: Gpu = None,
    layout: Layout = LayoutName.bitsandbytes,
    machines: Machines = None,
    network: Network = None,
    as_json: Json = False,
) -> None:
    """Estimate the memory a model needs and the GPUs it fits on, from config.json and file headers alone.

    Shows the weights as stored, in 32 bit, in 16 bit and in LLM.int8(), the KV cache, and what a conversion needs. The
    exit code is 0 whether or not the model fits on the cards of --gpu; with --json, see cards.answers[].fits.
    """
    from int8cli.cli.next_steps import after_estimate
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import estimate_memory as command
    from int8cli.report.memory import show_memory
    from int8cli.report.memory_json import memory_to_json
    from int8cli.report.text import printable

    options = options_of(EstimateOptions, locals())
    with shown_progress(quiet=False) as progress:
        report = command.estimate_memory(model, options, progress=progress)
    with writing_result():
        if as_json:
            print(json.dumps(memory_to_json(report), indent=2))
        else:
            show_memory(report)
            print("Next:")
            for command_line in after_estimate(report, model):
                print(f"  {printable(command_line)}")
