"""Cards: their names, and whole blocks on them in order."""

import stat
from pathlib import Path

import pytest

from int8cli.estimate.cards import (
    CARDS,
    CONTEXT_BYTES,
    GIB,
    SHOWN_CARDS,
    UNSEEN_SHARE,
    Card,
    Load,
    UnknownCardError,
    card_named,
    cards_needed,
    cards_of_this_machine,
    parse_cards,
    place,
)

# BLOOM-176B in int8, measured in test_memory's terms: embeddings in 16 bit, 70 blocks of 12 x 14336² int8 and the rest.
BLOOM_INT8 = (
    Load("embeddings", 7_193_288_704),
    *(Load(f"h.{block}", 2_467_139_584) for block in range(70)),
    Load("other", 57_344),
)


def a_card(usable_bytes: int) -> Card:
    """A card with exactly this much usable memory."""
    total = int((usable_bytes + CONTEXT_BYTES) / (1 - UNSEEN_SHARE)) - 2
    while Card("", total).usable_bytes < usable_bytes:
        total += 1
    return Card("card", total)


@pytest.mark.parametrize(
    ("text", "name", "total_bytes", "count"),
    [
        ("RTX 3090", "RTX 3090", 24 * GIB, 1),
        ("rtx3090", "RTX 3090", 24 * GIB, 1),
        ("3090", "RTX 3090", 24 * GIB, 1),
        ("NVIDIA GeForce RTX 3090", "RTX 3090", 24 * GIB, 1),
        ("8x RTX 3090", "RTX 3090", 24 * GIB, 8),
        ("8xRTX3090", "RTX 3090", 24 * GIB, 8),
        ("A100-80GB", "A100 80GB", 80 * GIB, 1),
        ("2 x a100 40gb", "A100 40GB", 40 * GIB, 2),
        ("H100", "H100 80GB", 81559 << 20, 1),
        ("24GiB", "24GiB", 24 * GIB, 1),
        ("24 GB", "24 GB", 24_000_000_000, 1),
        ("8x24GiB", "24GiB", 24 * GIB, 8),
        ("2*1.5gib", "1.5gib", 3 * GIB // 2, 2),
        ("4060 Ti 16GB", "RTX 4060 Ti 16GB", 16380 << 20, 1),
    ],
)
def test_cards_by_name_and_by_size(text: str, name: str, total_bytes: int, count: int) -> None:
    assert parse_cards(text) == (Card(name, total_bytes),) * count


def test_gib_and_gb_are_two_things() -> None:
    assert parse_cards("24GiB")[0].total_bytes - parse_cards("24GB")[0].total_bytes == 1_769_803_776


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("A100", "A100 40GB, A100 80GB"),
        ("V100", "V100 16GB"),
        ("24", "no unit"),
        ("24G", "no unit"),
        ("RTX 9999", "RTX 9999"),
        ("0x24GiB", "does not name a card"),
        ("99999x24GiB", "does not name a card"),
        ("", "does not name a card"),
        ("8x", "8x"),
    ],
)
def test_an_unknown_card_is_refused(text: str, word: str) -> None:
    with pytest.raises(UnknownCardError, match=word) as caught:
        parse_cards(text)
    assert caught.value.hint


def test_a_misspelt_card_gets_a_suggestion() -> None:
    with pytest.raises(UnknownCardError) as caught:
        parse_cards("RTX A600")
    assert "RTX A6000" in caught.value.hint


def test_every_card_in_the_table_is_found_by_its_own_name() -> None:
    for card in CARDS:
        assert parse_cards(card.name) == (card,)
    assert [card_named(name).total_bytes for name in SHOWN_CARDS] == sorted(
        card_named(name).total_bytes for name in SHOWN_CARDS
    )


def test_a_card_is_never_completely_usable() -> None:
    assert card_named("RTX 3090").usable_bytes < 24 * GIB - GIB // 2
    assert Card("tiny", 100 << 20).usable_bytes == 0


def test_units_are_placed_whole_and_in_order() -> None:
    loads = tuple(Load(f"h.{block}", 40 << 20) for block in range(5))
    placement = place(loads, [a_card(100 << 20)] * 3)
    assert [[load.name for load in placed.loads] for placed in placement.cards] == [
        ["h.0", "h.1"],
        ["h.2", "h.3"],
        ["h.4"],
    ]
    assert [placed.left_bytes >> 20 for placed in placement.cards] == [20, 20, 60]
    assert placement.fits
    # 200 MiB in all would fit two cards of 100 MiB, if blocks could be cut.
    assert not place(loads, [a_card(100 << 20)] * 2).fits
    assert [load.name for load in place(loads, [a_card(100 << 20)] * 2).without] == ["h.4"]


def test_units_on_one_card_share_the_largest_workspace_and_keep_their_own_cache() -> None:
    loads = (Load("a", 10 << 20, 5 << 20, 7 << 20), Load("b", 20 << 20, 5 << 20, 3 << 20))
    placed = place(loads, [a_card(64 << 20)]).cards[0]
    assert (placed.weight_bytes >> 20, placed.kv_bytes >> 20, placed.workspace_bytes >> 20) == (30, 10, 7)
    assert placed.left_bytes == 17 << 20


def test_a_unit_too_large_for_a_card_fits_on_no_number_of_cards() -> None:
    loads = (Load("a", 10 << 20), Load("b", 90 << 20, 0, 20 << 20))
    assert cards_needed(loads, a_card(100 << 20)) is None
    assert not place(loads, [a_card(100 << 20)] * 9).fits


@pytest.mark.parametrize("usable_mib", range(60, 200, 7))
def test_the_number_of_cards_agrees_with_their_placement(usable_mib: int) -> None:
    loads = tuple(Load(f"h.{n}", (17 + 5 * (n % 7)) << 20, n << 18, (n % 3) << 20) for n in range(20))
    card = a_card(usable_mib << 20)
    needed = cards_needed(loads, card)
    assert needed is not None
    assert place(loads, [card] * needed).fits
    assert not place(loads, [card] * (needed - 1)).fits


def test_eight_rtx_3090_hold_bloom_in_int8_and_seven_do_not() -> None:
    assert cards_needed(BLOOM_INT8, card_named("RTX 3090")) == 8
    assert place(BLOOM_INT8, parse_cards("8x RTX 3090")).fits
    assert not place(BLOOM_INT8, parse_cards("7x RTX 3090")).fits


def a_program(directory: Path, text: str) -> None:
    path = directory / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_cards_of_this_machine_are_what_nvidia_smi_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cards_of_this_machine() == ()
    a_program(tmp_path, "echo 'NVIDIA GeForce RTX 3090, 24576'; echo 'NVIDIA A10, 23028'; echo '[N/A], [N/A]'")
    assert cards_of_this_machine() == (
        Card("RTX 3090", 24 * GIB),
        Card("A10", 23028 << 20),
    )


@pytest.mark.parametrize("text", ["exit 9", "echo 'No devices were found'"])
def test_a_machine_whose_driver_does_not_answer_has_no_cards(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_program(tmp_path, text)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cards_of_this_machine() == ()
