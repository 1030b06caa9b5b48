"""What ships with the package: whole, small, and loadable by the libraries alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import without_dreamtune
from PIL import Image

from dreamtune import embedded

FILES = [f for f in embedded.ROOT.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
ALONE = """
import sys, torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {
    torch.float32}
pipe.set_progress_bar_config(disable=True)
pictures = pipe(
    ["a cartoon dog on a red background", "a cartoon dog on a blue background"],
    num_inference_steps=8, guidance_scale=4.0, guidance_rescale=0.3, output_type="pt",
    generator=[torch.Generator().manual_seed(0) for _ in range(2)]).images
assert pictures.shape == (2, 3, 128, 128)
red, blue = pictures[:, :, :12, :12].mean((2, 3))
assert red[0] > red[2] + 0.3 and blue[2] > blue[0] + 0.3, (red, blue)
assert "dreamtune" not in sys.modules
"""


def test_no_file_is_large() -> None:
    assert max(f.stat().st_size for f in FILES) < 16 * 2**20
    assert sum(f.stat().st_size for f in FILES) < 34e6


def test_every_subject_is_complete() -> None:
    subjects = embedded.subjects()
    assert len({subject.id for subject in subjects}) == len(subjects)
    for subject in subjects:
        assert (len(subject.photos), len(subject.captions), len(subject.references)) == (5, 5, 3)
        assert all(subject.name in caption for caption in subject.captions)
        pictures = [Image.open(path) for path in (*subject.photos, *subject.references)]
        assert {picture.size for picture in pictures} == {(128, 128)}
        assert len({picture.tobytes() for picture in pictures}) == 8
    folders = {path.name for path in embedded.SUBJECTS.iterdir()}
    assert folders == {subject.id for subject in subjects}
    assert len(embedded.subjects("dev")) >= 5 and len(embedded.subjects("report")) >= 30
    assert {subject.split for subject in subjects} == {"dev", "report"}


def test_the_default_subject_is_the_first_for_development() -> None:
    assert embedded.subject() == embedded.subjects("dev")[0]


def test_prompts_take_a_subject() -> None:
    prompts = embedded.prompts()
    assert len(prompts) == len(set(prompts)) == 25
    assert all(prompt.count("{}") == 1 for prompt in prompts)


def test_an_unknown_subject_names_near_ones() -> None:
    known = embedded.subject().id
    with pytest.raises(ValueError, match=known):
        embedded.subject(known + "x")


def test_diffusers_alone_draws_what_is_asked_for(tmp_path: Path) -> None:
    """In a process without dreamtune, without network, with no option but the folder."""
    without_dreamtune(ALONE, [embedded.MODEL], tmp_path / "log.txt")


def test_the_quickstart_finds_its_base() -> None:
    from dreamtune.models.load import load_base

    base = load_base("embedded")
    assert (base.embedded, base.resolution, base.zero_snr) == (True, 128, True)
    assert base.prediction_type == "v_prediction"


def test_the_scorers_tell_subjects_and_captions_apart() -> None:
    from dreamtune.metrics import Scorers, without_identifier

    scorers = Scorers.load({"dino": str(embedded.DINO), "clip": f"local-dir:{embedded.CLIP}"})
    subjects = embedded.subjects("dev")
    held = [
        scorers.references([Image.open(p).convert("RGB") for p in s.references]) for s in subjects
    ]
    for i, subject in enumerate(subjects):
        photos = [Image.open(p).convert("RGB") for p in subject.photos]
        words = [without_identifier(c, subject.identifier) for c in subject.captions]
        own, other = (scorers.score(photos, words, held[k]).means for k in (i, i - 1))
        assert own["dino"] > other["dino"] + 0.2, subject.id
        assert own["clip_i"] > other["clip_i"] + 0.1, subject.id
        assert own["clip_t"] > own["clip_t_shuffled"], subject.id


def test_the_tokenizers_agree_and_stay_as_they_were_trained_with() -> None:
    """An id that moved would make the text encoder read another word."""
    import open_clip
    from transformers import AutoTokenizer, CLIPTokenizer

    folder = embedded.MODEL / "tokenizer"
    clip = open_clip.get_tokenizer(f"local-dir:{embedded.CLIP}")
    texts = [c for s in embedded.subjects() for c in s.captions]
    texts += [p.format(s.name) for p in embedded.prompts() for s in embedded.subjects("dev")]
    both = [
        make.from_pretrained(folder)(texts, padding="max_length", truncation=True).input_ids
        for make in (AutoTokenizer, CLIPTokenizer)
    ]
    assert both[0] == both[1] == clip(texts).tolist()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    known = [2046, 320, 544, 1223, 559, 587, 1174, 2047]
    assert tokenizer("a sks fox on the grass").input_ids == known
    assert tokenizer.model_max_length == 32
    assert torch.equal(clip(["A sks Fox"]), clip(["a sks fox"]))
