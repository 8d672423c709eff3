"""Prefill and decode of a model in 16 bit, in bitsandbytes' int8 and by load_model, in turns, in one process.

    python scripts/benchmark_inference.py demo/SmolLM2-135M-Instruct demo/SmolLM2-135M-Instruct-int8
    python scripts/benchmark_inference.py SOURCE INT8 --plain INT8_WITHOUT_COLUMNS --device cuda --json figures.json

`--plain` is a conversion without stored columns. A figure is the best of some rounds, in which the methods take turns,
so that what else the machine does meets all of them. Times are of the process's CPU on a processor, of the clock on a
GPU. vLLM and torchao have environments of their own: their figures are not made here.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

import int8cli
from int8cli.results.units import human_bytes

CONTEXT = 32
SIXTEEN_BIT = "transformers, 16 bit"


@dataclass(frozen=True, slots=True)
class Figures:
    """A method's best times in milliseconds, by batch for a decode step; what its weights take in memory."""

    method: str
    weights_bytes: int
    prefill_ms: float
    decode_ms: dict[int, float]


def methods(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each method's name, and what loads its model."""
    load = partial(AutoModelForCausalLM.from_pretrained, device_map={"": arguments.device})
    ours = partial(int8cli.load_model, device=arguments.device)
    yield SIXTEEN_BIT, partial(load, arguments.source, dtype="auto")
    if not arguments.without_bitsandbytes:
        yield "bitsandbytes, threshold 6", partial(load, arguments.int8)
        without = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        yield "bitsandbytes, threshold 0", partial(load, arguments.source, quantization_config=without)
    yield "load_model, zero-point", partial(ours, arguments.int8)
    yield "load_model, absmax", partial(ours, arguments.int8, inputs="absmax")
    if arguments.plain is not None:
        yield "load_model, absmax, no columns", partial(ours, arguments.plain, inputs="absmax")


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one run: CPU time on a processor, which other work does not add to; the clock on a GPU."""
    if device == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def prefill(model: Any, tokens: int) -> Callable[[], object]:
    ids = some_tokens(model, 1, tokens)
    return lambda: model(ids, use_cache=False)


def decode(model: Any, batch: int) -> Callable[[], object]:
    """A step with a token for each of `batch` sequences, after a short context. The cache grows by it."""
    ids = some_tokens(model, batch, CONTEXT)
    cache = model(ids, use_cache=True).past_key_values
    name = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
    return lambda: model(ids[:, -1:], use_cache=True, **{name: cache})


def some_tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, model.config.vocab_size - 1, (batch, length), generator=generator).to(model.device)


def measure(models: dict[str, Any], arguments: argparse.Namespace) -> list[Figures]:
    with torch.inference_mode():
        prefills = in_turns({name: prefill(model, arguments.tokens) for name, model in models.items()}, arguments)
        decodes = {
            batch: in_turns({name: decode(model, batch) for name, model in models.items()}, arguments)
            for batch in arguments.batches
        }
    return [
        Figures(
            name,
            int(model.get_memory_footprint()),
            1000 * prefills[name],
            {batch: 1000 * times[name] for batch, times in decodes.items()},
        )
        for name, model in models.items()
    ]


def in_turns(runs: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> dict[str, float]:
    """The best of all rounds for each, the methods taking turns; what runs for the first time is not counted."""
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run, arguments.device))
    return best


def show(found: list[Figures]) -> None:
    """Milliseconds, and how many times as fast as 16 bit."""
    base = next(each for each in found if each.method == SIXTEEN_BIT)
    batches = list(base.decode_ms)
    print("| | weights | prefill, ms | " + " | ".join(f"decode, batch {batch}, ms" for batch in batches) + " |")
    print("|---" * (3 + len(batches)) + "|")
    for each in found:
        cells = [f"{each.prefill_ms:,.0f} ({base.prefill_ms / each.prefill_ms:.2f})"]
        cells += [
            f"{each.decode_ms[batch]:,.1f} ({base.decode_ms[batch] / each.decode_ms[batch]:.2f})" for batch in batches
        ]
        print(f"| {each.method} | {human_bytes(each.weights_bytes)} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("int8", type=Path)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--without-bitsandbytes", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("bitsandbytes").setLevel("ERROR")
    found = measure({name: load().eval() for name, load in methods(arguments)}, arguments)
    show(found)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(each) for each in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
