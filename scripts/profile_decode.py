"""What the time of a decode step goes to: the linears of a model by their parts, and everything else.

    python scripts/profile_decode.py demo/SmolLM2-135M-Instruct demo/SmolLM2-135M-Instruct-int8

CPU milliseconds on one thread, for one sequence after 32 tokens, the best of some rounds. Each part is run alone, for
all linears in the order of the model, so that weights come from memory as they do in a step. "Without linears" is a
step in which linears return zeros. "Calls" is what the parts do not explain: calls, and small tensors that are no
longer in the cache once a weight has passed through it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from inference_subject import TransformersModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import int8cli
from int8cli.llm_int8.matmul import Int8Weight, _quantized_in_place, _vectorwise
from int8cli.runtime.linear import Int8Linear


def best_ms(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        times.append(1000 * (time.process_time() - begin))
    return min(times)


def step_ms(model: Any, rounds: int) -> float:
    subject = TransformersModel(model, "cpu")
    return best_ms(lambda: subject.decode(1), rounds)


def without_linears_ms(model: Any, linears: Sequence[Any], rounds: int) -> float:
    for linear in linears:
        linear.forward = lambda x, size=linear.out_features: x.new_zeros(*x.shape[:-1], size)
    try:
        return step_ms(model, rounds)
    finally:
        for linear in linears:
            del linear.forward


def all_ms(run: Callable[[Any, Tensor], object], linears: Sequence[Any], rounds: int) -> float:
    """A function for each linear with an input of one token."""
    pairs = [(linear, torch.randn(1, 1, linear.in_features).bfloat16()) for linear in linears]
    return best_ms(lambda: [run(*pair) for pair in pairs], rounds)


def weight_of(layer: Int8Linear) -> Int8Weight:
    data = layer._data if layer.packed is None else layer.packed
    return Int8Weight(data, layer.step, layer.row_sums, layer.columns, layer.column_weight)


def parts_ms(layers: Sequence[Int8Linear], rounds: int) -> dict[str, float]:
    weights = {layer: weight_of(layer) for layer in layers}
    quantized = {
        layer: _quantized_in_place(torch.randn(1, layer.in_features), "zeropoint", has_zero=True) for layer in layers
    }

    def product(layer: Int8Linear, _: Tensor) -> None:
        layer.packed.product(quantized[layer].values) if layer.packed is not None else None

    def scaled(layer: Int8Linear, _: Tensor) -> None:
        _vectorwise(quantized[layer], weights[layer], offset=True)

    def quantize(layer: Int8Linear, inputs: Tensor) -> None:
        _quantized_in_place(inputs.reshape(1, -1).to(torch.float32, copy=True), "zeropoint", has_zero=True)

    def columns(layer: Int8Linear, inputs: Tensor) -> None:
        values = quantized[layer].values
        kept = values.index_select(1, layer.columns)
        values.index_fill_(1, layer.columns, 0.0)
        values.new_empty(1, layer.out_features).addmm_(kept, layer.column_weight)

    def cast(layer: Int8Linear, inputs: Tensor) -> None:
        outputs[layer].to(torch.bfloat16).contiguous().reshape(1, 1, -1)

    outputs = {layer: torch.zeros(1, layer.out_features) for layer in layers}
    products_ms = all_ms(product, layers, rounds)
    return {
        "int8 products": products_ms,
        "input to int8": all_ms(quantize, layers, rounds),
        "zero points and scales": all_ms(scaled, layers, rounds) - products_ms,
        "stored columns": all_ms(columns, layers, rounds),
        "cast of the output": all_ms(cast, layers, rounds),
    }


def linears_of(model: Any, kind: type[nn.Module]) -> list[Any]:
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, kind) and module is not head]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("int8")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    floats: Any = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.bfloat16)
    ours = int8cli.load_model(arguments.int8, device="cpu")
    with torch.inference_mode():
        for name, model, kind in (("16 bit", floats, nn.Linear), ("load_model", ours, Int8Linear)):
            linears = linears_of(model, kind)
            found = {"a step": step_ms(model, arguments.rounds)}
            found["without linears"] = without_linears_ms(model, linears, arguments.rounds)
            found["linears"] = all_ms(lambda linear, inputs: linear(inputs), linears, arguments.rounds)
            if kind is Int8Linear:
                parts = parts_ms(linears, arguments.rounds)
                found |= parts | {"calls": found["linears"] - sum(parts.values())}
            head = model.get_output_embeddings()
            found["output head"] = all_ms(lambda linear, inputs: linear(inputs), [head], arguments.rounds)
            print(f"{name}, {len(linears)} linears: " + ", ".join(f"{key} {ms:.1f}" for key, ms in found.items()))


if __name__ == "__main__":
    main()
