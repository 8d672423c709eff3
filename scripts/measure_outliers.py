"""Run inspect-outliers on a real model, and on copies with planted outliers: reproduces the figures in the docs.

    python scripts/measure_outliers.py demo/SmolLM2-135M-Instruct

Prints the systematic features and massive activations, the predicted and measured output errors of the linears, which
planted dimensions were found, the average precision of the suspects, and the peak memory of a streamed run compared
with loading the model. Takes about ten minutes on two cores.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from int8cli.checkpoint.locate import open_source
from int8cli.checkpoint.torch_tensors import CheckpointTensors
from int8cli.data import SAMPLE_NAME, sample_text
from int8cli.llm_int8.quantize import quantize_rowwise
from int8cli.model.files import model_files
from int8cli.model.memory import return_memory_promptly
from int8cli.model.sampling import Sampling
from int8cli.model.sites import weight_of
from int8cli.model.skeleton import build_skeleton
from int8cli.model.stream import StreamedModel
from int8cli.model.text import Text, sequences_of
from int8cli.outliers.calibrate import CalibrateOptions, calibrate
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.outliers.suspects import find_suspects
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.survey import survey_source
from int8cli.progress import SILENT
from int8cli.report.outliers import grouped_massive, ranges

PLANTED = (5, 100, 200, 333, 444, 570)
TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    arguments = parser.parse_args()
    return_memory_promptly()
    found = calibrated(arguments.model, arguments.tokens)
    show_found(found)
    show_suspects(arguments.model, found)
    show_predictions(arguments.model, found)
    for scale in (32, 256):
        with tempfile.TemporaryDirectory() as name:
            planted = plant(arguments.model, Path(name) / "planted", scale)
            show_planted(arguments.model, planted, scale, min(arguments.tokens, 2048))
    show_memory(arguments.model)


def calibrated(model: Path, tokens: int) -> OutlierStatistics:
    source = open_source(str(model), revision=None, download_dir=model / "incoming")
    options = CalibrateOptions(Sampling(tokens, 512, 0))
    text = Text.decode(SAMPLE_NAME, sample_text())
    return calibrate(source, survey_source(source, PlanOptions()), text, options, SILENT)


def show_found(found: OutlierStatistics) -> None:
    print(f"{found.provenance.model}, {found.provenance.tokens:,} tokens of {found.provenance.text}")
    for located in found.features():
        f = located.feature
        peaks = sorted(float(site.inputs.absmax[f.dimension]) for site in found.sites if site.kind == "norm-fed")
        print(
            f"  feature {f.dimension}: {len(located.layers)} of {located.layer_count} layers "
            f"({ranges(located.layers)}), {f.position_share:.1%} of the positions, sign {f.sign}, "
            f"largest {f.largest:.2f} (of all sites {peaks[-1]:.2f})"
        )
    for group in grouped_massive(found.massive())[:4]:
        print(
            f"  massive: {group.kind} {group.dimension}, layers {ranges(group.layers)}, {group.largest:,.0f} "
            f"at position {ranges(group.positions)}, later at most {group.later:,.1f}"
        )


def show_suspects(model: Path, found: OutlierStatistics) -> None:
    """Print the average precision of the ranking by weights, as a mean over the norms with outliers."""
    source = open_source(str(model), revision=None, download_dir=model / "incoming")
    suspects = find_suspects(source, survey_source(source, PlanOptions()))
    [layers] = found.norm_fed_layers().values()
    sites = [site for number in sorted(layers) for site in layers[number]]
    precisions = []
    for site, suspected in zip(sites, suspects.sites, strict=True):
        true = site.inputs.absmax >= found.provenance.threshold
        if bool(true.any()):
            hits = true[suspected.score.argsort(descending=True)].double()
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            precisions.append(float((precision * hits).sum() / hits.sum()))
    features = {located.feature.dimension for located in found.features()}
    ranks = [place for place, suspect in enumerate(suspects.suspects, 1) if suspect.dimension in features]
    print(
        f"  suspects: true features at ranks {ranks} of {len(suspects.suspects)}; "
        f"mean average precision {statistics.mean(precisions):.2f} over {len(precisions)} norms with outliers"
    )


def show_predictions(model: Path, found: OutlierStatistics) -> None:
    """Compare predicted output errors with those of real int8 products of the same inputs."""
    sites = {linear.name: site for site in found.sites for linear in site.linears}
    linears = {linear.name: linear for site in found.sites for linear in site.linears}
    measured = dict(measured_errors(model, found.provenance.tokens))
    for title, place, int8_inputs in (("int8 weights", 0, False), ("vector-wise", 1, True)):
        pairs = [
            (sites[name].predicted_error(linears[name], int8_inputs=int8_inputs), errors[place])
            for name, errors in measured.items()
        ]
        ratios = [predicted / true for predicted, true in pairs]
        print(
            f"  {title}: rank correlation of predicted and measured {rank_correlation(pairs):.3f}, median ratio "
            f"{statistics.median(ratios):.3f}, mean error {statistics.mean(true for _, true in pairs):.4f} "
            f"({len(pairs)} linears)"
        )


def measured_errors(model: Path, tokens: int) -> Iterator[tuple[str, tuple[float, float]]]:
    """The relative output error of each linear with int8 weights, and with int8 inputs too, in float32 products."""
    source = open_source(str(model), revision=None, download_dir=model / "incoming")
    survey = survey_source(source, PlanOptions())
    with model_files(source, survey.weights) as directory, CheckpointTensors(source, survey.shards) as tensors:
        skeleton = build_skeleton(directory, tensors.specs)
        text = Text.decode(SAMPLE_NAME, sample_text())
        sequences = sequences_of(text, directory, skeleton.model.config, Sampling(tokens, 512, 0))
        stream = StreamedModel(skeleton, tensors)
        for unit in stream.units(sequences):
            sums: dict[str, torch.Tensor] = {}
            handles = []
            for name, linear in unit.linears.items():
                weight = weight_of(linear).float()
                int8 = dequantized(weight_of(linear))

                def compare(module, inputs, name=name, weight=weight, int8=int8, sums=sums) -> None:
                    x = inputs[0].reshape(-1, weight.shape[1])
                    exact = x.float() @ weight.T
                    errors = [x.float() @ int8.T - exact, dequantized(x) @ int8.T - exact]
                    squares = torch.stack([value.double().square().sum() for value in (*errors, exact)])
                    sums[name] = sums.get(name, torch.zeros(3, dtype=torch.float64)) + squares

                handles.append(linear.register_forward_pre_hook(compare))
            unit.run()
            for handle in handles:
                handle.remove()
            for name, (weights_only, both, exact) in sums.items():
                yield name, (float((weights_only / exact).sqrt()), float((both / exact).sqrt()))


def dequantized(rows: torch.Tensor) -> torch.Tensor:
    data, absmax = quantize_rowwise(rows)
    return data.float() * (absmax / 127)[:, None]


def rank_correlation(pairs: list[tuple[float, float]]) -> float:
    ranks = [torch.tensor(values).argsort().argsort().double() for values in zip(*pairs, strict=True)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def plant(model: Path, output: Path, scale: int) -> Path:
    """Make a copy that computes the same function: some gains are multiplied by `scale`, the next columns divided."""
    shutil.copytree(model, output)
    columns, norms = list(PLANTED), ("input_layernorm.weight", "post_attention_layernorm.weight")
    fed = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))
    for shard in output.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        for name, tensor in tensors.items():
            if name.endswith(norms):
                tensor[columns] *= scale
            elif name.endswith(fed):
                tensor[:, columns] /= scale
        save_file(tensors, shard, metadata={"format": "pt"})
    return output


def show_planted(model: Path, planted: Path, scale: int, tokens: int) -> None:
    found = calibrated(planted, tokens)
    norm_fed = [site for site in found.sites if site.kind == "norm-fed"]
    by_dimension = [sum(bool(site.inputs.share_over[d] > 0) for site in norm_fed) for d in PLANTED]
    named = {located.feature.dimension for located in found.features()}
    print(
        f"  planted x{scale}: logits bit-identical {same_logits(model, planted)}; found at "
        f"{', '.join(map(str, by_dimension))} of {len(norm_fed)} sites; "
        f"{len(named & set(PLANTED))} of {len(PLANTED)} named as systematic features, beside "
        f"{sorted(named - set(PLANTED))}"
    )


def same_logits(first: Path, second: Path) -> bool:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(100, 40_000, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(path, dtype="auto")(ids).logits for path in (first, second))
    return torch.equal(one, other)


WHOLE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
with torch.no_grad():
    model.model(torch.randint(100, 40_000, (int(sys.argv[2]) // 512, 512)), use_cache=False)
"""
IMPORTS = "import torch, transformers, transformers.models.llama.modeling_llama, int8cli.outliers.calibrate"


def show_memory(model: Path) -> None:
    """Print the peak resident memory of separate processes. The first one only imports."""
    imports = peak_bytes([sys.executable, "-c", IMPORTS])
    print(f"  memory: imports alone {imports / 1e6:,.0f} MB")
    for tokens in (2048, 8192):
        with tempfile.TemporaryDirectory() as work:
            streamed = peak_bytes(
                [
                    *(
                        sys.executable,
                        "-m",
                        "int8cli",
                        "inspect-outliers",
                        str(model),
                        "--quiet",
                        "--from",
                        "activations",
                    ),
                    *("--tokens", str(tokens), "--work-dir", work),
                ]
            )
        whole = peak_bytes([sys.executable, "-c", WHOLE, str(model), str(tokens)])
        print(
            f"  memory at {tokens:,} tokens, above the imports: streamed {(streamed - imports) / 1e6:,.0f} MB, "
            f"the model whole in one batch {(whole - imports) / 1e6:,.0f} MB"
        )


def peak_bytes(command: list[str]) -> int:
    """The peak resident memory of a command, as counted by the kernel."""
    runner = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", runner, *command], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return int(result.stdout) * unit


if __name__ == "__main__":
    main()
