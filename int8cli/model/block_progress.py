"""What is said of a pass over a model's blocks. Needs no torch."""

from collections.abc import Collection, Mapping

from int8cli.progress import STEPS, Progress
from int8cli.results.units import human_bytes


def begin_blocks(
    progress: Progress, task: str, blocks: Mapping[str, int], *, steps: int, tokens: int, finished: Collection[str]
) -> None:
    """Begin a task with the blocks as its parts, `steps` each, and say what it will do.

    `blocks` has the bytes of each block's weights. `tokens` is how many are run, by all methods together.
    """
    largest = human_bytes(max(blocks.values(), default=0))
    progress.note(f"running {tokens:,} tokens through {len(blocks)} blocks of up to {largest}, one in memory at a time")
    already = [name for name in blocks if name in finished]
    if already:
        progress.note(f"resuming: {len(already)} of {len(blocks)} blocks already run")
    progress.begin(task, dict.fromkeys(blocks, steps), unit=STEPS, finished=already)
