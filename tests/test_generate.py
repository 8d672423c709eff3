"""`generate`: prompts, conversations, what it measures and how it compares."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration_models import make_model
from support.checkpoints import WITHOUT_COLUMNS, save_tiny
from support.program import Nursery
from support.progress import CoherentProgress
from transformers import AutoTokenizer

import int8cli
from int8cli import GenerateOptions, chat, convert, generate
from int8cli.cli.generate import show_figures
from int8cli.errors import CannotRunError, OptionError, ReferenceModelError, TextError, UnsupportedModelError

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SHORT = GenerateOptions(max_new_tokens=6, device="cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    make_model("llama", root / "model")
    convert(root / "model", root / "out", WITHOUT_COLUMNS)
    convert(root / "model", root / "chatty", WITHOUT_COLUMNS)
    (root / "chatty/chat_template.jinja").write_text(TEMPLATE)
    return root


@pytest.fixture(scope="module")
def words(root: Path) -> str:
    """Some words that the tokenizer knows."""
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    return str(tokenizer.decode(list(range(10, 16)), skip_special_tokens=True))


def continued(directory: Path, text: str, tokens: int = 6) -> list[int]:
    """What transformers' own generate makes of it."""
    model, tokenizer = int8cli.load_model(directory, device="cpu"), AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return [int(token) for token in output[0, prompt.shape[1] :]]


def test_a_prompt_is_continued_and_its_text_comes_in_pieces(root: Path, words: str) -> None:
    pieces: list[str] = []
    found = generate(root / "out", words, SHORT, on_text=pieces.append)
    expected = continued(root / "out", words)
    tokenizer = AutoTokenizer.from_pretrained(root / "out")
    assert (pieces[-1], pieces.count("")) == ("", 1)
    assert "".join(pieces) == found.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert found.new_tokens == len(expected)
    assert found.seconds_to_first_token is not None
    assert 0 < found.seconds_to_first_token <= found.seconds
    assert found.peak_memory_bytes is not None
    assert found.peak_memory_bytes > found.weights_bytes > 0
    assert found.stopped == ("length" if len(expected) == 6 else "end")


def test_a_pipeline_of_transformers_takes_the_model(root: Path, words: str) -> None:
    from transformers import pipeline

    model, tokenizer = int8cli.load_model(root / "out", device="cpu"), AutoTokenizer.from_pretrained(root / "out")
    speak: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [found] = speak(words, max_new_tokens=6, do_sample=False, return_full_text=False)
    spoken = generate(root / "out", words, SHORT).text
    assert found["generated_text"].lstrip() == spoken  # transformers 5.0.0 leaves the blank before the first word


def test_a_chat_template_is_used_unless_the_prompt_is_raw(root: Path, words: str) -> None:
    template = generate(root / "chatty", words, SHORT)
    raw = generate(root / "chatty", words, GenerateOptions(raw=True, max_new_tokens=6, device="cpu"))
    assert raw.prompt_tokens == generate(root / "out", words, SHORT).prompt_tokens
    rendered: Any = AutoTokenizer.from_pretrained(root / "chatty").apply_chat_template(
        [{"role": "user", "content": words}], add_generation_prompt=True, return_dict=True
    )
    assert template.prompt_tokens == len(rendered["input_ids"])


def test_a_conversation_remembers_what_was_said(root: Path, words: str) -> None:
    first, second = chat(root / "chatty", [words, words], SHORT)
    assert second.prompt_tokens > first.prompt_tokens
    again = generate(root / "chatty", f"{words} {first.text} {words}", SHORT)
    assert second.prompt_tokens == again.prompt_tokens
    with pytest.raises(CannotRunError, match="no chat template"):
        next(chat(root / "out", [words], SHORT))


def test_a_conversation_that_grows_too_long_loses_its_oldest_messages(root: Path, words: str) -> None:
    progress = CoherentProgress()
    long = " ".join([words] * 2)
    single = generate(root / "chatty", long, SHORT).prompt_tokens
    limit = json.loads((root / "chatty/config.json").read_text())["max_position_embeddings"]
    count = limit // single + 2
    answers = list(chat(root / "chatty", [long] * count, SHORT, progress=progress))
    assert len(answers) == count
    assert all(each.prompt_tokens + SHORT.max_new_tokens <= limit for each in answers)
    assert answers[-1].prompt_tokens > limit // 2  # no more is left out than needed
    assert "no longer sees its first 2 messages" in progress.notes[0]


def test_a_message_that_is_too_long_alone_is_an_error(root: Path, words: str) -> None:
    talk = chat(root / "chatty", [words, " ".join([words] * 500)], SHORT)
    next(talk)
    with pytest.raises(TextError, match="takes fewer than"):
        next(talk)


def test_sampling_follows_its_seed_and_leaves_torchs_alone(root: Path, words: str) -> None:
    before = torch.random.get_rng_state()
    texts = [
        generate(root / "out", words, GenerateOptions(max_new_tokens=20, temperature=5.0, seed=seed, device="cpu")).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_text_of_the_other_model_keeps_its_lines(
    root: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = generate(root / "out", words, GenerateOptions(max_new_tokens=2, device="cpu", compare=root / "model"))
    assert found.agreement is not None
    show_figures(replace(found, agreement=replace(found.agreement, text="one\n\x1btwo")), quiet=False)
    assert "weights, " in (err := capsys.readouterr().err)
    assert "\none\n\\x1btwo\n" in err


def test_a_comparison_says_where_the_first_token_differs(root: Path, words: str, tmp_path: Path) -> None:
    progress = CoherentProgress()
    options = GenerateOptions(max_new_tokens=6, device="cpu", compare=root / "model")
    same = generate(root / "out", words, options, progress=progress).agreement
    assert same is not None
    assert same.weights_bytes > 0
    make_model("llama", tmp_path / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors = {name: tensor.flip(0) if "embed" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    found = generate(root / "out", words, GenerateOptions(max_new_tokens=6, device="cpu", compare=tmp_path / "other"))
    assert found.agreement is not None
    place = found.agreement.first_difference
    assert place is not None
    ours, theirs = continued(root / "out", words), reference(tmp_path / "other", words)
    assert ours[:place] == theirs[:place]
    assert ours[place : place + 1] != theirs[place : place + 1]
    assert 0 <= found.agreement.agreeing_tokens < found.new_tokens


def test_a_quantized_model_is_no_16_bit_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with itself, a conversion would agree in every token. It is refused before any weight is read."""
    monkeypatch.setattr("int8cli.runtime.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ReferenceModelError, match=r"quantized model \(bitsandbytes\), not the 16-bit one") as refused:
        generate(root / "out", "a", GenerateOptions(compare=root / "out"))
    assert "that was converted" in refused.value.hint


def test_a_hub_id_that_cannot_be_compared_with_is_refused_before_anything_is_generated(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise OSError("nobody/nothing is not a repository\nsecond line")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", absent)
    monkeypatch.setattr("int8cli.runtime.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ReferenceModelError, match=r"as the 16-bit model: nobody/nothing is not a repository$"):
        generate(root / "out", "a", GenerateOptions(compare="nobody/nothing"))


def reference(directory: Path, text: str) -> list[int]:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    return [int(token) for token in output[0, prompt.shape[1] :]]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": -1.0}, OptionError, "temperature"),
        ({"temperature": float("nan")}, OptionError, "temperature"),
        ({"max_new_tokens": 0}, OptionError, "less than 1"),
        ({"inputs": "xx"}, OptionError, "zeropoint, absmax"),
        ({"max_memory": ("cpu",)}, OptionError, "not DEVICE=SIZE"),
        ({"max_memory": ("gpu=1GB",)}, OptionError, "not DEVICE=SIZE"),
        ({"compare": "nothing/"}, ReferenceModelError, "nothing/: no such directory"),
        ({"compare": "~nobody-of-this-name/x"}, ReferenceModelError, "no such directory"),
        ({"compare": "./nothing"}, ReferenceModelError, "./nothing: no such directory"),
        ({"compare": Path(__file__)}, ReferenceModelError, "not a directory with a config.json"),
        ({"compare": Path(__file__).parent}, ReferenceModelError, "not a directory with a config.json"),
    ],
)
def test_what_makes_no_sense_is_refused(options: Any, error: type[Exception], words: str, root: Path) -> None:
    with pytest.raises(error, match=words):
        generate(root / "out", "a", GenerateOptions(**{"device": "cpu", "max_new_tokens": 2, **options}))


def test_prompts_that_cannot_be_continued_are_refused(root: Path, words: str, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="empty"):
        generate(root / "out", "", GenerateOptions(raw=True, device="cpu"))
    for blank in ("", " \n"):
        with pytest.raises(TextError, match="empty"):
            generate(root / "chatty", blank, SHORT)
    with pytest.raises(TextError, match="takes fewer than"):
        generate(root / "out", " ".join([words] * 500), SHORT)
    bare = save_tiny("bert", tmp_path / "bert")
    make_model("llama", tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tmp_path / "llama" / name).read_bytes())
    convert(bare, tmp_path / "out", WITHOUT_COLUMNS)
    with pytest.raises(UnsupportedModelError, match="does not generate"):
        generate(tmp_path / "out", words, SHORT)


# The command


def test_the_text_is_on_stdout_and_the_figures_on_stderr(root: Path, words: str, model_nursery: Nursery) -> None:
    found = generate(root / "out", words, SHORT)
    options = ("--max-new-tokens", "6", "--device", "cpu")
    outcome = model_nursery.run("generate", "out", words, *options, "--compare", "model", cwd=root)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{found.text}\n"
    assert "tokens after a prompt of" in outcome.err
    assert "of weights in memory" in outcome.err
    assert "16 bit would choose" in outcome.err
    assert "Loading" not in outcome.err
    quiet = model_nursery.run("generate", "out", words, *options, "-q", cwd=root)
    assert (quiet.out, quiet.err) == (outcome.out, "")


def test_json_is_one_document(root: Path, words: str, model_nursery: Nursery) -> None:
    outcome = model_nursery.run("generate", "out", words, "--max-new-tokens", "6", "--json", cwd=root)
    document = json.loads(outcome.out)
    assert document["schema"] == "int8cli.generation/1"
    assert document["text"] == generate(root / "out", words, SHORT).text


def test_prompts_and_conversations_come_from_standard_input(root: Path, words: str, model_nursery: Nursery) -> None:
    run = partial(model_nursery.run, "generate", cwd=root)
    prompt = str(root / "prompt.txt")
    Path(prompt).write_text(f"{words}\n")
    options = ("--max-new-tokens", "6", "--device", "cpu", "-q")
    outcome = run("out", *options, stdin=prompt)
    assert outcome.out == run("out", words, *options).out
    talk = run("chatty", "--chat", *options[:-1], stdin=prompt)
    assert talk.code == 0, talk.err
    assert talk.err.count("tokens after a prompt of") == talk.err.count("of weights in memory") == 1
    assert run("out", "-", *options, stdin=prompt).out == outcome.out
    assert run("chatty", words, "--chat").code == 2


# What the model's own files and the prompt say


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("chat_template.jinja", "{% for %}", "TemplateSyntaxError"),
        ("chat_template.jinja", "{{ a.b.c }}", "UndefinedError"),
        ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("chat_template.jinja", "{{ range(10**9) }}", "OverflowError"),
        ("generation_config.json", '{"eos_token_id": "x"}', "cannot generate"),
        ("generation_config.json", '{"repetition_penalty": -5.0}', "cannot generate"),
        ("generation_config.json", '{"bad_words_ids": "a"}', "cannot generate"),
    ],
)
def test_files_of_the_model_that_do_not_work_are_errors(
    file: str, text: str, words: str, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out" / file).write_text(text)
    with pytest.raises(CannotRunError, match=words) as caught:
        generate(tmp_path / "out", "a", SHORT)
    assert caught.value.hint


def test_what_is_no_text_is_no_prompt(root: Path, model_nursery: Nursery) -> None:
    with pytest.raises(TextError, match="not UTF-8"):
        generate(root / "out", "\udcff", SHORT)
    with pytest.raises(TextError, match="not UTF-8"):
        list(chat(root / "chatty", ["\udcff"], SHORT))
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(OptionError, match="64 bits"):
            generate(root / "out", "a", GenerateOptions(device="cpu", seed=seed))
    with pytest.raises(OptionError, match="not a size"):
        generate(root / "out", "a", GenerateOptions(device="cpu", max_memory=("cpu=1e400GB",)))
    (root / "latin.txt").write_bytes(b"\xff\xfe\n")
    prompt = str(root / "latin.txt")
    outcome = model_nursery.run("generate", "out", "--device", "cpu", "-q", cwd=root, stdin=prompt)
    assert outcome.code == 1, outcome.err
    assert "is not UTF-8 text" in outcome.err  # the locale decides who notices
