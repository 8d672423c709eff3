"""Models that transformers opens in no compressed-tensors, because it computes weights from others: convert warns."""

from pathlib import Path

import pytest
import torch
import transformers
from support.checkpoints import OTHERS, build_tiny
from support.verifying import verified

from int8cli import ConvertOptions, SilentProgress, convert, load_model
from int8cli.loaders.conversions import CUT_HEADS, MERGED, SPLITS, fails_on_load

SINCE = pytest.mark.skipif(
    transformers.__version__.startswith(("4.", "5.0.")), reason="these versions have other rules, or none"
)


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def model_type_of(key: str) -> str:
    """The model type of a key of transformers' table of rules: a model type, or a class."""
    from transformers import CONFIG_MAPPING

    if key in CONFIG_MAPPING:
        return key
    made_for = getattr(transformers, key, None)
    return made_for.config_class.model_type if made_for is not None else key


@SINCE
def test_the_tables_are_those_of_the_installed_transformers() -> None:
    """Rules for experts apart: that transformers reads none of these, one by one, is another warning."""
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    splits, merged, changed = set(), set(), set()
    for key, rules in _build_checkpoint_conversion_mapping().items():
        for rule in rules:
            if not isinstance(rule, WeightConverter):
                continue
            sources, targets = rule._original_source_patterns, rule._original_target_patterns
            if not all(source.endswith(".weight") for source in sources):
                continue
            if len(targets) > 1:
                splits.add(model_type_of(key))
            elif len(sources) == 1 and "*" not in sources[0]:
                changed.add(model_type_of(key))
            elif key != "minimax_m3_vl":  # a mixture whose experts are always one by one
                merged |= {source.replace("*", "0") for source in sources if "expert" not in source}
    assert splits - {"UnlimitedOcrVisionEncoder"} <= SPLITS  # that class is in no public module
    assert changed <= SPLITS | CUT_HEADS
    assert {source for source in merged if not MERGED.search(source)} == set()
    assert splits
    assert merged


@SINCE
def test_convert_warns_of_a_model_whose_rules_split_weights(tmp_path: Path) -> None:
    """Even where the checkpoint has none of these weights. load_model opens it."""
    build_tiny(OTHERS["dinov2"], torch.bfloat16).save_pretrained(tmp_path / "source")
    notes = Notes()
    options = ConvertOptions(outliers="none", layout="compressed-tensors")
    output = convert(tmp_path / "source", tmp_path / "out", options, progress=notes).output
    (said,) = (note for note in notes.said if "transformers 5.24 cannot open this" in note)
    assert "such as those of dinov2" in said
    loads = next(check for check in verified(output).checks if check.name == "loads")
    assert loads.failures
    assert load_model(output) is not None


def test_models_inside_others_count_and_so_do_names() -> None:
    assert fails_on_load([], {"model_type": "llama"}) is None
    assert fails_on_load([], {"model_type": "depth_anything", "backbone_config": {"model_type": "dinov2"}})
    assert fails_on_load(["model.layers.0.linear_attn.q_conv1d.weight"], {}) is not None
    assert fails_on_load(["lm_head.weight"], {"model_type": "inkling2_text"}) == "lm_head.weight"
    assert fails_on_load(["embed_tokens.weight"], {"model_type": "inkling2_text"}) is None
    assert fails_on_load(["model.layers.0.conv1d.weight"], {"text_config": {"model_type": 7}}) is None
