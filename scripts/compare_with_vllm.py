"""Compare the perplexity of a model and its conversions in vLLM with what `evaluate` says. Needs vLLM's environment:

    .venv-vllm/bin/python scripts/compare_with_vllm.py demo/SmolLM2-135M-Instruct --sequences 16 --length 1024

For 16 bit and each kind of inputs of the compressed-tensors layout, smoothed as `convert` smooths it, on the held-out
text: in the dtype of config.json, and in float32 with the same weights, where rounding hides nothing.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.in_vllm import Vllm  # noqa: E402
from support.vllm_perplexity import Amount, Compared, compared, converted_for_vllm, in_float32  # noqa: E402

from int8cli import InspectOptions, inspect_outliers  # noqa: E402
from int8cli.outliers.statistics import OutlierStatistics  # noqa: E402
from int8cli.outliers.statistics_file import save_statistics  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="a directory with a 16-bit model that vLLM runs")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of each sequence")
    parser.add_argument("--not-smoothed", action="store_true", help="int8 of the weights as they are")
    parser.add_argument("--only-float32", action="store_true", help="not in the dtype of config.json")
    wanted = parser.parse_args()
    amount = Amount(wanted.sequences, wanted.length)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        smooth = None if wanted.not_smoothed else statistics_of(wanted.model, scratch / "statistics.safetensors")
        outputs = converted_for_vllm(wanted.model, scratch, smooth)
        models = {"float32": in_float32(wanted.model, scratch / "float32")}
        if not wanted.only_float32:
            models = {"as in config.json": wanted.model, **models}
        vllm = Vllm()
        for dtype, model in models.items():
            print(
                f"\n{dtype}, {amount.sequences} x {amount.length} tokens: nats in vLLM, by evaluate, difference ± s.e."
            )
            for method, found in compared(model, outputs, amount, vllm).items():
                print(f"{method:<20}{line(found)}", flush=True)
        vllm.close()


def statistics_of(model: Path, path: Path) -> Path:
    found = inspect_outliers(model, InspectOptions(smooth=True))
    assert isinstance(found, OutlierStatistics)
    save_statistics(found, path)
    return path


def line(found: Compared) -> str:
    """The means over all tokens, and the standard error of their difference by sequence."""
    ours, other = statistics.fmean(found.vllm), statistics.fmean(found.evaluate)
    count = len(found.differences)
    error = statistics.stdev(found.differences) / count**0.5 if count > 1 else float("nan")
    return f"{ours:9.5f}{other:10.5f}{ours - other:+10.5f} ± {error:.5f}"


if __name__ == "__main__":
    main()
