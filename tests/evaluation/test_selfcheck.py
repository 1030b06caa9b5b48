"""Real photos among themselves: both conventions for self pairs against naive loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from galleries import SUBJECTS, write_photos

from dreamtune.cli import main
from dreamtune.evaluation.layout import read_photos
from dreamtune.evaluation.protocols import PROTOCOLS, Encoder
from dreamtune.evaluation.selfcheck import PUBLISHED, selfcheck, text_of
from dreamtune.metrics import Scorers
from dreamtune.metrics.store import opened


def test_both_conventions_are_those_of_naive_loops(
    tmp_path: Path, scorer_names: dict[str, str]
) -> None:
    photos, _ = read_photos(write_photos(tmp_path))
    scorers = Scorers.load(scorer_names, ("dino", "clip_i", "clip_t"))
    encoders = {name: Encoder(weights) for name, weights in scorer_names.items()}
    protocol = replace(PROTOCOLS["oft"], encoders=encoders)
    checks = {check.key: check for check in selfcheck(photos, scorers, protocol)}
    assert list(checks) == ["dino", "clip_i"]
    for key, extractor in (("dino", "dino"), ("clip_i", "clip")):
        apart, itself, means = [], [], []
        for subject in SUBJECTS:
            pictures = [opened(p) for p in photos[subject].photos]
            rows = scorers.extractors[extractor].images(pictures).tolist()
            cosines = {
                (i, j): sum(x * y for x, y in zip(a, b))
                for i, a in enumerate(rows)
                for j, b in enumerate(rows)
            }
            itself += list(cosines.values())
            apart += [c for (i, j), c in cosines.items() if i != j]
            means.append(fmean(c for (i, j), c in cosines.items() if i != j))
        assert checks[key].apart.mean == pytest.approx(fmean(apart), abs=1e-5)
        assert checks[key].itself.mean == pytest.approx(fmean(itself), abs=1e-5)
        assert checks[key].itself.mean > checks[key].apart.mean
        by_subject = selfcheck(photos, scorers, replace(protocol, averaging="subjects"))
        found = next(check for check in by_subject if check.key == key)
        assert found.apart.mean == pytest.approx(fmean(means), abs=1e-5)
        assert checks[key].apart.n == 3 + 4 + 5 and checks[key].apart.unit == "subjects"
        assert checks[key].published == PUBLISHED["oft"][1][key]
    text = text_of(list(checks.values()), photos, protocol)
    assert f"0.703  {checks['dino'].apart.mean:.3f} (" in text
    assert all(line.endswith("12 photos") for line in text.splitlines()[2:4])
    assert "it is of 30 subjects with 158 photos, these are others" in text


def test_selfcheck_of_the_command(
    tmp_path: Path, scorer_names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(write_photos(tmp_path))
    flags = [x for name, value in scorer_names.items() for x in (f"--{name}", value)]
    assert main(["score", root, "--selfcheck", *flags]) == 0
    out = capsys.readouterr().out
    assert "Real images of 3 subjects, 12 photos, by protocol dreamtune." in out
    assert "DINO               –" in out
    assert main(["score", root, "--selfcheck", "--photos", root, *flags]) == 1
    assert "`photos` has no meaning with --selfcheck" in capsys.readouterr().err
    assert main(["score", root, "--selfcheck", "--protocol", "oft", *flags]) == 1
    assert "protocol `oft` scores with `facebook/dino-vits16`" in capsys.readouterr().err
