"""A conversion opens as the classes of other tasks, whose heads no checkpoint of the base model has."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import HEADS, LISTED, OTHERS, WITHOUT_COLUMNS, build_tiny
from test_plan import plan_of, spec

from int8cli import convert
from int8cli.commands.options import LayoutName
from int8cli.planning.absent_modules import FAMILY_TASK_HEADS
from int8cli.planning.layouts.skip_modules import ALL_RULES, skip_modules

IDS = torch.tensor([[4, 5, 6, 7]])
SOUND = torch.linspace(-1, 1, 4000)[None]
# Base model, class of another task, inputs.
TASKS: list[tuple[str, str, dict[str, Any]]] = [
    ("bert-base", "BertForNextSentencePrediction", {"input_ids": IDS}),
    ("bert-base", "BertForMultipleChoice", {"input_ids": IDS[None]}),
    ("distilbert", "DistilBertForSequenceClassification", {"input_ids": IDS}),
    ("distilbert", "DistilBertForMultipleChoice", {"input_ids": IDS[None]}),
    ("electra", "ElectraForMultipleChoice", {"input_ids": IDS[None]}),
    ("deberta-v2", "DebertaV2ForSequenceClassification", {"input_ids": IDS}),
    ("vit-base", "ViTForImageClassification", {"pixel_values": torch.ones(1, 3, 16, 16)}),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification", {"input_values": SOUND}),
    ("wav2vec2", "Wav2Vec2ForXVector", {"input_values": SOUND}),
]


@pytest.mark.parametrize(
    ("base", "task", "inputs"),
    [case for case in TASKS if case[0] in LISTED | HEADS | OTHERS],
    ids=lambda each: str(each),
)
def test_another_task_opens_and_runs(base: str, task: str, inputs: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    build_tiny((LISTED | HEADS | OTHERS)[base], torch.float32).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", WITHOUT_COLUMNS)
    torch.manual_seed(0)
    model = getattr(transformers, task).from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        output = model(**inputs)
    assert torch.isfinite(output[0]).all()


@pytest.mark.parametrize("layout", ["bitsandbytes", "compressed-tensors"])
@pytest.mark.parametrize("family", ["mpnet", "bert", "albert", "distilbert", "electra"])
def test_a_bare_model_opens_as_the_masked_one_that_its_config_names(
    family: str, layout: LayoutName, tmp_path: Path
) -> None:
    model = build_tiny((LISTED | HEADS | OTHERS)[family], torch.float32)
    name, bare = type(model).__name__, type(model.base_model)(model.config)
    bare.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text()) | {"architectures": [name]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "source", tmp_path / "out", dataclasses.replace(WITHOUT_COLUMNS, layout=layout))
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(loaded(input_ids=IDS).logits).all()


@pytest.mark.parametrize("head", FAMILY_TASK_HEADS)
def test_heads_of_a_family_are_left_alone_by_every_rule(head: str) -> None:
    for family in FAMILY_TASK_HEADS[head]:
        plan = plan_of(spec("layers.0.attention.q_proj.weight", 8, 8), config={"model_type": family})
        entries = skip_modules(plan)
        for rule in ALL_RULES:
            assert any(rule(entry, head) for entry in entries), (family, entries)
            assert not any(rule(entry, "layers.0.attention.q_proj") for entry in entries)
