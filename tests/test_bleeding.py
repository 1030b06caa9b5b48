"""The script that measures how much of a subject gets into the other's half: what it scores."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from dreamtune.metrics.dino import Dino

sys.path.append(str(Path(__file__).parents[1] / "eval"))

import bleeding  # noqa: E402


def test_ten_pairs_of_subjects_that_are_reported_on():
    pairs = bleeding.pairs()
    subjects = [subject for pair in pairs for subject in pair]
    assert len(pairs) == 10 and len({s.id for s in subjects}) == 20
    assert {s.split for s in subjects} == {"report"}
    assert bleeding.row(pairs[0], "everywhere") == {s.id: 1.0 for s in pairs[0]}
    for number, condition in enumerate(bleeding.CONDITIONS[1:]):
        first, second = bleeding.row(pairs[0], condition).values()
        whole = first.share(4, 6) + second.share(4, 6)
        assert whole.min() == whole.max() == 1  # each place has one of them
        assert first.share(4, 6)[0, 0] == (number == 0)
        own = "a sks panda next to a sks panda on a red background"
        assert first.prompt == (own if number == 2 else None)


def test_a_half_is_whole_on_a_square():
    picture = Image.new("RGB", (16, 8), "red")
    picture.paste("blue", (8, 0, 16, 8))
    assert bleeding.half(picture, bleeding.HALVES[0]).getcolors() == [(64, (255, 0, 0))]
    tall = Image.new("RGB", (8, 8), "red")
    tall.paste("blue", (4, 0, 8, 8))
    right = bleeding.half(tall, bleeding.HALVES[1])
    assert right.size == (8, 8) and right.getcolors() == [(64, (0, 0, 255))]


def test_what_is_drawn_in_the_wrong_half_is_seen(tmp_path):
    """A photo of each subject in its half, with regions; in the other's, without. Where the halves
    are exchanged, the first picture has them wrong.
    """
    pair = bleeding.pairs()[1]
    for condition in bleeding.CONDITIONS:
        order = pair[::-1] if condition == "everywhere" else pair
        picture = Image.new("RGB", (128, 128), "red")
        for place, subject in enumerate(order):
            picture.paste(Image.open(subject.photos[0]).resize((64, 64)), (64 * place, 32))
        folder = tmp_path / "pictures" / condition / bleeding.name_of(pair)
        folder.mkdir(parents=True)
        picture.save(folder / "7.png")
    found = bleeding.seen(pair, tmp_path, [7], Dino("embedded"))
    by = {c: [s for s in found if s.condition == c] for c in (*bleeding.CONDITIONS, "photos")}
    assert [len(of) for of in by.values()] == [2, 2, 2, 2, 10]
    for condition, of in by.items():
        right = condition in ("regions", "photos")
        assert all((s.own > s.other + 0.3) if right else (s.other > s.own + 0.3) for s in of), of


def test_the_table():
    scores = dict.fromkeys((*bleeding.CONDITIONS, "photos"), (1.0, 0.0))
    scores |= {"everywhere": (0.5, 0.6), "regions": (0.75, 0.25)}
    seen = [
        bleeding.Seen(condition, f"{pair}", subject, 0, own, other)
        for condition, (own, other) in scores.items()
        for pair in range(3)
        for subject in ("a", "b")
    ]
    lines = bleeding.table(seen).splitlines()
    everywhere, difference = lines[2], lines[-2]
    assert len(lines) == 2 + 5 + 2
    assert everywhere == (
        "| everywhere | 0.500 (0.500 to 0.500) | 0.600 (0.600 to 0.600) |"
        " 0.000 (0.000 to 0.000) | 6 |"
    )
    assert difference == (
        "| regions: difference | 0.250 (0.250 to 0.250) | -0.350 (-0.350 to -0.350) |"
        " 1.000 (1.000 to 1.000) | 6 |"
    )


def test_finished_pictures_are_not_drawn_again(tmp_path, monkeypatch):
    def train(subject, *_, **__):
        raise InterruptedError(subject.id)

    monkeypatch.setattr(bleeding, "trained", train)
    pair = bleeding.pairs()[0]
    for condition in bleeding.CONDITIONS:
        folder = tmp_path / "pictures" / condition / bleeding.name_of(pair)
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "100.png")
    bleeding.draw(None, pair, tmp_path, [100], 25)
    with pytest.raises(InterruptedError, match=pair[0].id):
        bleeding.draw(None, pair, tmp_path, [100, 101], 25)
