"""The subjects that ship with the package: the registry agrees with the folders."""

from __future__ import annotations

import pytest

from dreamtune import embedded

pytestmark = pytest.mark.skipif(
    not (embedded.ROOT / "subjects.json").is_file(), reason="the embedded base is not built yet"
)


def test_every_subject_has_photos_captions_and_references():
    subjects = embedded.subjects()
    assert len({subject.id for subject in subjects}) == len(subjects)
    for subject in subjects:
        assert len(subject.photos) >= 4 and len(subject.references) >= 1
        assert not set(subject.photos) & set(subject.references)
        assert all(subject.name in caption for caption in subject.captions)
    assert {subject.split for subject in subjects} == {"dev", "report"}
    assert len(embedded.subjects("dev")) + len(embedded.subjects("report")) == len(subjects)


def test_the_default_subject_is_for_development():
    assert embedded.subject() in embedded.subjects("dev")


def test_prompts_take_a_subject():
    prompts = embedded.prompts()
    assert len(prompts) == len(set(prompts)) == 25
    assert all(prompt.count("{}") == 1 for prompt in prompts)


def test_an_unknown_subject_names_near_ones():
    known = embedded.subject().id
    with pytest.raises(ValueError, match=known):
        embedded.subject(known + "x")
