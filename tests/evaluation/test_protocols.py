"""Protocols: the presets say what the papers' codes do, and a file cannot be misread."""

from __future__ import annotations

import json

import pytest

from dreamtune.evaluation import prompts
from dreamtune.evaluation.protocol_file import checked, find_protocol
from dreamtune.evaluation.protocols import PROTOCOLS, check_encoders


@pytest.mark.parametrize("name", PROTOCOLS)
def test_presets_are_whole(name):
    protocol = find_protocol(name)
    assert checked(protocol, name) == protocol  # each encoder is used, each metric is there
    assert protocol.name == name
    json.dumps(protocol.statement())


def test_what_tells_the_presets_apart():
    told = {n: (p.averaging, p.text_score, p.encoders["clip"].weights) for n, p in PROTOCOLS.items()
            if "clip" in p.encoders}  # fmt: skip
    b32 = "ViT-B-32:openai"
    assert told == {
        "dreamtune": ("subjects", "cosine", b32),
        "paper": ("pairs", "cosine", b32),
        "oft": ("pairs", "cosine", "ViT-L-14:openai"),
        "customconcept101": ("subjects", "2.5 max(cosine, 0)", b32),
        "dreambench_plus": ("images", "100 cosine", b32),
    }
    assert PROTOCOLS["oft"].encoders["dino"].resizing == ("squash", 224, 224)
    assert PROTOCOLS["customconcept101"].encoders["clip"].resizing == ("shortest", 256, 224)
    assert PROTOCOLS["dreambench_plus"].encoders["dino"].architecture["patch"] == 8


def test_the_dreambooth_prompts_are_35():
    assert len(prompts.LIVE) == len(prompts.OBJECT) == 25
    assert len({*prompts.LIVE}) == 25 and len({*prompts.LIVE, *prompts.OBJECT}) == 35
    assert all(p.count("{}") == 1 for p in (*prompts.LIVE, *prompts.OBJECT))


def test_prompts_that_are_captions():
    """A property of the protocol, which a file may take too; each once, as it stands."""
    assert PROTOCOLS["peft_image"].statement()["prompts"] == "captions"
    found = prompts.templates("captions", "dog", False, ["an sks dog", None, "b", "an sks dog"])
    assert found == ["an sks dog", "b"]
    with pytest.raises(ValueError, match="none of the 2 held-out photos has one. Write each into"):
        prompts.templates("captions", "dog", False, [None, None])
    with pytest.raises(ValueError, match="the caption `a {}` has {} in it"):
        prompts.templates("captions", "dog", False, ["a {}"])


def test_a_file_starts_from_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "like: paper\nmetrics: [dino, dinov2]\naveraging: subjects\nencoders:\n"
        "  dino: {weights: embedded}\n  dinov2: {weights: here, resizing: {mode: squash, "
        "resize: 8, crop: 8}}\nprompts: ['a {}']\n"
    )
    found = find_protocol(file)
    assert (found.name, found.averaging, found.prompts) == ("mine", "subjects", ("a {}",))
    assert list(found.encoders) == ["dino", "dinov2"]  # no metric asks for CLIP
    assert found.encoders["dino"].architecture == {}  # S/16 is of other weights
    assert found.encoders["dinov2"].resizing == ("squash", 8, 8)
    same = tmp_path / "mine.json"
    same.write_text(json.dumps({"like": "paper", "text_score": "100 cosine"}))
    assert find_protocol(same).text_score == "100 cosine"
    file.write_text("sampling: {steps: 3}")
    assert find_protocol(file).sampling == {"steps": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("averagin: pairs", "`averagin` is not known. Did you mean `averaging`"),
        ("encoders: {dino: {wieghts: x}}", "`wieghts` is not known. Did you mean `weights`"),
        ("encoders: {dino: {resizing: {mode: squash}}}", "`resize` is missing"),
        ("averaging: median", "`averaging` must be one of pairs, images or subjects"),
        ("metrics: [dnio]", "unknown metric `dnio`"),
        ("metrics: [dinov2]", "need the encoder `dinov2`"),
        ("like: papre", "`like` must be one of dreamtune, paper, oft"),
        ("name: paper", "a changed protocol needs its own"),
        ("prompts: everything", "`prompts` must be one of ours, dreambooth"),
        ("images_per_prompt: 0", "`images_per_prompt` must be at least 1, got 0"),
        ("sampling: {step: 3}", "`sampling`: `step` is not known"),
        ("- dino", "must hold names with values"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        find_protocol(file)
    assert "own.yaml" in str(caught.value)


def test_a_misspelt_preset_names_the_right_one():
    with pytest.raises(ValueError, match="unknown protocol `papr`. Did you mean `paper`"):
        find_protocol("papr")


def test_other_encoders_than_the_protocols_are_refused():
    clip = {"model": "x", "architecture": {"width": 768, "layers": 12, "patch": 32}}
    dino = {"model": "mine", "architecture": {"model_type": "vit", "width": 384, "layers": 12}}
    loaded = {"clip": clip, "dino": {**dino, "architecture": dino["architecture"] | {"patch": 16}}}
    check_encoders(PROTOCOLS["paper"], loaded)
    with pytest.raises(ValueError, match=r"`facebook/dino-vits8` \(patch 8\); the dino `mine` has"):
        check_encoders(PROTOCOLS["dreambench_plus"], loaded)


def test_a_protocol_of_ones_own_does_not_tell_of_the_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("metrics: [dino]\nlike: paper\n")
    assert find_protocol(path).about == "of `mine.yaml`, which starts from paper"
    path.write_text("about: dino alone\nmetrics: [dino]\n")
    assert find_protocol(path).about == "dino alone"
