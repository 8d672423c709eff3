"""Models that see: vLLM computes their language models in int8, and answers as torch does over a picture."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import is_known
from support.in_vllm import LOST, SAME, Vllm, converted, relative_error
from support.seeing import SEEING, Seeing, picture, save_seeing
from torch import Tensor

from int8cli import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and numpy warn of their own affairs

FLOAT, INT8 = "UnquantizedLinearMethod", "CompressedTensorsW8A8Int8"
LANGUAGE_MODEL = re.compile(r"(?:^|\.)(?:language_model|text_model)\.(?!.*(?:\.mlp\.gate|_expert_gate|\.conv1d)$)")
# One value that is rounded up here and down there moves all tokens behind it: so three texts, and their median.
BEFORE, BEHIND = ("", "Look: ", "This was seen: "), "What is to be seen here, and where?"


def seen_by(model: Any, seeing: Seeing, texts: Iterable[str]) -> tuple[list[list[int]], Tensor]:
    """The tokens of each text with its picture, and the log-probabilities (positions, tokens) but for their first."""
    ids, rows = [], []
    for text in texts:
        given = seeing.processor()(text=text, images=[picture()], return_tensors="pt")
        given.pop("labels", None)
        with torch.no_grad():
            rows.append(model(**given).logits[0, :-1])
        ids.append(given["input_ids"][0].tolist())
    return ids, torch.cat(rows).log_softmax(dim=-1)


@pytest.mark.parametrize("family", SEEING)
def test_vllm_sees_with_an_int8_language_model_what_torch_sees(family: str, vllm: Vllm, tmp_path: Path) -> None:
    seeing = SEEING[family]
    if not is_known(seeing.tiny):
        pytest.skip(f"this transformers has no {seeing.tiny.model}")
    source = save_seeing(seeing, tmp_path / "source")
    output = converted(source, tmp_path / "int8")
    picture().save(tmp_path / "picture.png")
    texts = [f"{before}{seeing.picture}{BEHIND}" for before in BEFORE]
    floats = vllm.open(source, texts, dtype=seeing.dtype, picture=tmp_path / "picture.png")
    found = vllm.open(output, texts, dtype=seeing.dtype, picture=tmp_path / "picture.png")
    linears = {name for name, kind in floats.layers.items() if kind == FLOAT}
    in_int8 = {name for name in linears if found.layers[name] == INT8}
    assert in_int8 == {name for name in linears if LANGUAGE_MODEL.search(name)}
    assert {found.layers[name] for name in linears - in_int8} == {FLOAT}
    model = load_model(output, inputs="absmax", device="cpu", dtype=torch.float32)
    ids, expected = seen_by(model, seeing, texts)
    assert found.ids == floats.ids == ids
    error, lost = relative_error(found.logprobs, expected), relative_error(found.logprobs, floats.logprobs)
    print(f"{family}: {error} from torch, {lost} from floats")
    assert error.median < SAME or not seeing.alike
    assert lost.median < LOST
