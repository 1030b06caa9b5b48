"""Folders to numbers: against naive loops, whatever the order and the batches; and bad input."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from galleries import EVERY, PROMPTS, SUBJECTS, mask, picture, save, task_of
from PIL import Image

from dreamtune.data.words import read_words, without_identifier
from dreamtune.evaluation.compare import compare
from dreamtune.evaluation.layout import Photos, read_images
from dreamtune.evaluation.protocols import Encoder, Protocol
from dreamtune.evaluation.results import read_results, write_results
from dreamtune.evaluation.scores_page import heat, write_page
from dreamtune.evaluation.scoring import score_images
from dreamtune.evaluation.statistics import estimate
from dreamtune.metrics import METRICS, Scorers
from dreamtune.metrics import store as store_module
from dreamtune.metrics.preprocess import painted


def inside(path, cover, colour):
    return painted(Image.open(path), Image.open(cover), colour, subject=False)


def test_every_score_equals_a_naive_loop(folders, scorers, results):
    dino, clip = scorers.extractors["dino"], scorers.extractors["clip"]

    def encode(path, extractor=dino):
        return extractor.images([Image.open(path).convert("RGB")])[0]

    photos, images, base = folders
    own = {s: [encode(p) for p in sorted((photos / s).glob("*.png"))] for s in SUBJECTS}
    held = {s: [encode(p) for p in sorted((photos / s / "reference").glob("*"))] for s in SUBJECTS}

    def mean(x, rows):
        return float(np.mean([x @ row for row in rows]))

    for row in results.images:
        x = encode(images / row.file)
        if row.unrelated:
            drift = 1 - float(x @ encode(base / row.file))
            assert row.scores == {"dino_drift": pytest.approx(drift, abs=1e-5)}
            continue
        s, place = row.subject, (images / row.file).parent
        twin = encode(place / f"{1 - row.seed}.png")
        near = max((mean(x, rows), name) for name, rows in held.items())
        y = encode(images / row.file, clip)
        texts = clip.texts([without_identifier(p, "sks") for p in PROMPTS])
        expected = {
            "dino": mean(x, own[s]),
            "dino_held_out": mean(x, held[s]),
            "dino_nearest": max(float(x @ row) for row in own[s]),
            "dino_retrieval": float(near[1] == s),
            "dino_diversity": 1 - float(x @ twin),
            "clip_t": float(y @ texts[PROMPTS.index(row.prompt)]),
            "clip_t_shuffled": float(y @ texts[1 - PROMPTS.index(row.prompt)]),
        }
        for key, value in expected.items():
            assert row.scores[key] == pytest.approx(value, abs=1e-5), key
        masked = (s, row.prompt, row.seed) == ("dog", PROMPTS[0], 0)
        assert (row.scores["masked_dino"] is not None) == masked
        if masked:
            paths = sorted((photos / s).glob("*.png"))
            rows = dino.images(
                [inside(p, p.parent / "masks" / p.name, dino.mean_colour) for p in paths]
            )
            cover = place / "masks" / "0.png"
            found = dino.images([inside(images / row.file, cover, dino.mean_colour)])[0]
            assert row.scores["masked_dino"] == pytest.approx(mean(found, rows), abs=1e-5)
    by_hand = {s: np.mean([r.scores["dino"] for r in results.images
                           if r.subject == s and not r.unrelated]) for s in SUBJECTS}  # fmt: skip
    assert results.scores()["dino"].mean == pytest.approx(np.mean([*by_hand.values()]))
    # a subject of 3, of 4 and of 5 photos
    flat = (3 * by_hand["backpack"] + 4 * by_hand["backpack_dog"] + 5 * by_hand["dog"]) / 12
    pairs = replace(results, protocol={**results.protocol, "averaging": "pairs"})
    assert pairs.scores()["dino"].mean == pytest.approx(flat)


def test_the_interval_of_a_share_is_a_share(results):
    found = results.scores()["dino_retrieval"]
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_a_subject_under_another_name_in_the_gallery_is_itself(folders, scorers, tmp_path):
    """Else it would find the same photos there, a tie, which is no find."""
    images = shutil.copytree(folders[1], tmp_path / "images")
    shutil.copy(folders[0] / "dog" / "reference" / "0.png", images / "dog" / PROMPTS[0] / "0.png")
    task = task_of((folders[0], images, folders[2]))
    dog = replace(task.photos["dog"], name="rex")
    others = {name: own for name, own in task.photos.items() if name != "dog"}
    first, again, one = (
        score_images(replace(task, gallery=gallery), scorers, EVERY)
        for gallery in (None, {**others, "rex": dog}, {**others, "rex": replace(dog, photos=[])})
    )
    found = {row.key: row.scores.get("dino_retrieval") for row in first.images}
    assert 1.0 in [share for key, share in found.items() if key[0] == "dog"]
    for result, count in ((again, "7 photos"), (one, "2 photos")):
        assert {r.key: r.scores.get("dino_retrieval") for r in result.images} == found
        assert [text for text in result.warnings if text.startswith("Gallery")] == [
            f"Gallery: `rex` has {count} of `dog`, so it is taken for the same subject: `dog` is "
            "not looked for among its photos."
        ]
    assert not any(text.startswith("Gallery") for text in first.warnings)


def test_masks_paint_what_they_say():
    image, cover = picture(1), mask(0)
    inside = np.asarray(painted(image, cover, (1.0, 0.0, 0.0), subject=False))
    outside = np.asarray(painted(image, cover, (1.0, 0.0, 0.0), subject=True))
    on, pixels = np.asarray(cover) > 127, np.asarray(image)
    assert (inside[on] == pixels[on]).all() and (inside[~on] == (255, 0, 0)).all()
    assert (outside[~on] == pixels[~on]).all() and (outside[on] == (255, 0, 0)).all()


def test_order_and_batches_change_nothing(folders, scorers, results, tmp_path, monkeypatch):
    """Subjects and prompts under other folder names sort otherwise; batches are of three."""
    photos, images, base = folders
    shutil.copytree(images, tmp_path / "images")
    for i, prompt in enumerate(PROMPTS):
        for subject in SUBJECTS:
            folder = tmp_path / "images" / subject / f"{9 - i}"
            (tmp_path / "images" / subject / prompt).rename(folder)
            (folder / "prompt.txt").write_text(f" {prompt}\n")
    calls = []
    for name, extractor in scorers.extractors.items():
        original = extractor.images
        monkeypatch.setattr(
            extractor, "images", lambda i, f=original, n=name: calls.append((n, len(i))) or f(i)
        )
    monkeypatch.setattr(store_module, "AT_ONCE", 3)
    again = score_images(task_of((photos, tmp_path / "images", base)), scorers, EVERY)
    rows = {row.key: row.scores for row in results.images}
    assert rows.keys() == {row.key for row in again.images}
    for row in again.images:
        for key, value in row.scores.items():
            assert value == (
                None if rows[row.key][key] is None else pytest.approx(rows[row.key][key], abs=1e-6)
            )
    assert compare(results, again).verdict().startswith("A and B cannot be told apart")
    # each picture once: 12 photos, 6 held out, 15 images, 15 of the base; masks: 12 + 1, twice
    assert sum(n for name, n in calls if name == "dino") == 48 + 26
    assert again.inputs == results.inputs


@pytest.mark.parametrize(
    ("text_score", "identifier"),
    [("100 cosine", "removed"), ("2.5 max(cosine, 0)", "removed"), ("cosine", "kept")],
)
def test_text_rules(folders, scorers, results, text_score, identifier):
    rule = Protocol(
        "t", "", ("clip_t",), {"clip": Encoder("x")}, text_score=text_score, identifier=identifier
    )
    text = Scorers(
        {"clip": scorers.extractors["clip"]}, [m for m in scorers.metrics if m.key == "clip_t"]
    )
    found = {
        r.key: r.scores["clip_t"]
        for r in score_images(task_of(folders), text, rule).images
        if not r.unrelated
    }
    plain = {r.key: r.scores["clip_t"] for r in results.images if not r.unrelated}
    for key, value in plain.items():
        if text_score == "100 cosine":
            assert found[key] == pytest.approx(100 * value)
        elif text_score == "cosine":  # with "sks" another text
            assert found[key] != pytest.approx(value, abs=1e-6)
        else:
            assert found[key] == pytest.approx(2.5 * max(value, 0))


def test_the_held_out_photo_of_a_prompt(folders, scorer_names, tmp_path):
    photos = shutil.copytree(folders[0], tmp_path / "photos")
    (photos / "dog" / "reference" / "1.txt").write_text(f"{PROMPTS[1]}\n")
    scorers = Scorers.load({"dino": scorer_names["dino"]}, ["dino_own_photo"])
    rule = Protocol("t", "", ("dino_own_photo",), {"dino": Encoder("x")})
    found = score_images(task_of((photos, *folders[1:])), scorers, rule)
    dino = scorers.extractors["dino"]
    theirs = dino.images([Image.open(photos / "dog" / "reference" / "1.png")])[0]
    for row in found.images:
        value = row.scores.get("dino_own_photo")
        if (row.subject, row.prompt) == ("dog", PROMPTS[1]):
            own = dino.images([Image.open(folders[1] / row.file)])[0]
            assert value == pytest.approx(float(own @ theirs), abs=1e-5)
        else:
            assert value is None
    assert found.coverage["scored"] == {"dino_own_photo": [2, 12]}


def test_no_interval_goes_beyond_what_a_score_can_be(results):
    for key, e in results.scores().items():
        if e.low is None or key not in METRICS or (bounds := METRICS[key].bounds) is None:
            continue
        assert bounds[0] <= e.low <= e.mean <= e.high <= bounds[1], key
    assert METRICS["dino"].bounds == (-1, 1) and METRICS["dino_diversity"].bounds == (0, 2)


def test_a_mask_of_another_size_is_refused(folders, scorers, tmp_path):
    """One more row of pixels, where a picture was cropped, moves the subject as a stretch does."""
    images = shutil.copytree(folders[1], tmp_path / "images")
    cover = images / "dog" / PROMPTS[0] / "masks" / "0.png"
    save(mask(3).resize((40, 41)), cover)
    with pytest.raises(ValueError) as refused:
        score_images(task_of((folders[0], images, folders[2])), scorers, EVERY)
    assert str(refused.value) == (
        f"the mask `{cover}` is of 40 x 41 pixels, and its picture "
        f"`{cover.parents[1] / '0.png'}` of 40 x 40 (upright): make it from the picture as it is, "
        "resize it to 40 x 40 if it shows the same, or take it away."
    )


def test_two_images_of_one_seed_are_refused(folders, tmp_path):
    images = shutil.copytree(folders[1], tmp_path / "images")
    place = images / "dog" / PROMPTS[0]
    shutil.copy(place / "1.png", place / "01.png")
    with pytest.raises(ValueError, match="two images of seed 1 in .*which is meant"):
        read_images(images)


def broken(images, photos, case):
    place = images / "dog" / PROMPTS[0]
    if case == "empty subject":
        shutil.rmtree(images / "dog")
        (images / "dog").mkdir()
    elif case == "empty prompt":
        shutil.rmtree(place)
        place.mkdir()
    elif case == "no prompt":
        place.rename(place.with_name("00"))
    elif case == "numbered prompt":
        place.rename(place.with_name("prompt_00"))
    elif case == "short name":
        place.rename(place.with_name("p1"))
    elif case == "blank prompt":
        (place / "prompt.txt").write_text(" \n")
    elif case == "same prompt":
        (shutil.copytree(place, place.with_name("b")) / "prompt.txt").write_text(PROMPTS[0])
    elif case == "unreadable":
        (place / "0.png").write_bytes((place / "0.png").read_bytes()[:200])
    elif case == "two of one name":
        picture(3).save(place / "0.jpg")
    elif case == "two masks of one name":
        save(mask(0), place / "masks" / "0.jpg")
    elif case == "loose":
        shutil.copy(place / "0.png", images / "dog" / "7.png")
    elif case == "no photos":
        shutil.rmtree(photos / "dog")
    elif case == "empty photos":
        shutil.rmtree(photos / "dog" / "masks")
        for file in (photos / "dog").glob("*.png"):
            file.unlink()
    elif case == "mask alone":
        save(mask(0), place / "masks" / "9.png")
    elif case == "template":
        (place / "prompt.txt").write_text("a {} here")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("a_sks_dog_at_3_am", "a sks dog at 3 am"), ("a sks_1 dog", "a sks_1 dog"), ("dog", "dog")],
)
def test_a_folder_is_named_by_its_prompt(tmp_path, name, prompt):
    save(picture(1), tmp_path / "dog" / name / "0.png")
    assert [image.prompt for image in read_images(tmp_path).images] == [prompt]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("empty subject", "the subject folder `.*dog` holds no image"),
        ("empty prompt", "the prompt folder `.*beach` holds no image"),
        ("no prompt", "the prompt of `.*00` is missing: `00` is no prompt"),
        ("numbered prompt", "the prompt of `.*prompt_00` is missing: `prompt_00` is no prompt"),
        ("short name", "the prompt of `.*p1` is missing: `p1` is no prompt"),
        ("blank prompt", "the prompt of `.*` is missing: `.*prompt.txt` is empty"),
        ("same prompt", "are of one prompt, `a sks thing on the beach`"),
        ("unreadable", "cannot read the image `.*0.png`"),
        ("two of one name", "`0.jpg` and `0.png` in `.*` have one name"),
        ("two masks of one name", "`0.jpg` and `0.png` in `.*masks` have one name"),
        ("loose", "`.*7.png` .* lies in no prompt folder"),
        ("no photos", "no photos of `dog`; there are photos of backpack, backpack_dog"),
        ("empty photos", "the subject folder `.*dog` holds no photo"),
        ("mask alone", "has masks without a picture in `a sks thing on the beach`: 9"),
        ("template", "has {} in it"),
    ],
)
def test_bad_input_is_named(folders, scorers, tmp_path, case, message):
    images = shutil.copytree(folders[1], tmp_path / "images")
    photos = shutil.copytree(folders[0], tmp_path / "photos")
    broken(images, photos, case)
    with pytest.raises(ValueError, match=message):
        score_images(task_of((photos, images, folders[2])), scorers, EVERY)


def test_levels_have_an_interval_and_n(folders, scorers, results, tmp_path):
    """By the bootstrap over subjects, n the photos; one subject's have n alone."""
    values = list(results.levels["dino_photos"].values())
    level = results.level_scores()["dino_photos"]
    by_hand = estimate(values, SUBJECTS, SUBJECTS)
    assert (level.low, level.high) == (by_hand.low, min(by_hand.high, 1.0))
    assert level.mean == pytest.approx(sum(values) / 3) and level.low < level.mean < level.high
    assert (level.n, level.clusters, level.unit) == (3 + 4 + 5, 3, "subjects")
    write_results(results, tmp_path)
    stated = json.loads((tmp_path / "results.json").read_text())
    assert stated["level_scores"]["dino_photos"] == asdict(level)
    with (tmp_path / "per_subject.csv").open(newline="") as file:
        rows = {(r["subject"], r["score"]): r for r in csv.DictReader(file)}
    own = rows["backpack_dog", "dino_photos"]
    assert (own["n"], own["unit"], own["low"]) == ("4", "photos", "")
    task = task_of(folders)
    pictures = {i.key: i.picture for i in task.images.images}
    page = write_page(results, tmp_path, pictures, task.photos).read_text()
    line = page.split('<th scope="row">DINO</th>')[1].split("</tr>")[0]
    assert f"{level.mean:.3f} <small>{level.low:.3f} to {level.high:.3f}, n\u00a0=\u00a012" in line
    base = results.scores(results.base)["dino"]
    assert f"{base.mean:.3f} <small>{base.low:.3f} to {base.high:.3f}, n\u00a0=\u00a012" in line
    assert line.count("n\u00a0=\u00a012") == 3  # over the base too

    images = replace(task.images, images=[i for i in task.images.images if i.subject == "dog"])
    alone = score_images(replace(task, images=images), scorers, EVERY)
    level = alone.level_scores()["dino_photos"]
    assert (level.low, level.high, level.n, level.clusters) == (None, None, 5, 1)
    page = write_page(alone, tmp_path, pictures, task.photos).read_text()
    assert f"<td>{level.mean:.3f} <small>n\u00a0=\u00a05</small></td>" in page


def test_results_of_an_earlier_version_are_read(results, tmp_path):
    """Without the means of levels, and without what is counted."""
    write_results(results, tmp_path)
    whole = read_results(tmp_path)
    stated = json.loads((tmp_path / "results.json").read_text())
    for name in ("level_scores", "coverage"):
        del stated[name]
    (tmp_path / "results.json").write_text(json.dumps(stated))
    back = read_results(tmp_path)
    assert compare(whole, back).verdict().startswith("A and B cannot be told apart")
    assert back.level_scores()["dino_photos"].n == 3  # subjects: their photos were not counted


def test_the_page_is_whole_and_escapes_what_people_wrote(folders, scorers, tmp_path):
    images = shutil.copytree(folders[1], tmp_path / "images")
    evil = '<script>alert("x")</script> & "more"'
    (images / "dog" / PROMPTS[0] / "prompt.txt").write_text(evil)
    task = task_of((folders[0], images, folders[2]))
    found = score_images(task, scorers, EVERY)
    write_results(found, tmp_path)
    pictures = {i.key: i.picture for i in task.images.images}
    page = write_page(found, tmp_path, pictures, task.photos).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(&quot;x&quot;)" in page
    for outside in ("http://", "https://", 'src="/', str(tmp_path), str(folders[0])):
        assert outside not in page
    # three subjects: photos, held-out ones, and the first of three prompts of each
    assert page.count("<img") == 12 + 6 + 9 + 24 + page.count("Suspected copies</h2>") * min(
        12, sum(
            r.scores["dino_nearest"] > found.levels["dino_nearest_photos"][r.subject]
            for r in found.images if not r.unrelated
        ),
    )  # fmt: skip
    for part in ("CLIP-T, masked", "95%", "backpack_dog", 'class="ellipse first"', "Lowest DINO"):
        assert part in page
    back = read_results(tmp_path)
    assert [r.scores for r in back.images] == [dict(r.scores) for r in found.images]
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()
    stated = json.loads((tmp_path / "results.json").read_text())
    assert stated["protocol"]["scorers"]["dino"]["weights"] == scorers.protocol["dino"]["weights"]


def test_the_prompts_of_subjects_share_lines_where_their_words_are_known(results):
    images = [
        replace(row, prompt=row.prompt.replace("sks thing", f"sks {row.subject}"))
        for row in results.images
    ]
    named = replace(results, images=images)
    words = {s: Photos(s, [], words=read_words(f"a sks {s}", f"a {s}")) for s in SUBJECTS}
    drawn = heat(named, "dino", words)
    lines = [line.split("</th>")[0] for line in drawn.split('<th scope="row">')[1:]]
    assert lines == ["a {} in the snow", "a {} on the beach"] and "–" not in drawn
    assert heat(named, "dino", {}).count('<th scope="row">') == 2 * len(SUBJECTS)


def test_features_of_a_gallery_alone(scorers):
    """Retrieval against a naive loop: a tie is no find."""
    from dreamtune.metrics.features import retrieved

    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(9, 4), dim=1)
    images, own, others = rows[:4], rows[4:6], rows[6:]
    owners = torch.tensor([0, 1, 1])
    expected = []
    for x in images:
        theirs = [float(x @ others[0]), float(np.mean([float(x @ o) for o in others[1:]]))]
        expected.append(float(np.mean([float(x @ o) for o in own]) > max(theirs)))
    assert retrieved(images, own, others, owners).tolist() == expected
    assert retrieved(images, others[:1], others, owners).sum() < 4 and 0 < sum(expected) < 4
