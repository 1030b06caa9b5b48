"""What an adapter did to the weights, against formulas written out."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from methods import make
from tiny import disturb, tiny_unet

import dreamtune
from dreamtune.evaluation.analysis import (
    END,
    START,
    analyse,
    hyperspherical_energy,
    put_into,
)
from dreamtune.files.names import block_of


def test_energy_is_the_mean_over_all_pairs():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    units = [row / row.norm() for row in weight]
    points = [*units, *(-u for u in units)]
    pairs = [1 / float((a - b).norm()) for a, b in itertools.combinations(points, 2)]
    assert hyperspherical_energy(weight) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    with_zeros = torch.cat([weight, torch.zeros(2, 7)])
    assert hyperspherical_energy(with_zeros) == pytest.approx(hyperspherical_energy(weight))
    assert hyperspherical_energy(3 * weight) == pytest.approx(hyperspherical_energy(weight))
    assert math.isnan(hyperspherical_energy(torch.zeros(2, 3)))


def naive_share(method: str, options: dict, adapter, weight) -> float:
    change = (adapter.merged(weight)[0] - weight).detach()
    turned = (adapter.merged(torch.eye(16).double())[0] - torch.eye(16)).detach()
    if method == "delora":
        times = 1 if options.get("start") == "peft" else 2
        strength = times * abs(float(adapter.lambda_.detach()))
        if options.get("multiplicative"):
            return float(turned.norm()) / strength
        largest = weight.norm(dim=0).max() if options.get("weight_scaling", True) else 1
        return float(change.norm() / largest) / strength
    if method == "norm_bounded":
        return float(torch.linalg.matrix_norm(change, 2)) / options["delta"]
    if method == "ether+":
        return float(turned.norm()) / math.sqrt(2 * options["blocks"])
    if method == "ether":
        return float(turned.norm()) / (2 * math.sqrt(options["blocks"]))
    return float(turned.norm()) / (2 * math.sqrt(options["rank"] if method == "hra" else 16))


@pytest.mark.parametrize(
    "method,options",
    [
        ("delora", {"rank": 3}),
        ("delora", {"rank": 3, "start": "peft"}),
        ("delora", {"rank": 3, "weight_scaling": False}),
        ("delora", {"rank": 3, "multiplicative": True}),
        ("norm_bounded", {"rank": 3, "delta": 0.4}),
        ("ether", {"blocks": 4}),
        ("ether+", {"blocks": 2, "sides": 1}),
        ("hra", {"rank": 6}),
        ("oft", {"exact": True}),
    ],
)
@pytest.mark.parametrize("size", [0.03, 3.0])
def test_share_of_the_bound(method, options, size):
    adapter, weight = make(method, options, (16, 16))
    disturb(adapter, size=size)
    (share,) = adapter.share_of_bound(weight).detach()
    assert 0 < share <= 1 + 1e-9
    assert float(share) == pytest.approx(naive_share(method, options, adapter, weight), rel=1e-6)


@pytest.mark.parametrize(
    "method,options", [("lora", {}), ("dora", {}), ("oft", {}), ("delora", {"normalize": False})]
)
def test_methods_without_a_bound(method, options):
    adapter, weight = make(method, options, (16, 16))
    assert adapter.share_of_bound(weight) is None


def test_a_file(tmp_path: Path):
    unet = tiny_unet()
    adapter = dreamtune.inject(unet, "delora", rank=2)
    disturb(adapter)
    file = adapter.save(tmp_path / "a.safetensors")
    said: list[str] = []
    found = analyse(file, base=tiny_unet(), output=tmp_path / "out.json", tell=said.append)
    assert json.loads((tmp_path / "out.json").read_text()) == found
    (entry,) = found["files"]
    assert found["method"] == "delora" and entry["step"] is None and len(said) == 1
    base = tiny_unet()
    layers = entry["layers"]
    adapter.merge()
    for path, values in layers.items():
        before, after = (u.get_submodule(path).weight for u in (base, unet))
        moved = float(((after - before).norm() / before.norm()).detach())
        assert values["distance"] == pytest.approx(moved, rel=1e-4)
        ratio = hyperspherical_energy(after.data) / hyperspherical_energy(before.data)
        assert values["energy"] == pytest.approx(ratio, rel=1e-5)
    assert set(entry["blocks"]) == {block_of(path) for path in layers}
    mean = sum(v["distance"] for v in layers.values()) / len(layers)
    assert entry["mean"]["distance"] == pytest.approx(mean)


def test_a_lora_is_measured_too(tmp_path: Path):
    adapter = dreamtune.inject(tiny_unet(), "ether")
    disturb(adapter)
    lora = dreamtune.export(adapter, tmp_path)
    native = adapter.save(tmp_path / "a.safetensors")
    mine, theirs = (analyse(f, base=tiny_unet())["files"][0] for f in (native, lora))
    assert mine["mean"]["share"] == pytest.approx(1) and theirs["mean"]["share"] is None
    assert theirs["mean"]["distance"] == pytest.approx(mine["mean"]["distance"], rel=1e-4)


def test_of_a_run_the_best_is_what_is_told(tmp_path: Path):
    """Its checkpoint may be gone: `checkpoints_total_limit` keeps the last ones."""
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "report.html").write_text("<main>x<footer>y</footer></main>")
    adapter = dreamtune.inject(tiny_unet(), "delora", rank=2)
    for step in (15, 30, 45):
        disturb(adapter, size=step / 100)
        if step > 15:
            adapter.save(tmp_path / f"checkpoint-{step}" / "adapter.safetensors")
        if step in (15, 30):
            adapter.save(tmp_path / "best" / "adapter.safetensors", metadata={"step": step})
            told: list[str] = []
            found = analyse(tmp_path, base=tiny_unet(), tell=told.append)["files"]
            assert [(f["step"], f["best"]) for f in found][-1] == (step, True)
    found = analyse(tmp_path, base=tiny_unet(), tell=told.append)["files"]
    assert [(f["step"], f["best"]) for f in found] == [(30, True), (45, False)]
    assert told[-2].startswith("step 30, the best: ") and told[-1].startswith("step 45: ")
    page = (tmp_path / "report.html").read_text()
    (table,) = re.findall(r"<th scope=\"col\">(Block[^<]*)</th>", page)
    assert table == "Block at step 30, the best"


def test_the_section_of_a_report_is_replaced(tmp_path: Path):
    report = tmp_path / "report.html"
    report.write_text("<main>x<footer>y</footer></main>")
    for text in ("one", "two"):
        put_into(report, text)
    assert report.read_text() == f"<main>x{START}two{END}<footer>y</footer></main>"
