"""Features on disk: the same numbers without decoding or encoding, a cap, damage, clearing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from galleries import mask, picture, save, write_images, write_photos
from PIL import Image

from dreamtune.cli import main
from dreamtune.evaluation.layout import read_images, read_photos
from dreamtune.evaluation.protocols import PROTOCOLS
from dreamtune.evaluation.scoring import score_images
from dreamtune.evaluation.task import Task
from dreamtune.metrics import Scorers, feature_cache
from dreamtune.metrics.store import INSIDE, FeatureStore, Picture


def scored(root: Path, scorers: Scorers):
    task = Task(read_images(root / "images"), read_photos(root / "photos")[0], {})
    return score_images(task, scorers, PROTOCOLS["dreamtune"])


def test_a_second_scoring_encodes_nothing(
    tmp_path: Path, scorer_names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "photos", masks=True)
    write_images(tmp_path / "images")
    black = tmp_path / "images" / "dog" / "unrelated" / "a pizza" / "0.png"
    save(Image.new("RGB", (40, 40)), black)
    scorers = Scorers.load(scorer_names, PROTOCOLS["dreamtune"].metrics)
    first = scored(tmp_path, scorers)
    images = {name: e.images for name, e in scorers.extractors.items()}
    counts: list[int] = []
    for name, extractor in scorers.extractors.items():
        monkeypatch.setattr(
            extractor, "images", lambda x, name=name: (counts.append(len(x)), images[name](x))[1]
        )
    again = scored(tmp_path, scorers)
    assert not counts and again.images == first.images
    assert again.coverage == first.coverage and again.warnings == first.warnings
    assert any("black" in warning for warning in first.warnings)
    # another picture alone is encoded, by both; other weights share nothing
    save(picture(77), black)
    scored(tmp_path, scorers)
    assert counts == [1, 1]
    extractor = scorers.extractors["dino"]
    extractor.protocol = {**extractor.protocol, "weights": "other"}
    counts.clear()
    scored(tmp_path, scorers)
    assert sum(counts) == counts[0] > 10


def pictures(root: Path, count: int) -> list[Picture]:
    found = []
    for i in range(count):
        path = save(picture(i), root / f"{i}.png")
        found.append(Picture(path, path.name, f"{i:064}"))
    return found


def test_damage_is_a_miss_and_the_oldest_goes_first(
    tmp_path: Path, scorer_names: dict[str, str]
) -> None:
    extractors = Scorers.load({"dino": scorer_names["dino"]}, ["dino"]).extractors
    some, root = pictures(tmp_path, 3), tmp_path / "cache"
    own = Picture(save(mask(0), tmp_path / "mask.png"), "mask.png", "f" * 64)
    some[0] = replace(some[0], mask=own)
    for part in (some[:2], some[2:]):
        FeatureStore(extractors, ["dino"], cache=root).add(part)
    expected = FeatureStore(extractors, ["dino"])
    expected.add(some)
    old, new = (path for *_, path in feature_cache.all_files(root))
    os.utime(old, (1, 1))
    kept = FeatureStore(extractors, ["dino"], cache=root)
    kept.add(some)
    assert kept.seconds["decode"] == 0
    for part in ("", INSIDE):
        torch.testing.assert_close(
            kept.features("dino", some, part), expected.features("dino", some, part),
            rtol=0, atol=1e-6, equal_nan=True,
        )  # fmt: skip
    assert old.stat().st_mtime > 1  # it was used
    os.utime(old, (1, 1))
    size = new.stat().st_size
    assert feature_cache.trim(root, size) > 0
    assert not old.exists() and new.exists()
    new.write_bytes(b"not safetensors")
    kept = FeatureStore(extractors, ["dino"], cache=root)
    kept.add(some)
    assert kept.seconds["decode"] > 0
    assert torch.equal(kept.features("dino", some), expected.features("dino", some))


def test_the_command_says_and_clears(
    tmp_path: Path,
    scorer_names: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "cache"
    monkeypatch.setenv("DREAMTUNE_CACHE", str(root))
    extractors = Scorers.load({"dino": scorer_names["dino"]}, ["dino"]).extractors
    FeatureStore(extractors, cache=feature_cache.place()).add(pictures(tmp_path, 2))
    mine = root / "mine.safetensors"
    mine.write_text("somebody's")
    assert main(["cache"]) == 0
    assert "1 files, 0.0 MiB of at most 512" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert "0 files, 0.0 MiB of at most 512" in capsys.readouterr().out
    assert list(root.iterdir()) == [mine]
    monkeypatch.setenv("DREAMTUNE_CACHE_MB", "few")
    assert main(["cache"]) == 1
    assert "must be a whole number of MiB, got 'few'" in capsys.readouterr().err
    monkeypatch.setenv("DREAMTUNE_CACHE", "off")
    assert main(["cache"]) == 0 and feature_cache.place() is None
