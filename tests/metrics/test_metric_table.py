"""The table of metrics: a made-up metric with an extractor of its own is one call away from every
place that shows scores, and the contract of what it gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
from dreamtune.metrics.features import mean_error
from dreamtune.metrics.table import find_metrics, scores_of, scores_text
from dreamtune.training.console import table
from dreamtune.training.tracker import Tracker
from dreamtune.training.train import train

OLD_KEYS = {"dino", "dino_photos", "clip_i", "clip_i_photos", "clip_t", "clip_t_shuffled"}
ERROR_KEYS = {f"{key}_se" for key in (*OLD_KEYS, "clip_t_minus_shuffled")}


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
    assert record.keys() >= OLD_KEYS | ERROR_KEYS | {"colour", "colour_spread", "colour_se"}
    photos = torch.tensor([rgb(p) for p in photos_of(photo_dir)])
    made = torch.tensor([rgb(i) for i in read_grid(result.run_dir / "samples/000000.png", 2, 16)])
    expected = (made - photos.mean(0)).abs().mean().item()
    assert record["colour"] == pytest.approx(expected, abs=1e-3)
    shown = f"{expected:.1f}"

    page = (result.run_dir / "report.html").read_text()
    assert '<th scope="col">Colour &amp; light</th>' in page
    row = re.search(r'<tr class="[^"]*"><th scope="row">0.*?</tr>', page)
    spread = (made - photos.mean(0)).abs().mean(1).std().item() / 2**0.5
    assert record["colour_se"] == pytest.approx(spread, abs=1e-3)
    assert row is not None and f"<td>{shown} <small>± {spread:.1f}</small></td>" in row[0]
    best = result.history[[r["step"] for r in result.history].index(result.best_step)]
    note = f"spread of the photos {record['colour_spread']:.1f}"
    fact = f"<dt>Colour &amp; light</dt><dd>{best['colour']:.1f}<small>{note}</small></dd>"
    assert fact in page
    assert page.count("<figcaption>Colour &amp; light</figcaption>") == 1
    assert page.count("<svg") == 5 and ">spread of the photos</text>" in page
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
    assert scores.record() == {
        "colour": 15.0, "colour_spread": 30.0, "held": None, "colour_se": 15.0,
    }  # fmt: skip
    held = scorers.references(photos, held_out=pictures(1))
    assert scorers.score(images, ["a", "b"], held).per_image["held"] == [0.0, 30.0]
    assert list(Scorers.load(scorer_names, ["clip_t", "dino"]).extractors) == ["clip", "dino"]


def test_every_value_of_an_image_is_kept(scorer_names: dict[str, str]) -> None:
    scorers = Scorers.load(scorer_names)
    scores = scorers.score(pictures(3), PROMPTS, scorers.references(pictures(2)))
    assert scores.record().keys() == OLD_KEYS | ERROR_KEYS
    assert scores.per_image.keys() == {"dino", "clip_i", "clip_t", "clip_t_shuffled"}
    for key, values in scores.per_image.items():
        assert len(values) == 3
        assert sum(values) / 3 == pytest.approx(scores.means[key], abs=1e-6)


@pytest.mark.parametrize("prompts", [PROMPTS, [*PROMPTS, *PROMPTS, PROMPTS[0]], PROMPTS[:1] * 4])
def test_standard_errors_of_every_mean(scorer_names: dict[str, str], prompts: list[str]) -> None:
    """One image a prompt, several, and a single prompt; numpy and the formula by hand."""
    scorers = Scorers.load(scorer_names)
    images = [Image.new("RGB", (8, 8), (30 * i, 250 - 20 * i, i * i)) for i in range(len(prompts))]
    photos = pictures(4)
    references = scorers.references(photos)
    scores = scorers.score(images, prompts, references)
    values = {k: np.array(v) for k, v in scores.per_image.items()}
    if "clip_t_shuffled" in values:
        values["clip_t_minus_shuffled"] = values["clip_t"] - values["clip_t_shuffled"]
    assert len(values) == (3 if len(set(prompts)) == 1 else 5)
    record = scores.record()
    for key, v in values.items():
        expected = plain = v.std(ddof=1) / len(v) ** 0.5
        groups = [v[[p == q for q in prompts]] - v.mean() for p in dict.fromkeys(prompts)]
        if 1 < len(groups) < len(v):
            squares = sum(g.sum() ** 2 for g in groups) * len(groups) / (len(groups) - 1)
            expected = max(plain, squares**0.5 / len(v))
        assert record[f"{key}_se"] == pytest.approx(expected, rel=1e-4, abs=1e-8), key
    assert record.keys() - {f"{k}_se" for k in values} >= {"dino_photos_se", "clip_i_photos_se"}

    features = references.photos["dino"].double().numpy()
    without = []
    for i in range(4):
        rest = np.delete(features, i, axis=0)
        without.append(((rest @ rest.T).sum() - np.square(rest).sum()) / 6)
    expected = (3 / 4 * np.square(without - np.mean(without)).sum()) ** 0.5
    assert record["dino_photos_se"] == pytest.approx(expected, rel=1e-4, abs=1e-8) and expected > 0


def test_images_of_one_prompt_are_not_independent() -> None:
    values, index = torch.tensor([0.1, 0.1, 0.4, 0.4]), torch.tensor([0, 0, 1, 1])
    assert mean_error(values, index) == pytest.approx(0.15)  # two prompts, 0.3 apart
    assert mean_error(values, torch.arange(4)) == pytest.approx(0.3 / 12**0.5)
    # Prompts that agree by chance do not make the images agree.
    assert mean_error(values, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.3 / 12**0.5)
    assert mean_error(values, torch.zeros(4, dtype=torch.long)) == pytest.approx(0.3 / 12**0.5)


def test_too_few_images_or_photos_have_no_standard_error(scorer_names: dict[str, str]) -> None:
    scorers = Scorers.load(scorer_names)
    for photos in (1, 2):
        record = scorers.score(
            pictures(1), PROMPTS[:1], scorers.references(pictures(photos))
        ).record()
        assert {v for k, v in record.items() if k.endswith("_se")} == {None}


def test_the_table_holds_what_the_rule_needs_first() -> None:
    assert [m.key for m in find_metrics()] == ["dino", "clip_i", "clip_t"] == list(NEEDED)
    assert {k for m in find_metrics() for k in m.functions} == OLD_KEYS
    # A level such as the photos' has no error image by image to be paired with.
    possible = {"dino_minus_photos_se", "clip_i_minus_photos_se"}
    assert {k for m in find_metrics() for k in m.record_keys} == OLD_KEYS | ERROR_KEYS | possible


def test_old_records_are_read() -> None:
    record = {"step": 3, "dino": 0.5, "clip_i": None, "loss": 0.1, "dino_photos": 0.75}
    assert scores_of(record) == {"dino": 0.5}
    assert scores_text(record) == "DINO 0.500"
    assert METRICS["clip_t"].text(record) == "–"
    assert METRICS["dino"].comparison_text(record) == "photos among themselves 0.750"
    assert METRICS["clip_t"].comparison_text(record) == "" == scores_text({"step": 0})
    assert METRICS["dino"].error_text(record) == ""
    assert METRICS["dino"].error_text({**record, "dino_se": 0.0123}) == "± 0.012"


def test_clashes_and_unknown_names_are_refused(plugged: None, scorer_names: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="`colour` is taken by `Colour & light`"):
        register(COLOUR)
    with pytest.raises(ValueError, match="`dino_photos` is taken by `DINO`"):
        register(Metric("dino_photos", "x", Pixels, off_colour, "x"))
    with pytest.raises(ValueError, match="`clip_t_minus_shuffled_se` is taken by `CLIP-T`"):
        register(Metric("clip_t_minus_shuffled_se", "x", Pixels, off_colour, "x"))

    class Other(Pixels):
        pass

    with pytest.raises(ValueError, match="extractor name `pixels` is taken by `test_metric_table`"):
        register(Metric("other", "x", Other, off_colour, "x"))
    with pytest.raises(ValueError, match="`dyno`. Did you mean `dino`.* Metrics: dino, .*colour"):
        Scorers.load(scorer_names, ["dino", "dyno"])
    with pytest.raises(ValueError, match="weights for `clip`, .* asked for \\(colour\\) .* pixels"):
        Scorers.load({"clip": "embedded"}, ["colour"])


def test_a_metric_gives_one_value_an_image(plugged: None) -> None:
    register(Metric("pairs", "Pairs", Pixels, lambda f: f.images @ f.photos.T, "all"))
    scorers = Scorers.load({}, ["pairs"])
    with pytest.raises(ValueError, match=r"`pairs` gave values of shape \(2, 3\) for 2 images"):
        scorers.score(pictures(2), ["a", "b"], scorers.references(pictures(3)))
