"""What the embedded base learns from: scenes, captions, and what is kept out of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sprite_pack import write_sprites

from dreamtune import embedded

TOKENIZER = embedded.MODEL / "tokenizer"
MANY = 200_000


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All concepts, in 8 px: who is drawn matters here, not how."""
    return write_sprites(tmp_path_factory.mktemp("all") / "sprites.npz", None, size=8)


@pytest.fixture(scope="module")
def scenes(sprites: Path):
    from embedded_base.stages import scenes_for

    return scenes_for(sprites, TOKENIZER, "cpu")


def forbidden(scene) -> int:
    """How many of these scenes show a combination of the test prompts, counted one by one."""
    from embedded_base.captions import PATTERNS
    from embedded_base.prompts import test_prompts

    count = 0
    word, other = scene.first // 3, scene.second // 3
    for s in (row["scene"] for row in test_prompts()):
        same = word == s["first"] // 3
        if s["kind"] < 2:
            same &= (scene.kind < 2) & (scene.ground == s["ground"])
            if s["ground"] < len(PATTERNS):
                same &= scene.color == s["color"]
        else:
            same &= (scene.kind >= 2) & (other == s["second"] // 3)
        count += int(same.sum())
    return count


def test_combinations_of_the_test_prompts_are_never_sampled(scenes, sprites: Path) -> None:
    from embedded_base.scenes import Scenes

    torch.manual_seed(0)
    assert forbidden(scenes.sample(MANY)) == 0
    assert forbidden(Scenes(sprites).sample(MANY)) > 300  # so many would come without `forbid`


def test_held_out_subjects_are_never_sampled(scenes) -> None:
    from embedded_base.sources import STYLES

    shipped = [
        scenes.words.index(s.concept) * 3 + STYLES.index(s.style) for s in embedded.subjects()
    ]
    assert len(set(shipped)) == len(shipped) == 42
    held = sorted(scenes.held)  # and one that was withdrawn
    assert set(shipped) < set(held) and len(held) == 43
    torch.manual_seed(0)
    scene = scenes.sample(MANY)
    for drawn in (scene.first, scene.second, scenes.any_sprite(MANY)):
        assert not torch.isin(drawn, torch.tensor(held)).any()
        assert len(drawn.unique()) == len(scenes.words) * 3 - len(held)  # and all others are


def test_test_prompts_hold_no_held_out_subject(scenes) -> None:
    from embedded_base.prompts import captions, test_prompts

    held, rows = scenes.held, test_prompts()
    assert len(rows) == 48
    for row in rows:
        asked = [row["scene"], *row["near_misses"]]
        assert not held & {s[key] for s in asked for key in ("first", "second")}
        assert captions(scenes.grammar, asked) == [row["caption"], *row["near_captions"]]
        assert len({row["caption"], *row["near_captions"]}) == 9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_captions_encode_as_the_tokenizer_does(scenes, seed: int) -> None:
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    scene = scenes.sample(64)
    slots = scenes.grammar.slots(scene, scenes.wording(scene))
    words = scenes.grammar.strings(slots)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    theirs = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(scenes.grammar.encode(slots), theirs), words


def test_articles_and_plurals(scenes) -> None:
    from embedded_base.captions import plural

    torch.manual_seed(0)
    scene = scenes.sample(4096)
    text = scenes.grammar.strings(scenes.grammar.slots(scene, scenes.wording(scene)))
    for caption in text:
        words = caption.split()
        for article, following in zip(words, words[1:]):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeio"), caption
    words = ("fox", "mouse", "cherry", "toy", "bus", "glasses", "sheep")
    assert [plural(w) for w in words] == [
        "foxes", "mice", "cherries", "toys", "buses", "glasses", "sheep"
    ]  # fmt: skip


def test_the_shipped_tokenizer_is_the_one_that_is_written(scenes, tmp_path: Path) -> None:
    """But for a few merges of equal count, whose order is another in every run of `tokenizers`."""
    from embedded_base.captions import write_tokenizer

    write_tokenizer(scenes.words, tmp_path)
    for name, read in (("vocab.json", json.loads), ("merges.txt", str.splitlines)):
        written, *shipped = (
            read((folder / name).read_text()) for folder in (tmp_path, TOKENIZER, embedded.CLIP)
        )
        assert shipped[0] == shipped[1]
        assert set(shipped[0]) == set(written)
        moved = [a for a, b in zip(shipped[0], written) if a != b]
        assert len(moved) < 20, moved
