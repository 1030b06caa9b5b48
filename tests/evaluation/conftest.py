"""A small folder of everything, and its scores, once for each file of tests."""

from __future__ import annotations

import pytest
from galleries import EVERY, task_of, write_masked

from dreamtune.evaluation.scoring import score_images
from dreamtune.metrics import Scorers


@pytest.fixture(scope="module")
def scorers(scorer_names):
    return Scorers.load(scorer_names, EVERY.metrics)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_masked(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def results(folders, scorers):
    return score_images(task_of(folders), scorers, EVERY)
