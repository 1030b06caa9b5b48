"""Files of version 3, of convolutions and options of layers: what is wrong in one is said."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from torch import nn

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.native import load_adapter_file
from dreamtune.files.tensors import read_tensors, write_tensors


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    entries: dict[str, Any] = {"conv": {}, "re:[ab]": {"rank": 3}}
    adapter = dreamtune.inject(net(), "lora", target_modules=entries, rank=2)
    return adapter.save(tmp_path / "a.safetensors")


def written_with(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Anew, so that its hashes are right."""
    file = read_tensors(path)
    about = json.loads(json.dumps(file.about))
    edit(about)
    write_tensors(path, file.tensors, about)
    return path


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda a: a["shapes"].update(a=[6, 6, 1]), r"`shapes`.*\(out, in\) or \(out, in, kh"),
        (lambda a: a["shapes"].update(conv=[6, 4, 3, -3]), "`shapes` must be at least 1"),
        (lambda a: a["shapes"].update(conv=[6, 4, 1, 9]), None),
        (lambda a: a["shapes"].update(conv=[6, 4, 3, 1]), r"`conv.A` must be \(2, 12\) floats"),
        (lambda a: a["shapes"].update(conv=[2**40] * 4), "`shapes`.*no layer is so large"),
        (lambda a: a["shapes"].update(a=[10**30, 1]), "`shapes`.*no layer is so large"),
        (lambda a: a.pop("layer_options"), "`layer_options` is missing"),
        (lambda a: a.update(layer_options=[]), "`layer_options` must be of type dict"),
        (lambda a: a["layer_options"].update(a=3), "`layer_options` must be of type dict"),
        (lambda a: a["layer_options"].update(c={}), "has options, but no shape, of `c`"),
        (lambda a: a["layer_options"]["a"].update(rnk=3), "`lora` has no option `rnk`"),
        (lambda a: a["layer_options"]["a"].update(rank=10**9), "`rank` must be at most"),
        (lambda a: a["layer_options"]["a"].update(rank=4), r"`a.A` must be \(4, 6\) floats, got"),
        (lambda a: a.update(format_version=2), "`shapes`.*at most 2 items"),
        (lambda a: a.update(format_version=5), "format version 5, this dreamtune reads up to 4"),
        (lambda a: a.update(format_version=4), "`parts` is missing"),
    ],
)  # fmt: skip
def test_headers_are_checked(saved: Path, edit: Callable[[Any], None], message: str) -> None:
    path = written_with(saved, edit)
    if message is None:  # as wide, so that only the model tells
        with pytest.raises(ValueError, match=r"`conv` is \(6, 4, 3, 3\) here and \(6, 4, 1, 9\)"):
            dreamtune.load(net(), path)
        return
    with pytest.raises(UnreadableFile, match=message):
        load_adapter_file(path)


def test_no_damage_of_a_header_crashes(saved: Path) -> None:
    """Read as it is, or refused by name; never an error of ours."""
    file = read_tensors(saved)
    refused = 0
    for seed in range(250):
        rng = random.Random(seed)
        text = damage.edit_json(json.dumps(file.about), rng)
        try:
            about = json.loads(text)
            write_tensors(saved, file.tensors, about)
        except (ValueError, TypeError, RecursionError):
            continue  # no header that can be written
        model = net()
        try:
            dreamtune.load(model, saved, force=True)
        except ValueError as error:
            refused += 1
            assert saved.name in str(error) or "no adapter" in str(error), (seed, error)
            assert all(type(m) in (nn.Linear, nn.Conv2d) for m in model.children())
    assert refused > 80


def test_what_is_told_of_such_a_file(saved: Path) -> None:
    """Method, layers and sizes by `info`, distances by `analyse`; nothing else exports it."""
    from dreamtune.evaluation.analysis import analyse
    from dreamtune.files.info import describe

    model = net()
    adapter = dreamtune.load(model, saved)
    ones = {key: torch.full_like(x, 0.1) for key, x in adapter.state_dict().items()}
    adapter.load_state_dict(ones)
    adapter.save(saved)
    adapter.eject()
    info = describe(saved, model)
    assert info.method.endswith("other options in 2 layers")
    assert info.ranks == {2: 1, 3: 2} and info.far == 0
    change = {"conv": 2, "a": 3, "b": 3}  # of a rank: each value is rank * 0.01
    sizes = {"conv": 6 * 36, "a": 36, "b": 36}
    for layer, norm in analyse(saved, model)["files"][0]["layers"].items():
        weight = model.get_submodule(layer).weight
        want = 0.01 * change[layer] * sizes[layer] ** 0.5 / float(weight.detach().norm())
        assert norm["distance"] == pytest.approx(want, rel=1e-5)
