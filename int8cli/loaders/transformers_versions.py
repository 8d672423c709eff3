"""Differences between versions of transformers' bitsandbytes path, and the versions in which they were observed.

The only place for such facts. `architectures` has the facts that are true in every surveyed version. The plan follows
both, so that the output loads correctly in all of them. scripts/survey_architectures.py, run in an environment with one
version, prints where these tables and that version differ: run it for each new release, and add what it reports.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# The versions that were surveyed, oldest first. A fact that is "since" one of them was not in the one before.
SURVEYED = ("4.57.6", "5.0.0", "5.23.0", "5.24.0")

# Running a model block by block, and load_model, use parts of transformers 5's loader (core_model_loading), which
# transformers 4 does not have.
OLDEST_THAT_RUNS = "5.0.0"

# 4.57.6 and 5.0.0 also replace subclasses of nn.Linear (falcon's, torch's MultiheadAttention); later versions do not.
# These layers stay floats in the file and are named in `llm_int8_skip_modules`.
# 4.57.6 also quantizes a float weight that it finds for an int8 layer; later versions refuse it.


def is_misread(module: str) -> bool:
    """Whether a surveyed version would look for the scales of an int8 layer of this name in the wrong place.

    5.0.0 takes the first "weight" or "SCB" in a tensor's name for its end. The scales of an int8 `attention_weights` or
    `weight_proj` are then lost, and the model fails. 4.57.6 and the versions from 5.23.0 on read them.
    """
    return "weight" in module or "SCB" in module


def covers_by_name(entry: str, module: str) -> bool:
    """4.57.6: a module whose name or last component equals the entry, and everything inside it (no expressions)."""
    return entry in (module, module.rpartition(".")[2]) or f"{entry}." in module


def covers_by_prefix(entry: str, module: str) -> bool:
    """5.0.0: a suffix of the name, or a regular expression that matches from its start, ending anywhere."""
    return module.endswith(entry) or re.match(entry, module) is not None


_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def covers_by_component(entry: str, module: str) -> bool:
    """5.23.0, 5.24.0: a suffix of the name, or an expression that matches from its start up to a dot or its end."""
    return module.endswith(entry) or re.match(rf"(?:{entry}){_BOUNDARY}", module) is not None


# (an entry of `llm_int8_skip_modules`, a module's name) → whether the entry covers the module.
SkipRule = Callable[[str, str], bool]

SKIP_RULES: dict[str, SkipRule] = {
    "4.57.6": covers_by_name,
    "5.0.0": covers_by_prefix,
    "5.23.0": covers_by_component,
    "5.24.0": covers_by_component,
}


def skip_rule(version: str) -> SkipRule:
    """The rule of a version, or of the last surveyed version before it."""
    known = [each for each in SKIP_RULES if release(each) <= release(version)]
    return SKIP_RULES[known[-1] if known else SURVEYED[0]]


@dataclass(frozen=True, slots=True)
class Float32Fact:
    """Modules of some model types whose weights are float32 in memory, even if the model has another dtype.

    `always`: in bfloat16 models too, not only in float16 ones. `since`: the first of `SURVEYED` that does so. Earlier
    versions hold the same values in the model's dtype, or in float32 if the file has float32.
    """

    modules: re.Pattern[str]
    model_types: frozenset[str]
    always: bool
    since: str = SURVEYED[0]

    def covers(self, module: str) -> bool:
        return self.modules.search(module) is not None


def _leaf(names: str) -> re.Pattern[str]:
    """A pattern for the last components of a module name. `names` are regular expressions separated by spaces."""
    return re.compile(rf"(?:^|\.)(?:{'|'.join(names.split())})$")


def _under(names: str) -> re.Pattern[str]:
    """A pattern for any component of a module name: it covers everything inside the modules with these names."""
    return re.compile(rf"(?:^|\.)(?:{'|'.join(names.split())})(?:\.|$)")


def float32_of(model_types: Iterable[str]) -> Iterator[Float32Fact]:
    """The facts about a model whose configs have these types."""
    found = frozenset(model_types)
    return (fact for fact in FLOAT32 if fact.model_types & found)


def release(version: str) -> tuple[int, ...]:
    """A version's numbers, which can be compared: (5, 24, 0) for `5.24.0.dev0`."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


# Routers of families in which, before 5.24, only the correction bias was float32, or nothing.
_GATE_SINCE_5_24 = (
    *("axk1", "axk2", "bailing_hybrid", "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
    *("dots3_note", "dots3_note_text", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text"),
    *("glm5_next", "glm5_next_text", "glm_moe_dsa", "hy_v3", "hy_v4", "kimi_linear", "mimo_v2_flash"),
    *("nemotron_h", "sarvam_mla", "sarvam_moe", "solar_open", "unlimited_ocr"),
)
_GATE_SINCE_5_23 = (
    *("beam", "flint", "hy_v4_vl", "hy_v4_vl_text", "inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
    *("mistral_large4", "mistral_large4_text", "muse_spark", "muse_spark_text"),
)


def _fact(modules: re.Pattern[str], *model_types: str, always: bool = True, since: str = "5.23.0") -> Float32Fact:
    return Float32Fact(modules, frozenset(model_types), always, since)


FLOAT32: tuple[Float32Fact, ...] = (
    _fact(_leaf("wo"), "t5", "mt5", "umt5", "udop", "pop2piano", always=False, since="4.57.6"),
    _fact(_under("qformer"), "blip-2", always=False, since="4.57.6"),
    _fact(_leaf("norm input_layernorm post_attention_layernorm"), "gpt_oss", always=False, since="4.57.6"),
    _fact(
        _leaf(r"(?:input|post_attention|pre_mlp|post_mlp)_layernorm [qk]_norm norm"),
        "afmoe",
        always=False,
        since="5.0.0",
    ),
    _fact(_leaf(r"router\.classifier"), "longcat_flash", always=False),
    _fact(
        _leaf(r"indexer\.weights_proj"),
        *("axk2", "deepseek_v32", "glm_moe_dsa", "mistral_large4", "mistral_large4_text"),
        always=False,
    ),
    _fact(_leaf(r"compressor\.wgate compressor\.wkv indexer\.weights_proj"), "deepseek_v4", always=False),
    _fact(_leaf("gate"), "ernie4_5_moe", since="4.57.6"),
    _fact(_leaf("gate"), "ernie4_5_vl_moe", since="5.0.0"),
    _fact(_leaf("gate"), *_GATE_SINCE_5_23),
    _fact(_leaf("gate"), *_GATE_SINCE_5_24, since="5.24.0"),
    _fact(_leaf(r"norm (?:attn|ffn|q)_norm"), "deepseek_v4"),
    _fact(_leaf(r"indexer\.k_norm indexer\.weights_proj lm_head"), "hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
    _fact(_leaf(r"[qkv]_conv1d"), "bailing_hybrid", "glm5_next", "glm5_next_text"),
    _fact(
        _leaf(r"(?:attn|mlp|k|v)_sconv (?:attn|mlp|k|v)_sconv\.conv1d"),
        *("inkling_mm_model", "inkling_text", "inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text"),
    ),
    _fact(_leaf(r"conv\.norm"), "granite_speech5_ctc", "granite_speech5_encoder"),
    _fact(_under("vision_tokenizer audio_tokenizer"), "apertus1p5"),
    _fact(_under("codec_model"), "kyutai_speech_to_text"),
    _fact(_leaf("embed_positions"), "voxtral", "voxtral_encoder"),
    _fact(_under("token2wav"), "qwen2_5_omni"),
    _fact(_under(r"perception audio_tower"), "nemo_speechlm"),
)
