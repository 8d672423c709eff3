"""lm-eval judges a model of `load_model`. It brings many packages, so that it runs in `make test-lm-eval` alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration_models import WORDS, make_model, some_text
from support.checkpoints import WITHOUT_COLUMNS

import int8cli
from int8cli import convert

lm_eval: Any = pytest.importorskip("lm_eval")
SENTENCE = " ".join(WORDS[:6])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judged")
    make_model("llama", root / "model")
    convert(root / "model", root / "out", WITHOUT_COLUMNS)
    return root / "out"


@pytest.fixture
def judge(directory: Path) -> Any:
    """lm-eval's own class for models of transformers, with a model as it comes from `load_model`, and no tokenizer."""
    from lm_eval.models.huggingface import HFLM

    made = HFLM(pretrained=int8cli.load_model(directory, device="cpu"), batch_size=2)
    made.tokenizer.eos_token = made.tokenizer.convert_ids_to_tokens(1)  # lm-eval decodes one
    return made


def log_likelihood(judge: Any, text: str, start: int) -> float:
    """Of all tokens from `start` on, given those before."""
    ids = torch.tensor([judge.tok_encode(text)])
    with torch.inference_mode():
        log_odds = judge.model(ids).logits[0].float().log_softmax(dim=-1)
    return sum(float(log_odds[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def test_lm_eval_takes_the_model_and_finds_its_tokenizer(judge: Any) -> None:
    from lm_eval.api.instance import Instance

    pairs = [(SENTENCE, f" {SENTENCE}"), (SENTENCE, f" {SENTENCE} {SENTENCE}")]
    requests = [Instance("loglikelihood", {}, arguments=pair, idx=number) for number, pair in enumerate(pairs)]
    found = judge.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        expected = log_likelihood(judge, context + continuation, len(judge.tok_encode(context)))
        assert value == pytest.approx(expected, rel=1e-2)  # lm-eval adds in bfloat16


@pytest.mark.filterwarnings("default")  # warnings of lm-eval and datasets are none of ours
def test_a_task_of_lm_eval_is_run(judge: Any, tmp_path: Path) -> None:
    """With texts from a file in place of the Hub's."""
    texts = [some_text(20, seed).text for seed in range(3)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "perplexity_of_texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    found = lm_eval.simple_evaluate(model=judge, tasks=[task], bootstrap_iters=0)
    perplexity = found["results"]["perplexity_of_texts"]["word_perplexity,none"]
    prefix = judge.tokenizer.decode([judge.prefix_token_id])
    total = sum(log_likelihood(judge, f"{prefix} {text}", 1) for text in texts)
    words = sum(len(text.split()) for text in texts)
    assert perplexity == pytest.approx(float(torch.tensor(-total / words).exp()), rel=1e-2)
