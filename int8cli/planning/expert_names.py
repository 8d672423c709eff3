"""What the matrices of fused experts are called once they are split, by model type.

Owns the families whose fused experts are understood. The names are those of the family's published checkpoints: vLLM's
loaders expect them (fused_moe/routed_experts.py, `build_expert_params_mapping`), and transformers' reads them too
(conversion_mapping.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """The names of one expert's matrices, and what else is called differently in the module that has the experts.

    `renames` are parts of names, each with its replacement: the first that occurs in a name is replaced.
    """

    gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    renames: tuple[tuple[str, str], ...] = ()

    def renamed(self, name: str) -> str:
        """The name of a tensor or module beside split experts."""
        for part, replacement in self.renames:
            if part in name:
                return name.replace(part, replacement, 1)
        return name


# The families whose gate and up are halves, one after the other. Others are left alone: GPT-OSS interleaves the two,
# DBRX has no third dimension.
_PLAIN = """
    afmoe cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 flex_olmo glm4_moe glm4_moe_lite glm4v_moe
    glm4v_moe_text glm_moe_dsa granitemoe granitemoehybrid granitemoeshared hunyuan_v1_moe jamba llama4 llama4_text
    longcat_flash olmoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe
    qwen3_vl_moe_text sarvam_mla solar_open
"""
_NUMBERED = ExpertNames(("w1", "w3"), "w2")
_MIXTRAL = ExpertNames(("w1", "w3"), "w2", ((".mlp.", ".block_sparse_moe."),))
_FAMILIES = {
    **dict.fromkeys(_PLAIN.split(), ExpertNames()),
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), _MIXTRAL),
    "ernie4_5_moe": ExpertNames(renames=((".mlp.gate.moe_statics.", ".mlp.moe_statics."),)),
    "exaone_moe": ExpertNames(renames=((".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),)),
    "lfm2_moe": _NUMBERED,
    "phimoe": ExpertNames(
        ("w1", "w3"), "w2", ((".mlp.router.", ".block_sparse_moe.gate."), (".mlp.", ".block_sparse_moe."))
    ),
}
# Of these, no loader merges separate experts again: transformers knows them fused only.
ALWAYS_FUSED = frozenset(
    (
        *("granitemoe", "granitemoehybrid", "granitemoeshared", "llama4", "llama4_text"),
        *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe", "qwen3_vl_moe_text"),
    )
)


def names_when_split(model_types: Iterable[str]) -> ExpertNames | None:
    """The names for a model of these types; None if its fused experts are not understood."""
    return next((_FAMILIES[each] for each in model_types if each in _FAMILIES), None)
