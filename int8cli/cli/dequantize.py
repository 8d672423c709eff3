"""`int8cli dequantize`."""

import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from int8cli.cli import hints
from int8cli.cli.errors import shows_errors, writing_result
from int8cli.cli.options import ConvertedDirectory, Json, Quiet, options_of
from int8cli.commands.options import DequantizeOptions

EXAMPLES = """\
int8cli dequantize ./my-model-int8 -o ./my-model-16bit
int8cli dequantize ./my-model-int8 -o ./my-model-float16 --dtype float16
"""


class FloatDtype(enum.StrEnum):
    """What weights can be written in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Output = Annotated[
    Path, typer.Option("--output", "-o", help="Directory to write to.", metavar="OUT", show_default=False)
]
Dtype = Annotated[
    FloatDtype | None, typer.Option(help="Dtype of all floats.", show_default="the dtype that each tensor had")
]


@shows_errors(hints.DEQUANTIZE, resumes=True)
def dequantize(
    directory: ConvertedDirectory,
    output: Output,
    dtype: Dtype = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a conversion as 16-bit floats again, for loaders that know no int8.

    The weights are those that int8cli.load_model computes with: int8 values times their scales, and the stored columns
    exactly as they were in the source. Shards are streamed; after an interruption, run the same command again.
    """
    from int8cli.cli.progress import shown_progress
    from int8cli.commands import dequantize as command
    from int8cli.report.text import printable
    from int8cli.results.units import counted, human_bytes

    options = options_of(DequantizeOptions, locals())
    with shown_progress(quiet=quiet) as progress:
        found = command.dequantize(directory, output, options, progress=progress)
    with writing_result():
        if as_json:
            print(json.dumps(found.to_json(), indent=2))
        elif not quiet:
            print(f"{printable(found.source)} → {printable(found.output)}")
            restored = f"{found.restored_layers} layers are {' and '.join(found.dtypes)} again"
            print(printable(f"{restored}; {counted(found.shards, 'shard')}, {human_bytes(found.output_bytes)}"))
