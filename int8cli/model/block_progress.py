"""Messages about a pass over the blocks of a model. Needs no torch."""

from collections.abc import Collection, Mapping

from int8cli.progress import STEPS, Progress
from int8cli.results.units import human_bytes


def begin_blocks(
    progress: Progress,
    task: str,
    blocks: Mapping[str, int],
    *,
    steps: int,
    tokens: int,
    methods: int = 1,
    finished: Collection[str],
) -> None:
    """Begin a task whose parts are the blocks, with `steps` steps each, and announce it.

    `blocks` maps each block to the bytes of its weights. Each of the `methods` runs all `tokens`.
    """
    largest = human_bytes(max(blocks.values(), default=0))
    work = f"{tokens:,} tokens × {methods} methods" if methods > 1 else f"{tokens:,} tokens"
    progress.note(f"running {work} through {len(blocks)} blocks of up to {largest}, one in memory at a time")
    already = [name for name in blocks if name in finished]
    if already:
        progress.note(f"resuming: {len(already)} of {len(blocks)} blocks already run")
    progress.begin(task, dict.fromkeys(blocks, steps), unit=STEPS, finished=already)
