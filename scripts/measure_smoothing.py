"""Measure smoothing, exact and fine, on small random models in the shapes of several families.

Each gets outliers in six dimensions: the gains of its norms there are multiplied by SCALE, the columns that they meet
divided by it, and so are the rows of the first linear of OPT's feed-forward and the columns of its second. In floats
the function stays nearly the same. Random weights predict nothing, so only output errors are shown: the mean over the
int8 layers, and the worst. Needs the tokenizer of `make demo`:

    python scripts/measure_smoothing.py demo/SmolLM2-135M-Instruct
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import int8cli
from int8cli.results.evaluation import Evaluation

SCALE = 256.0
PLANTED = (3, 40, 77, 130, 200, 251)
WIDTH, LAYERS, HEADS, VOCABULARY = 256, 3, 4, 49_152
METHODS = (
    "vector-wise",
    "zeropoint-inputs",
    "bitsandbytes",
    "smoothed-vector-wise",
    "smoothed-zeropoint-inputs",
    "smoothed-bitsandbytes",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A family: its class and config, and the linears behind each norm, by the ends of their names.

    `rows`: linears whose rows are planted, with those that read them. `one_more`: gains are 1 + w.
    """

    name: str
    config: Mapping[str, Any]
    norms: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, str]
    one_more: bool = False


_GEMMA = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // HEADS,
    "intermediate_size": 4 * WIDTH,
    "vocab_size": VOCABULARY,
}
SHAPES = (
    Shape(
        "OPT",
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_dim": 4 * WIDTH,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
        },
        {"self_attn_layer_norm": ("q_proj", "k_proj", "v_proj"), "final_layer_norm": ("fc1",)},
        {"fc1": "fc2"},
    ),
    Shape(
        "Bloom",
        {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY},
        {"input_layernorm": ("query_key_value",), "post_attention_layernorm": ("dense_h_to_4h",)},
        {},
    ),
    Shape(
        "Gemma2",
        _GEMMA,
        {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "pre_feedforward_layernorm": ("gate_proj", "up_proj")},
        {"up_proj": "down_proj"},
        one_more=True,
    ),
    Shape(
        "Llama",
        {**_GEMMA, "max_position_embeddings": 1024},
        {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")},
        {"up_proj": "down_proj"},
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokenizer", type=Path, help="a directory with tokenizer files of SmolLM2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES])
    wanted = parser.parse_args()
    for shape in (each for each in SHAPES if each.name in wanted.shapes):
        with tempfile.TemporaryDirectory() as name:
            model = made(shape, Path(name) / shape.name, wanted.tokenizer)
            show(shape.name, model, wanted.tokens)


def made(shape: Shape, directory: Path, tokenizer: Path) -> Path:
    """Write a random model of a shape, planted, in bfloat16."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{shape.name}Config")(**shape.config)
    model = getattr(transformers, f"{shape.name}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        spread(model)
        plant(shape, model)
    model.save_pretrained(directory)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, directory)
    return directory


def spread(model: torch.nn.Module) -> None:
    """Gains and columns of unequal sizes, as trained models have them."""
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and "norm" in name and name.endswith("weight"):
            weight.add_(0.3 * torch.randn_like(weight))
        elif weight.dim() == 2 and "embed" not in name:
            weight.mul_(torch.exp(0.5 * torch.randn(weight.shape[1])).to(weight.dtype))


def plant(shape: Shape, model: torch.nn.Module) -> None:
    columns, added = list(PLANTED), float(shape.one_more)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def each(module: str, change: Callable[[Tensor], None], kinds: tuple[str, ...] = ("weight",)) -> None:
        for name, tensor in parameters.items():
            if any(name.endswith(f".{module}.{kind}") for kind in kinds):
                change(tensor)

    def enlarge(rows: Tensor) -> None:
        rows[columns] = (rows[columns] + added) * SCALE - added

    def enlarge_rows(rows: Tensor) -> None:
        rows[columns] *= SCALE

    def shrink(weight: Tensor) -> None:
        weight[:, columns] /= SCALE

    for norm, linears in shape.norms.items():
        each(norm, enlarge)
        each(norm, enlarge_rows, ("bias",))
        for linear in linears:
            each(linear, shrink)
    for first, second in shape.rows.items():
        each(first, enlarge_rows, ("weight", "bias"))
        each(second, shrink)


def show(name: str, model: Path, tokens: int) -> None:
    show_methods(name, METHODS, int8cli.evaluate(model, int8cli.EvaluateOptions(tokens=tokens, methods=METHODS)))
    smoothed = tuple(key for key in METHODS if key.startswith("smoothed"))
    fine = int8cli.EvaluateOptions(tokens=tokens, methods=smoothed, smooth="fine")
    show_methods(f"{name}, fine", smoothed, int8cli.evaluate(model, fine))


def show_methods(name: str, methods: tuple[str, ...], found: Evaluation) -> None:
    for key in methods:
        method = found.method(key)
        assert method is not None
        mean, worst = method.mean_error, method.worst_layer
        assert mean is not None
        assert worst is not None
        print(f"{name:12s} {key:28s} mean {mean:.4f}  worst {worst.error:.4f}  {worst.name}", flush=True)


if __name__ == "__main__":
    main()
