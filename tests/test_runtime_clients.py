"""What people do with a model object: training adapters, copying, compiling, every way of generating."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import WITHOUT_COLUMNS, read_all, save_tiny
from test_runtime import IDS, columns_of, run, store_columns
from torch import Tensor

import int8cli
from int8cli import convert
from int8cli.errors import OptionError, UnsupportedOperationError
from int8cli.loaders.transformers_versions import release
from int8cli.runtime.guarded_int8 import GuardedInt8
from int8cli.runtime.linear import Int8Linear

NEW_TOKENS: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


def model_of(architecture: str, directory: Path) -> Any:
    source = save_tiny(architecture, directory / "source", torch.float32)
    convert(source, directory / "out", WITHOUT_COLUMNS)
    store_columns(source, directory / "out")
    return int8cli.load_model(directory / "out", device="cpu")


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def llama(llama_directory: Path) -> Any:
    return model_of("llama-biased", llama_directory)


def int8_layers(model: Any) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: layer.weight.clone() for name, layer in int8_layers(model).items()}


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_inputs_are_those_through_the_dequantized_weight(llama: Any, dtype: torch.dtype) -> None:
    checked = 0
    for name, layer in int8_layers(llama).items():
        inputs = torch.randn(2, 3, layer.in_features).to(dtype).requires_grad_()
        upstream = torch.randn(2, 3, layer.out_features).to(dtype)
        layer(inputs).backward(upstream)
        plain = inputs.detach().clone().requires_grad_()
        torch.nn.functional.linear(plain.float(), layer.dequantize()).backward(upstream.float())
        torch.testing.assert_close(inputs.grad, plain.grad, rtol=1e-5, atol=1e-5)
        checked += bool(columns_of(name, layer.in_features))
    assert checked


def test_the_dequantized_weight_has_the_stored_columns_exactly(llama: Any, llama_directory: Path) -> None:
    source = read_all(llama_directory / "source")
    for name, layer in int8_layers(llama).items():
        columns = columns_of(f"{name}.weight", layer.in_features)
        assert layer.outlier_cols.tolist() == columns
        assert torch.equal(layer.dequantize()[:, columns], source[f"{name}.weight"][:, columns])
        torch.testing.assert_close(layer.dequantize(), source[f"{name}.weight"], rtol=0, atol=2e-3)


def test_gradients_through_a_whole_model_point_where_those_of_floats_do(llama: Any) -> None:
    floats = copy.deepcopy(llama).dequantize()
    embedded = llama.get_input_embeddings()(IDS).detach()
    found = []
    for model in (llama, floats):
        inputs = embedded.clone().requires_grad_()
        model(inputs_embeds=inputs).logits.logsumexp(-1).sum().backward()
        assert inputs.grad is not None
        found.append(inputs.grad.flatten())
    ours, theirs = found
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.99
    assert all(layer.weight.grad is None for layer in int8_layers(llama).values())


def test_a_bias_can_be_trained(llama: Any) -> None:
    layer = copy.deepcopy(next(layer for layer in int8_layers(llama).values() if layer.bias is not None))
    layer(torch.randn(4, layer.in_features)).sum().backward()
    assert layer.bias.grad.tolist() == [4.0] * layer.out_features


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_of_peft_are_trained_on_top_of_int8(llama: Any) -> None:
    import peft

    before = weights_of(llama)
    adapted = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules="all-linear", r=2))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in weights_of(adapted).items()
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_peft_would_do_to_int8_in_silence_is_refused(llama: Any) -> None:
    import peft

    adapted = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules=["q_proj"], r=2))
    for safe in (True, False):
        with pytest.raises(UnsupportedOperationError, match="dequantize"):
            adapted.merge_adapter(safe_merge=safe)
    with pytest.raises(UnsupportedOperationError, match="DoRA"):
        peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    floats = copy.deepcopy(llama).dequantize()
    peft.get_peft_model(floats, peft.LoraConfig(target_modules=["q_proj"], r=2)).merge_and_unload()


def test_int8_data_refuses_to_be_written_to_or_taken_for_floats() -> None:
    data = GuardedInt8.of(torch.ones(2, 3, dtype=torch.int8))
    for use in (lambda: data.data, lambda: data.to(torch.float32), lambda: data.to("cpu", torch.bfloat16)):
        with pytest.raises(UnsupportedOperationError):
            use()
    with pytest.raises(UnsupportedOperationError):
        data.data = torch.zeros(2, 3, dtype=torch.int8)
    assert data.to("cpu").sum() == 6


# Copies and other forms


def test_copies_compute_the_same(llama: Any) -> None:
    logits = run(llama).logits
    assert torch.equal(run(copy.deepcopy(llama)).logits, logits)
    assert torch.equal(run(pickle.loads(pickle.dumps(llama))).logits, logits)


def test_a_model_that_is_moved_or_cast_keeps_its_int8(llama: Any) -> None:
    moved = copy.deepcopy(llama).to("cpu", torch.bfloat16)
    before = weights_of(llama)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(moved).items())
    assert {layer.step.dtype for layer in int8_layers(moved).values()} == {torch.float32}
    assert run(moved).logits.dtype == torch.bfloat16


def test_a_model_knows_where_it_is_from(llama: Any, llama_directory: Path) -> None:
    assert llama.name_or_path == llama.config._name_or_path == str(llama_directory / "out")


def test_saving_says_what_to_do_instead(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperationError, match=r"int8cli\.dequantize"):
        llama.save_pretrained(tmp_path / "saved")


def test_pushing_is_refused_before_a_repository_is_made(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(transformers.PreTrainedModel, "push_to_hub", lambda *args: pushed.append(args))
    for model in (llama, copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        with pytest.raises(UnsupportedOperationError, match=r"int8cli\.push"):
            model.push_to_hub("somebody/something")
    assert not pushed
    copy.deepcopy(llama).dequantize().push_to_hub("somebody/something")
    assert pushed


@pytest.mark.parametrize("device", ["tpu", "cuda", "cuda:9", "mps", "xla:0", torch.device("cuda", 3)])
def test_a_device_that_torch_cannot_use_is_refused(device: Any, llama_directory: Path, llama: Any) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has one of them")
    with pytest.raises(OptionError, match=f"torch cannot use the device '{device}'") as caught:
        int8cli.load_model(llama_directory / "out", device=device)
    assert caught.value.option == "device"


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "bloom"])
def test_a_dequantized_model_is_an_ordinary_one(architecture: str, tmp_path: Path) -> None:
    model = model_of(architecture, tmp_path)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    stored = {name: layer.dequantize() for name, layer in int8_layers(model).items()}
    floats = model.dequantize()
    logits = run(floats).logits
    floats.save_pretrained(tmp_path / "saved")
    again = type(floats).from_pretrained(tmp_path / "saved")
    assert torch.equal(run(again).logits, logits)
    for name, module in again.named_modules():
        if name in stored:
            weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
            assert torch.equal(weight, stored[name])
        else:
            assert type(module).__name__ == kinds[name]


@pytest.mark.parametrize("inputs", ["xx", "", None])
def test_an_unknown_way_to_quantize_inputs_is_refused(inputs: Any, llama_directory: Path, llama: Any) -> None:
    with pytest.raises(OptionError, match="absmax, zeropoint") as caught:
        int8cli.load_model(llama_directory / "out", inputs=inputs)
    assert caught.value.option == "inputs"


def test_a_model_compiles_as_one_graph(llama: Any) -> None:
    compiled = torch.compile(copy.deepcopy(llama), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run_compiled(compiled), run(llama).logits, rtol=1e-5, atol=1e-5)


def run_compiled(compiled: Any) -> Tensor:
    compiled.config = compiled._orig_mod.config
    with torch.no_grad():
        logits: Tensor = compiled(input_ids=IDS, use_cache=False).logits
    return logits


# Ways of generating


def generated(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    result: Tensor = model.generate(ids, attention_mask=mask, **{**NEW_TOKENS, "do_sample": False, **options})
    return result


def test_a_padded_batch_gives_each_prompt_its_own_continuation(llama: Any) -> None:
    short = IDS[:1, 3:]
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], dim=1), IDS[1:]])
    mask = (padded != 0).long()
    together = generated(llama, padded, attention_mask=mask)
    assert torch.equal(together[0, 7:], generated(llama, short)[0, 4:])
    assert torch.equal(together[1], generated(llama, IDS[1:])[0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "temperature": 0.7}])
def test_beams_and_samples(llama: Any, options: dict[str, Any]) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(generated(llama, **options))
    assert found[0].shape == (2, 12)
    assert torch.equal(*found)


def test_a_static_cache_and_an_assistant_change_no_token(llama: Any) -> None:
    plain = generated(llama, IDS[:1])
    assert torch.equal(generated(llama, IDS[:1], cache_implementation="static"), plain)
    if release(transformers.__version__) < release("5.23.0"):
        pytest.skip("transformers 5.0.0 takes no least length beside an assistant")
    assert torch.equal(generated(llama, IDS[:1], assistant_model=copy.deepcopy(llama)), plain)


def test_a_streamer_gets_each_token_as_it_comes(llama: Any) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Tokens(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.parts.append([])

    streamer = Tokens()
    ids = generated(llama, IDS[:1], streamer=streamer)
    assert streamer.parts == [IDS[0].tolist(), *([token] for token in ids[0, 7:].tolist()), []]
