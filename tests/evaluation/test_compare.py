"""Results on disk, and what a comparison says of two of them."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from galleries import EVERY, picture, save, task_of

from dreamtune.cli import main
from dreamtune.evaluation.compare import compare, differing, loose
from dreamtune.evaluation.results import (
    PER_IMAGE,
    PER_SUBJECT,
    RESULTS,
    Results,
    Row,
    read_results,
    write_results,
)
from dreamtune.evaluation.scoring import score_images

PROTOCOL = {
    "name": "paper", "averaging": "pairs", "metrics": ["dino", "clip_t"],
    "scorers": {"dino": {"weights": "aaaa"}, "clip": {"weights": "bbbb"}}, "sampling": None,
}  # fmt: skip


def results(shift: float = 0.0, noise: float = 0.02, seed: int = 1, **changes) -> Results:
    """8 subjects x 3 prompts x 2 seeds; both scores vary by subject far more than by method."""
    random, own = np.random.default_rng(0), np.random.default_rng(seed)
    rows = []
    for s in range(8):
        level = random.normal(0.6, 0.1)
        for p in ("on the beach", "in the snow", "=cmd()"):
            for k in range(2):
                dino = float(level + shift + own.normal(0, noise))
                scores = {"dino": dino, "clip_t": float(0.3 + own.normal(0, noise))}
                rows.append(
                    Row(f"s{s}", p, k, False, f"s{s}/{p}/{k}.png", "00", scores, {"dino": 5})
                )
    inputs = {"photos": {f"s{s}": {"photos": "cc"} for s in range(8)}}
    return Results(**{"source": {"kind": "folder"}, "protocol": PROTOCOL, "inputs": inputs,
                      "images": rows, **changes})  # fmt: skip


def test_a_difference_below_that_of_subjects_is_told():
    found = compare(results(), results(shift=0.02, seed=2))
    dino, clip = found.differences
    assert dino.differs and not clip.differs
    assert dino.estimate.mean == pytest.approx(dino.b - dino.a, abs=1e-12)
    assert (dino.estimate.n, dino.estimate.clusters) == (48, 8)
    assert dino.sentence().startswith("DINO: B is higher than A by 0.0")
    assert "48 pairs of images from 8 subjects" in dino.sentence()
    assert "CLIP-T: no difference can be told: B - A = " in found.text("a", "b")
    assert "A and B differ in DINO (B higher); 1 of 2 scores." in found.verdict()
    back = compare(results(shift=0.02, seed=2), results())
    assert back.differences[0].sentence().startswith("DINO: B is lower than A by 0.0")


def test_a_rerun_is_no_difference():
    found = compare(results(), results(seed=3))
    assert found.verdict() == "A and B cannot be told apart by any of 2 scores."
    same = compare(results(), results())
    assert "DINO: A and B are equal" in same.text("a", "b")


def test_images_without_a_partner_are_counted_and_left_out():
    whole = results()
    part = replace(whole, images=[r for r in whole.images if r.seed == 0 or r.subject != "s0"])
    found = compare(part, whole)
    assert (found.alone_a, found.alone_b, found.differences[0].estimate.n) == (0, 3, 45)
    assert "left out: 0 images of A, 3 of B" in found.text("a", "b")
    other = replace(whole, images=[replace(r, seed=r.seed + 9) for r in whole.images])
    with pytest.raises(ValueError, match=r"no image of A has a partner in B.*\(s0, `on the beach`"):
        compare(whole, other)


def test_other_protocols_are_refused_with_what_differs():
    scorers = {**PROTOCOL["scorers"], "clip": {"weights": "dddd"}}
    other = {**PROTOCOL, "name": "oft", "scorers": scorers, "about": "words"}
    with pytest.raises(ValueError) as caught:
        compare(results(), results(protocol=other))
    for part in ("`name`: paper and oft", "`scorers.clip.weights`: bbbb and dddd"):
        assert part in str(caught.value)
    assert "about" not in str(caught.value)
    steps = [{**PROTOCOL, "sampling": {"steps": n}} for n in (25, 50)]
    said = {**PROTOCOL, "sampling": {"steps": 25, "prompts": ["a {}"], "seeds": [0, 1]}}
    compare(results(protocol=steps[0]), results(protocol=said))  # a benchmark's, and of one run
    other = {**PROTOCOL, "sampling": {**said["sampling"], "prompts": ["a red {}"]}}
    with pytest.raises(ValueError, match="`sampling.prompts`: "):
        compare(results(protocol=other), results(protocol=said))
    with pytest.raises(ValueError, match="`sampling.steps`: 25 and 50"):
        compare(results(protocol=steps[0]), results(protocol=steps[1]))
    # of a folder of images nobody knows
    assert "is not known" in compare(results(), results(protocol=steps[1])).notes[0]
    photos = {"photos": {f"s{s}": {"photos": "cc" if s else "dd"} for s in range(8)}}
    with pytest.raises(ValueError, match=r"against other photos of `s0` \(1 of 8"):
        compare(results(), results(inputs=photos))
    assert differing({"a": [1]}, {"a": [1], "b": None}) == []


def test_weights_are_their_hash_and_not_the_folder_they_lay_in():
    def protocol(folder, digest="aaaa"):
        scorers = {"dino": {"model": folder, "weights": digest}, "clip": {"weights": "bbbb"}}
        encoders = {"dino": {"weights": f"local/{folder}", "architecture": {}}}
        return {**PROTOCOL, "scorers": scorers, "encoders": encoders,
                "masks": {"model": folder, "weights": "cccc"}}  # fmt: skip

    one, other = (results(protocol=protocol(name)) for name in ("dino-a", "dino-b"))
    assert compare(one, other).differences[0].key == "dino"
    with pytest.raises(ValueError) as caught:
        compare(one, results(protocol=protocol("dino-b", "dddd")))
    for part in (
        "`scorers.dino.model`: dino-a and dino-b",
        "`scorers.dino.weights`: aaaa and dddd",
    ):
        assert part in str(caught.value)
    assert "masks" not in str(caught.value)
    # of results without hashes the names are all there is
    bare = {**PROTOCOL, "scorers": {"dino": {"model": "a"}}}
    with pytest.raises(ValueError, match="`scorers.dino.model`: a and b"):
        compare(
            results(protocol=bare), results(protocol={**bare, "scorers": {"dino": {"model": "b"}}})
        )


def test_files_hold_every_number_and_are_read_back(tmp_path, capsys):
    levels = {"dino_photos": {"s0": 0.9}}
    a = results(levels=levels, warnings=["odd"], versions={"torch": "2"}, seconds={"decode": 1.0})
    b = results(shift=0.1, versions={"torch": "3"})
    for name, result in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        write_results(result, tmp_path / name)
    back = read_results(tmp_path / "a")
    assert back == replace(a, base=[])
    stated = json.loads((tmp_path / "a" / RESULTS).read_text())["scores"]["dino"]
    assert stated["mean"] == pytest.approx(np.mean([r.scores["dino"] for r in a.images]))
    assert stated["low"] < stated["mean"] < stated["high"]
    assert (stated["n"], stated["clusters"], stated["unit"]) == (48, 8, "subjects")
    with (tmp_path / "a" / PER_IMAGE).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 48
    assert float(lines[5]["dino"]) == a.images[5].scores["dino"]
    assert lines[5]["prompt"] == "'=cmd()"  # no formula
    with (tmp_path / "a" / PER_SUBJECT).open(newline="") as file:
        own = {(line["subject"], line["score"]): line for line in csv.DictReader(file)}
    expected = np.mean([r.scores["dino"] for r in a.images if r.subject == "s3"])
    assert float(own["s3", "dino"]["mean"]) == pytest.approx(expected)
    assert own["s3", "dino"]["unit"] == "prompts"
    assert float(own["s0", "dino_photos"]["mean"]) == 0.9
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / RESULTS)]) == 0
    said = capsys.readouterr().out
    assert "Note: torch was 2 for A and 3 for B." in said and "differ in DINO (B higher)" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("images"), "`images` is missing"),
        (lambda r: r.update(images=[]), "holds no images"),
        (lambda r: r.update(format_version=2), "format version 2, this dreamtune reads up to 1"),
        (lambda r: r["images"][3].pop("subject"), "`images`, 4: `subject` is missing"),
        (lambda r: r["images"][0]["scores"].update(dino="x"), "`images`, 1: `scores`"),
        (lambda r: r["protocol"].pop("averaging"), "`averaging` is missing"),
    ],
)
def test_damaged_results_are_named(tmp_path, change, message):
    write_results(results(), tmp_path)
    file = tmp_path / RESULTS
    stated = json.loads(file.read_text())
    change(stated)
    file.write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=message) as caught:
        read_results(tmp_path)
    assert str(file) in str(caught.value)


def test_a_folder_without_results(tmp_path, capsys):
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 1
    assert "give the folder that `dreamtune score` wrote" in capsys.readouterr().err


@pytest.mark.parametrize("odd", [3, None, "x", ["weights"]])
def test_a_protocol_that_somebody_wrote_is_compared(odd):
    """Its scorers may be anything: the encoders are then compared with their weights."""
    said = {"encoders": {"dino": {"weights": "a"}}, "scorers": {"dino": odd}}
    assert loose(said) == said
    hashed = {**said, "scorers": {"dino": {"weights": "0" * 64}}}
    assert loose(hashed)["encoders"] == {"dino": {}}
    assert differing(loose(said), loose(hashed))[0] == "`encoders.dino.weights`: a and nothing"


def with_drift(bases: tuple[str, ...], shift: float = 0.0) -> Results:
    rows = [
        Row(f"s{s}", "a pizza", 0, True, "0.png", "00", {"dino_drift": 0.1 * s + shift}, base=base)
        for s, base in enumerate(bases)
    ]
    protocol = PROTOCOL | {"metrics": ["dino", "clip_t", "dino_drift"]}
    return replace(results(), images=[*results().images, *rows], protocol=protocol)


def test_drift_from_other_images_of_the_base_is_left_out_and_said():
    same = compare(with_drift(("x", "y", "")), with_drift(("x", "y", "z"), 0.5))
    assert [d.key for d in same.differences] == ["dino", "clip_t", "dino_drift"]
    assert same.differences[2].estimate.mean == pytest.approx(0.5) and not same.notes
    assert same.differences[2].estimate.n == 3  # of an older result nothing is known
    some = compare(with_drift(("x", "y", "z")), with_drift(("x", "y", "w"), 0.5))
    assert some.differences[2].estimate.n == 2
    assert some.notes == [
        "Left out of DINO, drift: 1 of 3 images, which A and B compare with other images of the "
        "base. Score both with one --base_images."
    ]
    none = compare(with_drift(("x",)), with_drift(("y",), 0.5))
    assert [d.key for d in none.differences] == ["dino", "clip_t"] and len(none.notes) == 1


def test_drift_is_known_by_the_base_of_unrelated_prompts(folders, scorers, tmp_path):
    """The base's images of the subject's own prompts are the same."""
    photos, images, base = folders
    other = shutil.copytree(base, tmp_path / "base")
    save(picture(1), other / "dog" / "unrelated" / "a pizza" / "0.png")
    for name, own in (("a", base), ("b", other)):
        (tmp_path / name).mkdir()
        write_results(score_images(task_of((photos, images, own)), scorers, EVERY), tmp_path / name)
    found = compare(*(read_results(tmp_path / name) for name in "ab"))
    assert [note.split(", which")[0] for note in found.notes] == [
        "Left out of DINO, drift: 1 of 3 images"
    ]
    (drift,) = [d for d in found.differences if d.key == "dino_drift"]
    assert drift.estimate.n == 2 and drift.a == drift.b


def test_an_interval_of_a_difference_is_no_wider_than_what_is_possible():
    a, b = (
        [Row(f"s{i}", "a dog", 0, False, "0.png", "00", {"dino": x}) for i, x in enumerate(values)]
        for values in ((-1.0, 1.0), (1.0, 0.9))
    )
    estimate = compare(results(images=a), results(images=b)).differences[0].estimate
    assert estimate.mean == pytest.approx(0.95)
    assert (estimate.low, estimate.high) == (-2.0, 2.0)
