"""Models that have something to smooth, and their smoothed 16-bit copies."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from int8cli.checkpoint.locate import opened_source
from int8cli.llm_int8.limits import MAX_EXPONENT
from int8cli.llm_int8.scales import powers_of_two
from int8cli.model.sampling import Sampling
from int8cli.outliers.calibrate import CalibrateOptions, calibrate
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.survey import survey_source
from int8cli.progress import SILENT
from support.calibration_models import some_text


def spread(model: Any) -> None:
    """Gains and columns of unequal sizes, so that there is something to smooth."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name and "wte" not in name:
            weight.mul_(8.0)
            weight.mul_(2.0 ** torch.randint(-2, 3, (1, weight.shape[1]), generator=generator))
        elif weight.dim() == 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) + weight)


def planted(model: Any) -> None:
    """Two input dimensions of every norm-fed linear become outliers; the function stays as it is."""
    spread(model)
    for name, weight in model.named_parameters():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            weight[[3, 20]] *= 256.0
        elif name.endswith(tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "gate", "up"))):
            weight[:, [3, 20]] /= 256.0


def smoothed_statistics(directory: Path, **options: Any) -> OutlierStatistics:
    with opened_source(str(directory), revision=None, download_dir=directory / "incoming") as source:
        how = CalibrateOptions(Sampling(48, 16, 0), smooth=True, **options)
        return calibrate(source, survey_source(source, PlanOptions()), some_text(), how, SILENT)


def smoothed_copy(directory: Path, output: Path, statistics: OutlierStatistics, transposed: bool) -> None:
    """Write the smoothed 16-bit model, straight from the statistics."""
    tensors = load_file(directory / "model.safetensors")
    for site in statistics.sites:
        if site.smoothing is None:
            continue
        for linear in site.linears:
            scale(tensors, f"{linear.name}.weight", site.smoothing.exponents, 0 if transposed else 1)
        for scaled in site.smoothing.scaled:
            matrix = tensors[scaled.tensor].dim() == 2
            scale(tensors, scaled.tensor, scaled.exponents, 1 if matrix and transposed else 0)
    output.mkdir()
    for file in directory.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (output / file.name).write_bytes(file.read_bytes())
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def change_exponents(file: Path) -> str:
    """Add 1 to the column exponents of one site in a statistics file. Returns the site."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(".smooth_exponents"))
    assert int(tensors[name].max()) < MAX_EXPONENT
    tensors[name] += 1
    save_file(tensors, file, metadata=metadata)
    return name.removesuffix(".smooth_exponents")


def scale(tensors: dict[str, Tensor], name: str, exponents: Tensor, dim: int) -> None:
    tensor = tensors[name]
    shape = [-1 if place == dim else 1 for place in range(tensor.dim())]
    tensors[name] = tensor * powers_of_two(exponents, tensor.dtype).reshape(shape)
