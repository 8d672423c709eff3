"""What a conversion costs and saves: sizes, and predictions of both int8 loaders compared with the 16-bit model.

    python scripts/show_what_was_won.py MODEL CONVERTED [--tokens N]

`make demo` runs it. Fewer tokens than in docs/evaluate.md: standard errors are larger, and it takes about a minute.
"""

import argparse
import sys
from pathlib import Path

import int8cli
from int8cli.report.terminal import stdout_console, titled_table
from int8cli.results.evaluation import Evaluation, Scores
from int8cli.results.method_names import loaders_of
from int8cli.results.units import human_bytes

TOKENS = 2048
METHODS = ("16-bit", "bitsandbytes", "zeropoint-llm-int8-stored")


def scores_of(found: Evaluation, key: str) -> Scores:
    """The scores of a method. Raises SystemExit if it was not evaluated."""
    method = found.method(key)
    if method is None or method.scores is None:
        raise SystemExit(f"{key} was not evaluated")
    return method.scores


def show(found: Evaluation, source_bytes: int, output_bytes: int, sidecar_bytes: int) -> None:
    table = titled_table(f"What was won, on {found.text.tokens:,} tokens of text that chose nothing")
    table.add_column("")
    for name in ("weights on disk", "loss over 16 bit, nats", "same most likely token"):
        table.add_column(name, justify="right")
    table.add_row("16 bit", human_bytes(source_bytes), "", "")
    sizes = {"bitsandbytes": output_bytes, "zeropoint-llm-int8-stored": output_bytes + sidecar_bytes}
    for key, size in sizes.items():
        scores = scores_of(found, key)
        over, error, same = scores.nats_over_reference, scores.standard_error, scores.same_top_share
        assert over is not None
        assert error is not None
        assert same is not None
        loss = f"{over:+.4f} ± {error:.4f}"
        table.add_row(f"int8, {loaders_of(found)[key]}", human_bytes(size), loss, f"{100 * same:.1f} %")
    console = stdout_console()
    console.print_table(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("converted", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    arguments = parser.parse_args()
    report = int8cli.read_report(arguments.converted)
    print(f"Comparing predictions with those of the 16-bit model on {arguments.tokens:,} tokens: about a minute.")
    sys.stdout.flush()
    options = int8cli.EvaluateOptions(source=arguments.model, tokens=arguments.tokens, methods=METHODS)
    show(int8cli.evaluate(arguments.converted, options), report.source_bytes, report.output_bytes, report.sidecar_bytes)


if __name__ == "__main__":
    main()
