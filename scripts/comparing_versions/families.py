"""The cases of every family: for each model type one tiny model, if this transformers can build one from small sizes.

Like cases.py, but for what no list names: a config with its default values, and small numbers in the fields whose
names are known below. A family whose config allows no such numbers, or whose model is not small then, is left out.
"""

import copy
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]

from support.checkpoints import WITHOUT_COLUMNS
from surveying.building import class_names_by_model_type

from int8cli import convert
from int8cli.errors import Int8cliError

DTYPES = ("bfloat16", "float16")  # in turn
LIMIT_S = 120
MEMORY_LIMIT_BYTES = 8 << 30
LARGEST_PARAMETERS = 60_000_000

_SIZES = {
    128: "vocab_size text_vocab_size src_vocab_size tgt_vocab_size max_position_embeddings n_positions",
    96: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner intermediate_dim ffn_hidden_size
        mlp_dim intermediate_size_mlp block_ff_dim dim_feedforward""",
    64: """hidden_size d_model n_embd dim embed_dim embedding_size hidden_dim encoder_hidden_size decoder_hidden_size
        text_hidden_size projection_dim model_dim width out_hidden_size output_hidden_size d_inner
        cross_attention_hidden_size""",
    32: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
        image_size""",
    16: """head_dim attention_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim qk_head_dim kv_channels
        linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_head index_head_dim attention_head_size""",
    8: "qk_rope_head_dim rotary_dim mamba_d_state ssm_state_size state_size patch_size",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        linear_num_value_heads linear_num_key_heads mamba_num_heads mamba_n_heads index_n_heads num_experts
        n_routed_experts num_local_experts moe_num_experts""",
    2: """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth encoder_num_hidden_layers decoder_num_hidden_layers num_key_value_heads num_kv_heads
        num_experts_per_tok moe_topk moe_k""",
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_nextn_predict_layers moe_num_shared_experts",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern")
_HEADS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForMaskedLM", "ForImageClassification", "ForCTC")


def small_values(values: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The values of a config, those inside it included, with small sizes.

    `layers`: how many entries to leave in lists by layer; None removes these lists, for the config to make its own.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found[name] = small_values(value, layers)
        elif name in BY_LAYER and value is not None:
            found |= {} if layers is None else {name: value[:layers]}
        elif isinstance(value, int) and name in SMALL:
            found[name] = min(value, SMALL[name])
        elif type(value) is int and str(name).endswith("token_id"):
            found[name] = min(value, 3)
        else:
            found[name] = value
    return found


def small_config(model_class: Any, config_class: Any, layers: int | None) -> Any:
    """A config for a class, the text model's own where the class wants only that. `layers`: see small_values."""
    values = config_class().to_dict()
    for name in ("architectures", "transformers_version", "model_type", "dtype", "torch_dtype"):
        values.pop(name, None)
    config = config_class(**small_values(copy.deepcopy(values), layers))
    text = config.get_text_config()
    wanted = model_class.config_class
    return text if not isinstance(config, wanted) and isinstance(text, wanted) else config


def build(class_name: str, config_class: Any) -> Any:
    """A small model, or the error of the last config that was tried."""
    import torch
    import transformers

    model_class = getattr(transformers, class_name)
    for layers in (None, 2):
        try:
            config = small_config(model_class, config_class, layers)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(config).parameters())
            if size > LARGEST_PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} M parameters")
            torch.manual_seed(0)
            return model_class(config)
        except Exception:
            if layers is not None:
                raise
    raise AssertionError("unreachable")


def write_case(model_type: str, class_name: str, case: Path, dtype: str) -> None:
    """Write the case of a family, or only say on stderr why there is none. Runs in a process of its own."""
    import torch
    from transformers import CONFIG_MAPPING

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    signal.alarm(LIMIT_S)
    try:
        model = build(class_name, CONFIG_MAPPING[model_type])
    except Exception as error:
        print(f"{model_type}: cannot be built ({type(error).__name__}: {error!s:.100})", file=sys.stderr)
        return
    model.to(getattr(torch, dtype)).save_pretrained(case / "source")
    try:
        convert(case / "source", case / "bitsandbytes", WITHOUT_COLUMNS)
    except Int8cliError as error:
        print(f"{model_type}: {error}", file=sys.stderr)
        return
    (case / "case.json").write_text(json.dumps({"class": class_name, "runs": False, "model_type": model_type}))


def main_class(class_names: list[str]) -> str:
    """The class that most checkpoints of a family are saved by."""
    rank = {head: place for place, head in enumerate(_HEADS)}
    return min(class_names, key=lambda name: min((rank[head] for head in _HEADS if name.endswith(head)), default=99))


def write_cases(directory: Path, names: set[str]) -> None:
    """`names`: the model types, or none for all."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported; some configs ask the Hub for another one
    import torch
    import transformers

    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    for number, (model_type, class_names) in enumerate(class_names_by_model_type().items()):
        known = [name for name in class_names if hasattr(transformers, name)]
        if not known or (names and model_type not in names):
            continue
        dtype = DTYPES[number % len(DTYPES)]
        case = directory / f"{model_type}-{dtype}"
        child = context.Process(target=write_case, args=(model_type, main_class(known), case, dtype))
        child.start()
        child.join()


if __name__ == "__main__":
    write_cases(Path(sys.argv[1]), set(sys.argv[2:]))
