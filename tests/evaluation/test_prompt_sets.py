"""Prompts that subjects lack, by what they ask for and not by how many they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamtune import embedded
from dreamtune.data.words import read_words
from dreamtune.evaluation.layout import Generated, Photos
from dreamtune.evaluation.prompt_sets import prompt_counts
from dreamtune.evaluation.prompts import LIVE, OBJECT
from dreamtune.evaluation.protocol_file import find_protocol
from dreamtune.metrics.store import Picture


def counts(prompts: dict[str, list[str]], known: bool = False, protocol: str = "paper") -> dict:
    picture = Picture(Path("0.png"), "0.png", "")
    images = [Generated(s, p, 0, picture) for s, own in prompts.items() for p in own]
    photos = {
        s: Photos(s, [], words=read_words(f"a sks {s}", f"a {s}") if known else None)
        for s in prompts
    }
    return prompt_counts(images, photos, "sks", find_protocol(protocol))


@pytest.mark.parametrize("known", [False, True])
def test_other_prompts_of_equal_number_are_missing(known):
    found = counts(
        {
            "fox": ["a sks fox in the snow", "A sks fox on the beach."],
            "dog": ["a red sks dog", "a sks dog on the beach"],
            "owl": ["a red sks owl", "a sks owl on the beach"],
        },
        known,
    )
    assert found["missing_prompts"] == {
        "fox": ["a red {}"], "dog": ["a {} in the snow"], "owl": ["a {} in the snow"],
    }  # fmt: skip
    assert found["subjects_with_fewer_prompts"] == []
    assert found["protocol_prompts"] == [3, 35]  # a dog is asked other ones than a fox
    assert len(found["prompts_of_no_subject"]) == 32


def test_a_prompt_that_names_the_class_alone_is_the_same():
    found = counts({"apple": ["an apple in the snow"], "dog": ["a sks dog in the snow"]}, True)
    assert found["missing_prompts"] == {}


def filled(templates, noun):
    return [template.replace("{}", f"sks {noun}") for template in templates]


@pytest.mark.parametrize("protocol", ["paper", "dreamtune"])
def test_prompts_of_another_class_are_not_missing(protocol):
    """A fox is neither cat nor dog: its prompts tell that they are those of animals."""
    whole = {"dog": filled(LIVE, "dog"), "can": filled(OBJECT, "can"), "fox": filled(LIVE, "fox")}
    found = counts(whole, protocol=protocol)
    assert found["missing_prompts"] == {} and found["prompts_of_no_subject"] == []
    assert found["protocol_prompts"] == [35, 35]
    whole["fox"].remove("a sks fox wearing a red hat")
    whole["can"].remove("a sks can in the snow")
    found = counts(whole, protocol=protocol)
    assert found["missing_prompts"] == {"fox": ["a {} wearing a red hat"],
                                        "can": ["a {} in the snow"]}  # fmt: skip
    assert found["protocol_prompts"] == [35, 35]


def test_the_embedded_base_has_prompts_of_its_own():
    found = counts({"dog": filled(embedded.prompts()[:-1], "dog")}, protocol="dreamtune")
    assert found["protocol_prompts"] == [24, 25]
    assert found["prompts_of_no_subject"] == ["a sticker of a {} on a blue background"]


def test_subjects_whose_words_nothing_tells():
    """Compared as they are written where any is shared, else by number; never with a protocol."""
    found = counts({"a": ["red", "snow"], "b": ["snow", "beach"], "c": ["other"]})
    assert found["missing_prompts"] == {"a": ["beach"], "b": ["red"]}
    assert found["subjects_with_fewer_prompts"] == ["c (1 of 2)"]
    assert found["protocol_prompts"] is None and found["prompts_of_no_subject"] == []


def test_where_captions_are_the_prompts_each_subject_has_its_own():
    picture = Picture(Path("0.png"), "0.png", "")
    asked = {"fox": ["a sks fox on a couch", "a sks fox in a box"], "dog": ["a sks dog at sea"]}
    photos = {
        s: Photos(s, [], captions=[*own, None], words=read_words(f"a sks {s}", f"a {s}"))
        for s, own in asked.items()
    }
    made = [("fox", "a sks fox on a couch"), ("dog", "a sks dog at sea")]
    images = [Generated(s, prompt, 0, picture) for s, prompt in made]
    found = prompt_counts(images, photos, "sks", find_protocol("peft_image"))
    assert found["missing_prompts"] == {} and found["protocol_prompts"] == [2, 3]
    assert found["prompts_of_no_subject"] == ["a {} in a box"]
