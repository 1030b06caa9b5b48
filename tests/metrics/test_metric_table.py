"""The table of metrics: a made-up metric with an extractor of its own is one call away from every
place that shows scores, and the contract of what it gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from scorer_folders import PROMPTS, write_clip, write_dino
from torch import Tensor

from dreamtune.config import Config
from dreamtune.evaluation.selection import NEEDED
from dreamtune.evaluation.validation import read_grid
from dreamtune.metrics import METRICS, Comparison, Extractor, Features, Metric, Scorers, register
from dreamtune.metrics import table as table_module
from dreamtune.metrics.table import find_metrics, scores_of, scores_text
from dreamtune.training.console import table
from dreamtune.training.tracker import Tracker
from dreamtune.training.train import train

OLD_KEYS = {"dino", "dino_photos", "clip_i", "clip_i_photos", "clip_t", "clip_t_shuffled"}


class Pixels(Extractor):
    """Mean red, green and blue, 0 to 255."""

    name, default, libraries = "pixels", "plain", ("numpy",)
    calls: list[int] = []

    def __init__(self, name: str, device: Any = "cpu", dtype: Any = torch.float32) -> None:
        self.protocol = {"model": name}

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        self.calls.append(len(images))
        return torch.tensor([rgb(i) for i in images])


def rgb(image: Image.Image) -> list[float]:
    pixels = list(image.convert("RGB").getdata())
    return [sum(p[c] for p in pixels) / len(pixels) for c in range(3)]


def off_colour(f: Features) -> Tensor:
    return (f.images - f.photos.mean(0)).abs().mean(1)


COLOUR = Metric(
    key="colour",
    title="Colour & light",
    extractor=Pixels,
    score=off_colour,
    pairing="mean distance of an image's mean colour from the photos'",
    comparison=Comparison(
        suffix="spread",
        title="spread of the photos",
        score=lambda f: f.photos.std(0).mean().item(),
        pairing="mean deviation of the photos' mean colours",
        constant=True,
    ),
    format=".1f",
)


def nearest(f: Features) -> Tensor | None:
    if f.held_out is None:
        return None
    return (f.images[:, None] - f.held_out).abs().mean(2).min(1).values


@pytest.fixture
def plugged() -> Iterator[None]:
    before = dict(METRICS)
    register(COLOUR)
    yield
    for key in METRICS.keys() - before.keys():
        del table_module._TABLE[key]


@pytest.fixture(scope="session")
def scorer_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("scorers")
    dino, clip = write_dino(folder / "dino"), write_clip(folder / "clip")
    return {"dino": str(dino), "clip": f"local-dir:{clip}"}


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (60 * i, 200 - 30 * i, 90)) for i in range(count)]


def test_a_made_up_metric_is_seen_everywhere(
    plugged: None,
    scorer_names: dict[str, str],
    tiny_v_pipeline_dir: Path,
    photo_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logged: list[dict[str, float]] = []

    class Writer:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append(values)

        def finish(self) -> None: ...

    def quiet(self: Tracker, values: dict[str, Any], step: int, images: Any = ()) -> None:
        self.inner = Writer()
        log(self, values, step)

    log = Tracker.log
    monkeypatch.setattr(Tracker, "log", quiet)
    settings = {
        "pretrained_model_name_or_path": str(tiny_v_pipeline_dir), "instance_prompt": "a sks dog",
        "instance_data_dir": str(photo_dir), "validation_prompt": ["a {} on a red chair", "a {}"],
        "max_train_steps": 2, "num_inference_steps": 2, "output_dir": str(tmp_path / "run"),
        "options": {"rank": 2}, "report_to": "none",
    }  # fmt: skip
    result = train(Config(**settings, **scorer_names))

    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert record.keys() >= OLD_KEYS | {"colour", "colour_spread"}
    photos = torch.tensor([rgb(p) for p in photos_of(photo_dir)])
    made = torch.tensor([rgb(i) for i in read_grid(result.run_dir / "samples/000000.png", 2, 16)])
    expected = (made - photos.mean(0)).abs().mean().item()
    assert record["colour"] == pytest.approx(expected, abs=1e-3)
    shown = f"{expected:.1f}"

    page = (result.run_dir / "report.html").read_text()
    assert '<th scope="col">Colour &amp; light</th>' in page
    row = re.search(r'<tr class="[^"]*"><th scope="row">0.*?</tr>', page)
    assert row is not None and f"<td>{shown}</td>" in row[0]
    best = result.history[[r["step"] for r in result.history].index(result.best_step)]
    note = f"spread of the photos {record['colour_spread']:.1f}"
    fact = f"<dt>Colour &amp; light</dt><dd>{best['colour']:.1f}<small>{note}</small></dd>"
    assert fact in page
    assert page.count("<figcaption>Colour &amp; light</figcaption>") == 1
    assert page.count("<svg") == 4 and ">spread of the photos</text>" in page
    assert COLOUR.pairing.replace("'", "&#x27;") in page
    assert "&quot;pixels&quot;" in page and "&quot;numpy&quot;" in page

    assert f"Colour & light {shown}, best 0" in capsys.readouterr().err
    lines = table({"one": result}, {"two": "no photos"}).splitlines()
    assert lines[0].split() == [
        "run",
        "steps",
        "best",
        *["DINO", "CLIP-I", "CLIP-T", "Colour", "&", "light"],
    ]
    assert lines[1].split()[-1] == f"{best['colour']:.1f}"
    assert len(lines[0]) == len(lines[1]) and lines[2] == "two  failed: no photos"
    assert any(v.get("colour") == record["colour"] for v in logged)
    with safe_open(result.adapter, "pt") as file:
        header = json.dumps(file.metadata())
    assert f'colour\\": {best["colour"]}' in header.replace('\\\\"', '\\"')


def photos_of(folder: Path) -> list[Image.Image]:
    from dreamtune.data.photos import read_folder

    return [p.image for p in read_folder(folder).photos]


def test_only_what_is_asked_for_is_loaded_and_each_set_is_embedded_once(
    plugged: None, scorer_names: dict[str, str]
) -> None:
    register(
        Metric("held", "Held out", Pixels, nearest, "nearest held-out photo", while_training=False)
    )
    assert [m.key for m in find_metrics()] == ["dino", "clip_i", "clip_t", "colour"]
    scorers = Scorers.load({}, metrics=["colour", "held"])
    assert list(scorers.extractors) == ["pixels"]
    assert scorers.protocol["pixels"] == {"model": "plain"}
    assert list(scorers.protocol["versions"]) == ["torch", "numpy"]
    assert list(scorers.protocol["pairing"]) == ["colour", "colour_spread", "held"]
    Pixels.calls.clear()
    photos, images = pictures(3), pictures(2)
    scores = scorers.score(images, ["a", "b"], scorers.references(photos))
    assert Pixels.calls == [3, 2]
    assert scores.record()["held"] is None and "held" not in scores.per_image
    # (0, 200, 90) and (60, 170, 90) against a mean of (60, 170, 90)
    assert scores.per_image["colour"] == [30.0, 0.0]
    assert scores.record() == {"colour": 15.0, "colour_spread": 30.0, "held": None}
    held = scorers.references(photos, held_out=pictures(1))
    assert scorers.score(images, ["a", "b"], held).per_image["held"] == [0.0, 30.0]
    assert list(Scorers.load(scorer_names, ["clip_t", "dino"]).extractors) == ["clip", "dino"]


def test_every_value_of_an_image_is_kept(scorer_names: dict[str, str]) -> None:
    scorers = Scorers.load(scorer_names)
    scores = scorers.score(pictures(3), PROMPTS, scorers.references(pictures(2)))
    assert scores.record().keys() == OLD_KEYS
    assert scores.per_image.keys() == {"dino", "clip_i", "clip_t", "clip_t_shuffled"}
    for key, values in scores.per_image.items():
        assert len(values) == 3
        assert sum(values) / 3 == pytest.approx(scores.means[key], abs=1e-6)


def test_the_table_holds_what_the_rule_needs_first() -> None:
    assert list(METRICS) == ["dino", "clip_i", "clip_t"] == list(NEEDED)
    assert {k for m in METRICS.values() for k in m.functions} == OLD_KEYS


def test_old_records_are_read() -> None:
    record = {"step": 3, "dino": 0.5, "clip_i": None, "loss": 0.1, "dino_photos": 0.75}
    assert scores_of(record) == {"dino": 0.5}
    assert scores_text(record) == "DINO 0.500"
    assert METRICS["clip_t"].text(record) == "–"
    assert METRICS["dino"].comparison_text(record) == "photos among themselves 0.750"
    assert METRICS["clip_t"].comparison_text(record) == "" == scores_text({"step": 0})


def test_clashes_and_unknown_names_are_refused(plugged: None, scorer_names: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="`colour` is taken by `Colour & light`"):
        register(COLOUR)
    with pytest.raises(ValueError, match="`dino_photos` is taken by `DINO`"):
        register(Metric("dino_photos", "x", Pixels, off_colour, "x"))

    class Other(Pixels):
        pass

    with pytest.raises(ValueError, match="extractor name `pixels` is taken by `test_metric_table`"):
        register(Metric("other", "x", Other, off_colour, "x"))
    with pytest.raises(ValueError, match="`lpips`. Metrics: dino, clip_i, clip_t, colour"):
        Scorers.load(scorer_names, ["dino", "lpips"])
    with pytest.raises(ValueError, match="weights for `clip`, .* asked for \\(colour\\) .* pixels"):
        Scorers.load({"clip": "embedded"}, ["colour"])


def test_a_metric_gives_one_value_an_image(plugged: None) -> None:
    register(Metric("pairs", "Pairs", Pixels, lambda f: f.images @ f.photos.T, "all"))
    scorers = Scorers.load({}, ["pairs"])
    with pytest.raises(ValueError, match=r"`pairs` gave values of shape \(2, 3\) for 2 images"):
        scorers.score(pictures(2), ["a", "b"], scorers.references(pictures(3)))
