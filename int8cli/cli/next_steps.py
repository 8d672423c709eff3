"""Commands that make sense next, to be copied into a shell."""

import shlex
from pathlib import Path

from int8cli.checkpoint.object_store import shown_address
from int8cli.estimate.answers import MemoryReport
from int8cli.planning.layouts import compressed_tensors
from int8cli.results.conversion import ConversionReport


def after_estimate(report: MemoryReport, model: str) -> list[str]:
    """To ask for as many cards as would do, and to see the plan of a conversion."""
    name = shlex.quote(shown_address(model))
    enough = {
        f"{machine.shortage.cards_needed}x {machine.shortage.card}": None
        for machine in report.asked
        if machine.shortage is not None and machine.shortage.cards_needed is not None
    }
    asks = [f"int8cli estimate-memory {name} --gpu {shlex.quote(cards)}" for cards in enough]
    return [*asks, f"int8cli convert {name} --dry-run"]


def after_convert(
    report: ConversionReport, model: str, output: Path, pushed: str | None = None, *, kept: bool = True
) -> list[str]:
    """To verify, load, evaluate and upload. `model` is what the user called it.

    `pushed` is the repository that has the conversion; without `kept`, its shards are only there.
    """
    directory = shlex.quote(str(output))
    if pushed is not None and not kept:
        copy = shlex.quote(f"{output.name}-copy")
        if "://" in pushed:
            return [f"int8cli status {directory}"]
        return [f"hf download {shlex.quote(pushed)} --local-dir {copy}", f"int8cli verify {copy}"]
    at = f" --revision {report.revision}" if report.revision else ""
    commands = [
        f"int8cli verify {directory}",
        f"int8cli evaluate {directory} --source {shlex.quote(shown_address(model))}{at}",
    ]
    if pushed is None:
        commands.append(f"int8cli push {directory} YOUR-NAME/{shlex.quote(output.name)}")
    in_vllm = compressed_tensors.vllm_reads(layer.name for layer in report.layers)
    if report.settings["layout"] == compressed_tensors.NAME and in_vllm:
        commands.insert(1, f"vllm serve {directory}")
    else:
        commands.insert(1, f"python -i -c {_quoted(f'import int8cli; model = int8cli.load_model({str(output)!r})')}")
    return commands


def _quoted(code: str) -> str:
    """For a shell, in double quotes where nothing in it has a meaning there: easier to read."""
    return shlex.quote(code) if any(character in code for character in '"$`\\!') else f'"{code}"'
