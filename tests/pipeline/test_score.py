"""`dreamtune score` of a run, of files of other formats, of a pipeline and of folders; then
`dreamtune compare`."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from galleries import picture, save, write_images, write_photos
from PIL import Image
from tiny import tiny_unet

import dreamtune
from dreamtune.cli import main
from dreamtune.config import Config
from dreamtune.data.words import SubjectWords
from dreamtune.evaluation.results import read_results
from dreamtune.pipeline.sampled import Sampler
from dreamtune.pipeline.score import given, subject_of
from dreamtune.training.defaults import resolve, sampling_of

RULE = """
like: dreamtune
prompts: ["a {} on a red chair", "a {} in the snow", "a {}"]
images_per_prompt: 2
unrelated: [a red cat, a blue chair]
sampling: {steps: 2, guidance_scale: 2.0}
"""


@pytest.fixture
def rule(tmp_path: Path) -> Path:
    (tmp_path / "quick.yaml").write_text(RULE)
    return tmp_path / "quick.yaml"


def scored(
    scorers: dict[str, str], source: Path, rule: Path, out: Path, *flags: str
) -> dict[str, Any]:
    weights = [part for name, place in scorers.items() for part in (f"--{name}", place)]
    given = ["score", str(source), "--protocol", str(rule), "--output_dir", str(out)]
    assert main([*given, *weights, *flags]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_a_run_its_export_and_a_folder_of_pefts(
    settings: dict[str, Any], scorer_names: dict[str, str], rule: Path, tmp_path: Path, capsys: Any
) -> None:
    run = dreamtune.train(Config(**settings | {"learning_rate": 0.3, "method": "lora"})).run_dir
    photos = Path(settings["instance_data_dir"])
    first = scored(scorer_names, run, rule, tmp_path / "a")
    assert first["source"]["kind"] == "a run" and first["source"]["method"] == "lora"
    assert (len(first["images"]), len(first["base_images"])) == (6 + 4, 6)
    assert first["scores"]["dino"]["n"] == 6 and first["scores"]["dino_drift"]["n"] == 4
    assert first["protocol"]["sampling"]["seeds"] == [0, 1]
    assert (tmp_path / "a" / "images" / photos.name / "00" / "prompt.txt").read_text() == (
        "a sks dog on a red chair\n"
    )
    prompts = {row["prompt"] for row in first["images"] if not row["unrelated"]}
    assert prompts == {"a sks dog on a red chair", "a sks dog in the snow", "a sks dog"}
    with (tmp_path / "a" / "per_image.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 10
    page = (tmp_path / "a" / "report.html").read_text()
    assert "over its prompts, and say nothing of other subjects" in page

    outside = ["--photos", str(photos), "--instance_prompt", "a sks dog"]
    outside += ["--pretrained_model_name_or_path", settings["pretrained_model_name_or_path"]]
    # as kohya's scripts leave it: under any name, with the words in its photos' folder
    lora = dreamtune.export(run, tmp_path / "exported", "kohya", base=settings[
        "pretrained_model_name_or_path"])  # fmt: skip
    lora.rename(lora.with_name("last.safetensors"))
    second = scored(scorer_names, lora.parent, rule, tmp_path / "b", *outside)
    assert second["source"]["kind"] == "an adapter"
    for key, value in first["scores"].items():
        assert second["scores"][key]["mean"] == pytest.approx(value["mean"], abs=2e-2), key
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "6 pairs of images from 3 prompts of one subject" in capsys.readouterr().out

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.get_peft_model(tiny_unet(), config).save_pretrained(tmp_path / "peft")
    third = scored(scorer_names, tmp_path / "peft", rule, tmp_path / "c", *outside)
    assert third["scores"]["dino"]["n"] == 6
    assert third["inputs"]["photos"] == first["inputs"]["photos"]


def test_a_pipeline_folder(
    settings: dict[str, Any], scorer_names: dict[str, str], rule: Path, tmp_path: Path
) -> None:
    base = Path(settings["pretrained_model_name_or_path"])
    photos = shutil.copytree(settings["instance_data_dir"], tmp_path / "photos")
    shutil.copytree(settings["instance_data_dir"], photos / "reference" / "reference")
    flags = ["--photos", str(photos), "--instance_prompt", "a sks dog"]
    found = scored(scorer_names, base, rule, tmp_path / "a", *flags)
    assert found["source"]["kind"] == "a pipeline" and found["base_images"] == []
    assert not (tmp_path / "a" / "base").exists()
    assert "DINO, drift is not known" in "\n".join(found["warnings"])
    inner = [f"photos/reference/reference/{i}.png" for i in range(3)]
    assert found["coverage"]["skipped_pictures"] == inner


def test_the_captions_of_held_out_photos_are_prompts(
    settings: dict[str, Any], scorer_names: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    """PEFT's protocol, with a small encoder: each image has its own photo; of a run, by a pipeline
    alone, and where no photo has a caption."""
    rule = tmp_path / "small.yaml"
    rule.write_text(
        "like: peft_image\nmetrics: [dino_own_photo]\nencoders: {dino: {weights: x}}\n"
        "images_per_prompt: 2\nunrelated: []\nsampling: {steps: 2}\n"
    )
    photos = write_photos(tmp_path / "photos", ["dog"]) / "dog"
    captions = ["a sks dog on a  red chair", "a sks dog in the snow"]
    dino = {"dino": scorer_names["dino"]}
    settings |= {"instance_data_dir": str(photos), "max_train_steps": 1, "validation_steps": 0}
    run = dreamtune.train(Config(**settings)).run_dir
    assert main(["score", str(run), "--protocol", str(rule), "--dino", dino["dino"],
                 "--output_dir", str(tmp_path / "no")]) == 1  # fmt: skip
    assert "none of the 2 held-out photos has one. Write each" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    for number, caption in enumerate(captions):
        (photos / "reference" / f"{number}.txt").write_text(f"{caption}\n")
    base = Path(settings["pretrained_model_name_or_path"])
    flags = ["--photos", str(photos), "--instance_prompt", "a sks dog"]
    for name, source, more in (("a", run, []), ("b", base, flags)):
        found = scored(dino, source, rule, tmp_path / name, *more)
        assert found["scores"]["dino_own_photo"]["n"] == 2 * len(captions)
        assert found["protocol"]["prompts"] == "captions"
        wanted = [" ".join(caption.split()) for caption in captions]
        assert found["protocol"]["sampling"]["prompts"] == wanted
        assert {row["prompt"] for row in found["images"]} == {*wanted}


def test_folders_of_two_methods(
    scorer_names: dict[str, str], rule: Path, tmp_path: Path, capsys: Any
) -> None:
    photos = write_photos(tmp_path / "photos")
    a, b = write_images(tmp_path / "a"), write_images(tmp_path / "b", shift=7)
    flags = ["--photos", str(photos), "--base_images", str(a)]
    gallery = write_photos(tmp_path / "gallery")
    save(picture(1), gallery / "loose.png")
    found = scored(scorer_names, b, rule, tmp_path / "scores", *flags, "--gallery", str(gallery))
    assert found["coverage"]["skipped_pictures"] == ["loose.png"]
    assert found["coverage"]["subjects"] == 3 and found["scores"]["dino"]["unit"] == "subjects"
    # its own base: no drift
    same = scored(scorer_names, a, rule, tmp_path / "same", *flags)
    assert same["scores"]["dino_drift"]["mean"] == pytest.approx(0, abs=1e-5)
    assert main(["compare", str(tmp_path / "same"), str(tmp_path / "scores")]) == 0
    said = capsys.readouterr().out
    assert "12 pairs of images from 3 subjects" in said
    read = read_results(tmp_path / "scores")
    assert read.keys[:3] == ["dino", "clip_i", "clip_t"]
    # nothing is overwritten
    assert main(["score", str(a), *flags, "--output_dir", str(tmp_path / "scores")]) == 1
    assert "is not empty: name another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "no adapter at `nowhere`"),
        (["IMAGES"], "a folder of images needs --photos"),
        (["ADAPTERS"], "`ADAPTERS` holds several adapters: give one of"),
        (["IMAGES", "--photos", "PHOTOS", "--instance_prompt", "a dog"], "`instance_prompt` has"),
        (["IMAGES", "--photos", "PHOTOS", "--protocol", "papr"], "Did you mean `paper`"),
        (["IMAGES", "--photos", "PHOTOS", "--dino", "embedded", "--clip", "embedded", "--protocol",
          "paper"], "protocol `paper` scores with `facebook/dino-vits16`"),
        (["IMAGES", "--photos", "PHOTOS", "--dinov2", "x"], "--dinov2 is of no metric of protocol"),
        (["IMAGES", "--photos", "PHOTOS", "--protocol", "peft_image", "--dinov2", "a/b"],
         "DINOv2 loads from a folder on this machine"),
        (["IMAGES", "--photos", "PHOTOS", "--clip", "embedded"],
         "Nothing is downloaded that was not named: give --dino."),
        (["file.safetensors"], "an adapter outside a run needs --photos"),
        (["file.safetensors", "--photos", "PHOTOS"], "is of one subject, and `PHOTOS` holds 3"),
        (["IMAGES", "--photo", "PHOTOS"], "Did you mean `photos`"),
    ],
)  # fmt: skip
def test_refusals(
    flags: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("PHOTOS"))
    write_images(Path("IMAGES"))
    Path("file.safetensors").write_bytes(b"0")
    Path("ADAPTERS").mkdir()
    for name in ("a", "b"):
        Path(f"ADAPTERS/{name}_kohya.safetensors").write_bytes(b"0")
    assert main(["score", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dreamtune score: ") and message in error
    assert not Path("scores").exists()


def test_an_identifier_is_looked_for_in_prompt_txt(tmp_path: Path) -> None:
    photos, images = write_photos(tmp_path / "photos"), write_images(tmp_path / "images")
    words = {"backpack": "a sks backpack", "backpack_dog": "a zwx toy", "dog": "a zwx dog\na dog"}
    for subject, text in words.items():
        (photos / subject / "prompt.txt").write_text(text)
    with pytest.raises(ValueError, match="the identifier `sks` is not in the prompt `a zwx toy`"):
        given(images, "x", photos, None, None)
    found = given(images, "x", photos, None, "zwx").photos
    assert {n: (p.words.identifier, p.words.class_noun) for n, p in found.items() if p.words} == {
        "backpack": ("sks", "backpack"), "backpack_dog": ("zwx", "toy"), "dog": ("zwx", "dog"),
    }  # fmt: skip
    (photos / "backpack_dog" / "prompt.txt").write_text("a sks toy")
    with pytest.raises(
        ValueError, match="--identifier `ohwx` is not in the `prompt.txt` of any su"
    ):
        given(images, "x", photos, None, "ohwx")
    for subject in words:
        (photos / subject / "prompt.txt").unlink()
    assert given(images, "x", photos, None, "sks").identifier == "sks"
    with pytest.raises(ValueError, match="`ohwx` is not in any prompt, so it would change nothing"):
        given(images, "x", photos, None, "ohwx")
    # of an adapter
    own = photos / "dog"
    (own / "prompt.txt").write_text("a zwx dog")
    assert subject_of(None, own, None, "zwx")[1].identifier == "zwx"
    assert subject_of(None, own, "a zwx pup", "zwx")[1].class_noun == "pup"
    (own / "prompt.txt").write_text("a sks dog")
    with pytest.raises(
        ValueError, match="`zwx` is not in the `prompt.txt` of `dog`, which says `s"
    ):
        subject_of(None, own, None, "zwx")


def test_an_unreadable_picture_is_named_before_anything_is_written(
    scorer_names: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    photos, images = write_photos(tmp_path / "photos"), write_images(tmp_path / "images")
    bad = images / "dog" / "a sks thing in the snow" / "1.png"
    bad.write_bytes(b"not a picture")
    flags = ["--photos", str(photos), "--output_dir", str(tmp_path / "out")]
    weights = [part for name, place in scorer_names.items() for part in (f"--{name}", place)]
    assert main(["score", str(images), *flags, *weights]) == 1
    assert str(bad) in capsys.readouterr().err and not (tmp_path / "out").exists()
    Image.new("RGB", (8, 8), "blue").save(bad)
    assert main(["score", str(images), *flags, *weights]) == 0
    assert "1 images are of one colour" in capsys.readouterr().out


def test_help_states_the_layout_and_every_protocol(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    said = capsys.readouterr().out
    for part in ("IMAGES/<subject>/<prompt>/<seed>.png", "customconcept101", "peft_image"):
        assert part in said


@pytest.mark.parametrize("kind", ["embedded", "tiny"])
def test_a_base_alone_is_sampled_as_the_runs_of_the_same_flags(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A benchmark sets the one beside the other."""
    name = "embedded" if kind == "embedded" else settings["pretrained_model_name_or_path"]
    config = Config(
        pretrained_model_name_or_path=name, instance_data_dir="photos", sample_batch_size=3
    )
    told = {k: v for k, v in config.to_dict().items() if v is not None}
    sampler = Sampler.of(None, name, {}, told)
    words = SubjectWords("sks dog", "sks", "dog")
    run = resolve(config, sampler.base, words, tmp_path)
    assert sampling_of(run) == sampler.sampling
    assert sampler.sampling.steps == (12 if kind == "embedded" else 25)


def test_a_stray_photo_beside_the_folders_of_subjects_is_named(
    scorer_names: dict[str, str], rule: Path, tmp_path: Path
) -> None:
    photos, images = write_photos(tmp_path / "photos"), write_images(tmp_path / "images")
    save(picture(1), photos / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png` \(1 in all\) lies beside .* such as `back"):
        dreamtune.score(images, photos=photos, protocol=rule, weights=scorer_names,
                        output_dir=tmp_path / "out")  # fmt: skip
