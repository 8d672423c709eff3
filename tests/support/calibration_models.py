"""Tiny models that can run on text: checkpoints with a tokenizer, and calibrations of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from int8cli.checkpoint.locate import opened_source
from int8cli.model.sampling import Sampling
from int8cli.model.text import Text
from int8cli.outliers.calibrate import CalibrateOptions, calibrate
from int8cli.outliers.statistics import OutlierStatistics
from int8cli.planning.decisions import PlanOptions
from int8cli.planning.survey import survey_source
from int8cli.progress import SILENT, Progress
from support.checkpoints import HEADS, LISTED, OTHERS, build_tiny

WORDS = [f"w{index}" for index in range(90)]


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of 90 words and a few special tokens, as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(directory)


def make_model(
    architecture: str,
    directory: Path,
    change: Callable[[Any], None] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **save_kwargs: Any,
) -> Path:
    """Save a tiny model, with its weights changed if wanted, and a tokenizer."""
    model = build_tiny((LISTED | HEADS | OTHERS)[architecture], dtype)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(directory, **save_kwargs)
    save_tokenizer(directory)
    return directory


def some_text(words: int = 200, seed: int = 0) -> Text:
    places = torch.randint(0, len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return Text.decode("words", " ".join(WORDS[place] for place in places.tolist()).encode())


def calibrated(
    directory: Path,
    *,
    text: Text | None = None,
    tokens: int = 48,
    sequence_length: int = 16,
    seed: int = 0,
    state_directory: Path | None = None,
    progress: Progress = SILENT,
) -> OutlierStatistics:
    """Calibrate a checkpoint on some words."""
    with opened_source(str(directory), revision=None, download_dir=directory / "incoming") as source:
        options = CalibrateOptions(Sampling(tokens, sequence_length, seed), state_directory=state_directory)
        return calibrate(source, survey_source(source, PlanOptions()), text or some_text(), options, progress)
