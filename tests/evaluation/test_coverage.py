"""What was there, lacked or was odd: counted, said in sentences, and left in the means."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from galleries import (
    EVERY,
    PROMPTS,
    mask,
    picture,
    save,
    task_of,
    write_images,
    write_photos,
)
from PIL import Image

from dreamtune.data.words import without_identifier
from dreamtune.evaluation.layout import read_photos
from dreamtune.evaluation.scoring import score_images
from dreamtune.metrics import Scorers
from dreamtune.metrics.preprocess import painted


def test_prompts_need_masks_of_the_images_alone(folders, scorers, results, tmp_path):
    """Against a picture painted by hand; likeness needs the photos' masks too, and says so."""
    photos = write_photos(tmp_path / "photos")
    found = score_images(task_of((photos, *folders[1:])), scorers, EVERY)
    assert found.coverage["masks"] == {"images": 1, "photos": 0}
    assert found.coverage["scored"]["masked_clip_t"] == [1, 12]
    assert found.coverage["scored"]["masked_dino"] == [0, 12]
    clip, place = scorers.extractors["clip"], folders[1] / "dog" / PROMPTS[0]
    image, cover = (Image.open(place / name) for name in ("0.png", "masks/0.png"))
    x = clip.images([painted(image, cover, clip.mean_colour, subject=True)])[0]
    text = clip.texts([without_identifier(PROMPTS[0], "sks")])[0]
    (row,) = (r for r in found.images if r.scores.get("masked_clip_t") is not None)
    assert row.file == f"dog/{PROMPTS[0]}/0.png"
    assert row.scores["masked_clip_t"] == pytest.approx(float(x @ text), abs=1e-5)
    assert "DINO, masked is not known: the photos have no masks." in found.warnings
    assert "CLIP-T, masked: 1 of 12 images have it." in found.warnings


@pytest.mark.parametrize(
    ("of_photos", "image", "dino", "clip"),
    [
        (True, None, "the images have no masks", "the images have no masks"),
        (False, None, "the images and the photos have no masks", "the images have no masks"),
        (True, "dog", "no subject has masks of both its images and its photos", None),
    ],
)
def test_masks_that_are_not_there_are_said(tmp_path, scorers, of_photos, image, dino, clip):
    photos, images = write_photos(tmp_path / "photos"), write_images(tmp_path / "images")
    if of_photos:
        save(mask(0), photos / "backpack" / "masks" / "0.png")
    if image:
        save(mask(0), images / image / PROMPTS[0] / "masks" / "0.png")
    said = score_images(task_of((photos, images, images)), scorers, EVERY).warnings
    assert f"DINO, masked is not known: {dino}." in said
    assert (f"CLIP-T, masked is not known: {clip}." in said) == (clip is not None)


def test_what_is_odd_is_counted_and_said(folders, scorers, tmp_path):
    images = shutil.copytree(folders[1], tmp_path / "images")
    shutil.rmtree(images / "backpack")
    place = images / "dog" / PROMPTS[0]
    Image.new("RGB", (40, 40)).save(place / "2.png")
    Image.new("RGB", (40, 40), "red").save(place / "3.png")
    shutil.copy(place / "0.png", place / "4.png")
    shutil.copy(folders[0] / "dog" / "0.png", place / "x.png")
    (images / "notes.txt").write_text("notes")
    shutil.copytree(place / "masks", place / "more")
    shutil.rmtree(images / "backpack_dog" / PROMPTS[1])
    found = score_images(task_of((folders[0], images, folders[2])), scorers, EVERY)
    assert found.coverage["black"] == [f"dog/{PROMPTS[0]}/2.png"]
    assert found.coverage["one_colour"] == [f"dog/{PROMPTS[0]}/3.png"]
    assert len(found.coverage["repeated"]) == 2 and len(found.coverage["copies_of_photos"]) == 1
    assert found.coverage["missing_subjects"] == ["backpack"]
    assert found.scores()["dino"].n == 10  # none is dropped
    text = "\n".join(found.warnings)
    for part in (
        "1 images are black; they count", "1 images are of one colour", "2 images are byte for",
        "1 images are byte for byte a training photo", "1 subjects have photos and no images",
        "1 files or folders are no pictures, and were skipped: notes.txt.",
        f"1 pictures lie where none belongs, and were skipped: dog/{PROMPTS[0]}/more/0.png.",
        "1 subjects lack prompts that others have: backpack_dog (`a {} in the snow`).",
        "2 of 25 prompts of the protocol are there; no subject has a {} in the jungle, ",
        "Prompts have 2 to 6 images",
        "2 prompts have fewer images than the protocol makes", "DINO, masked: 1 of 10 images",
    ):  # fmt: skip
        assert part in text, part


def test_a_black_picture_is_counted_where_it_is(folders, scorers, tmp_path):
    """Copies too, as a safety checker leaves them; not one of the base of the same name."""
    images, base = (shutil.copytree(folders[1], tmp_path / name) for name in ("images", "base"))
    place = images / "dog" / PROMPTS[0]
    for name in ("7.png", "8.png"):
        Image.new("RGB", (40, 40)).save(place / name)
    Image.new("RGB", (40, 40)).save(base / "dog" / PROMPTS[0] / "0.png")
    found = score_images(task_of((folders[0], images, base)), scorers, EVERY)
    assert found.coverage["black"] == [f"dog/{PROMPTS[0]}/{n}.png" for n in (7, 8)]


def test_photos_and_base_images_that_show_nothing_are_said_apart(folders, scorers, tmp_path):
    photos, images, base = (
        shutil.copytree(folder, tmp_path / name)
        for folder, name in zip(folders, ("photos", "images", "base"))
    )
    black, red = Image.new("RGB", (40, 40)), Image.new("RGB", (40, 40), "red")
    black.save(photos / "dog" / "1.png")
    red.save(photos / "backpack" / "2.png")
    red.save(photos / "dog" / "reference" / "0.png")
    black.save(photos / "backpack" / "reference" / "1.png")
    black.save(base / "dog" / PROMPTS[0] / "0.png")
    gallery = write_photos(tmp_path / "gallery", ("cat",))
    red.save(gallery / "cat" / "reference" / "1.png")
    task = task_of((photos, images, base), gallery=read_photos(gallery)[0])
    found = score_images(task, scorers, EVERY)
    names = {
        "black": [], "one_colour": [],
        "black_photos": ["dog/1.png"], "one_colour_photos": ["backpack/2.png"],
        "black_held_out": ["backpack/reference/1.png"],
        "one_colour_held_out": ["dog/reference/0.png"],
        "black_base": [f"dog/{PROMPTS[0]}/0.png"], "one_colour_base": [],
        "black_gallery": [], "one_colour_gallery": ["cat/reference/1.png"],
    }  # fmt: skip
    assert {key: found.coverage[key] for key in names} == names
    text = "\n".join(found.warnings)
    for part in (
        "1 photos are black; their subject is compared with them all the same: "
        "dog/1.png.", "1 photos are of one colour; their subject",
        "1 held-out photos are black; their subject is compared with them all the same: backpack/",
        "1 held-out photos are of one colour",
        f"1 images of the base are black; they count in its means: dog/{PROMPTS[0]}/0.png.",
    ):  # fmt: skip
        assert part in text, part
    assert "1 images are black" not in text


def test_what_the_base_lacks_is_counted_and_said(folders, scorers, results, tmp_path):
    whole = {"missing_subjects": [], "missing_images": [], "others": []}
    whole |= {"skipped_pictures": [], "skipped_files": []}
    assert results.coverage["base"] == {"subjects": [3, 3], "images": [15, 15], **whole}
    assert "base" not in "".join(results.warnings)
    base = shutil.copytree(folders[2], tmp_path / "base")
    shutil.rmtree(base / "backpack")
    (base / "dog" / PROMPTS[0] / "1.png").rename(base / "dog" / PROMPTS[0] / "9.png")
    shutil.rmtree(base / "dog" / "unrelated")
    (base / "notes.txt").write_text("notes")
    picture(1).save(base / "loose.png")
    found = score_images(task_of((*folders[:2], base)), scorers, EVERY)
    lacking = [f"dog/{PROMPTS[0]}/1.png", "dog/unrelated/a pizza/0.png"]
    assert found.coverage["base"] == {
        "subjects": [2, 3], "images": [8, 15], "missing_subjects": ["backpack"],
        "missing_images": lacking, "others": [f"dog/{PROMPTS[0]}/9.png"],
        "skipped_pictures": ["loose.png"], "skipped_files": ["notes.txt"],
    }  # fmt: skip
    for text in (
        "1 subjects have no images of the base: backpack.",
        "2 images have none of the base of their prompt and seed to be compared with: "
        + ", ".join(lacking) + ".",
        "1 images of the base are of a subject, prompt or seed without images: dog/"
        + f"{PROMPTS[0]}/9.png.",
        "1 pictures of the base lie where none belongs, and were skipped: loose.png.",
        "1 files or folders of the base are no pictures, and were skipped: notes.txt.",
    ):  # fmt: skip
        assert text in found.warnings, text
    usual = replace(EVERY, metrics=("dino", "clip_t"))  # no score of it is of unrelated prompts
    three = Scorers(scorers.extractors, [m for m in scorers.metrics if m.key in usual.metrics])
    found = score_images(task_of((*folders[:2], base)), three, usual)
    assert found.coverage["base"]["images"] == [7, 12]
    assert found.coverage["base"]["missing_images"] == lacking[:1]
    none = score_images(task_of(folders, base=None), three, usual)
    assert none.coverage["base"] is None and "base" not in "".join(none.warnings)


def test_no_picture_is_left_out_in_silence(folders, scorers, tmp_path):
    photos, images = (
        shutil.copytree(folder, tmp_path / name)
        for folder, name in zip(folders, ("photos", "images"))
    )
    place = f"dog/{PROMPTS[0]}"
    of_images = [
        "loose.png", ".thumbs/1.png", "dog/.0.png", f"{place}/.1.png", f"{place}/reference/1.png",
        f"{place}/reference/deep/2.PNG", f"{place}/masks/more/0.png", f"{place}/masks/.0.png",
    ]  # fmt: skip
    of_photos = [
        "dog/reference/reference/0.png", "dog/masks/more/1.png", "dog/.3.png", "photo.jpg",
        "dog/reference/masks/x/1.png",
    ]  # fmt: skip
    for root, names in ((images, of_images), (photos, of_photos)):
        for name in names:
            save(picture(1), root / name)
    # none of a picture
    for name in (".DS_Store", "dog/._0.png", f"{place}/.notes.txt", f"{place}/masks/notes.txt"):
        (images / name).write_text("x")
    (images / place / "empty").mkdir()
    task = task_of((photos, images, folders[2]), skipped=read_photos(photos)[1])
    found = score_images(task, scorers, EVERY)
    assert found.coverage["skipped_pictures"] == sorted([*of_images, *of_photos])
    assert found.coverage["skipped_files"] == [f"{place}/empty/", f"{place}/masks/notes.txt"]
    text = "\n".join(found.warnings)
    assert "13 pictures lie where none belongs, and were skipped: .thumbs/1.png, " in text
    assert "2 files or folders are no pictures, and were skipped: " in text
    assert found.coverage["images"] == 12 and found.coverage["photos"]["dog"] == [5, 2]


def test_masks_that_show_nothing_are_counted_also_from_the_cache(folders, scorers, tmp_path):
    photos, images = (
        shutil.copytree(folder, tmp_path / name)
        for folder, name in zip(folders, ("photos", "images"))
    )
    Image.new("L", (40, 40), 100).save(photos / "dog" / "masks" / "1.png")  # below the middle
    Image.new("L", (40, 40), 255).save(images / "dog" / PROMPTS[0] / "masks" / "0.png")
    for _ in range(2):
        found = score_images(task_of((photos, images, folders[2])), scorers, EVERY)
        assert found.coverage["black_masks"] == ["dog/masks/1.png"]
        assert found.coverage["one_colour_masks"] == [f"dog/{PROMPTS[0]}/masks/0.png"]
        assert (
            "1 masks are black; masked scores count their pictures all the same: dog/masks/1.png."
            in found.warnings
        )


def test_prompts_that_name_their_subject_by_nothing_are_said(folders, scorers, tmp_path):
    photos = shutil.copytree(folders[0], tmp_path / "photos")
    for subject, text in (("dog", "a sks dog"), ("backpack", "a sks thing")):
        (photos / subject / "prompt.txt").write_text(text)
    found = score_images(task_of((photos, *folders[1:])), scorers, EVERY)
    assert found.coverage["unnamed_subjects"] == ["dog (`sks dog`)"]
    said = "1 subjects are named by none of their prompts: dog (`sks dog`)."
    assert said in found.warnings
