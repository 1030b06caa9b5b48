"""What `step.py` found: kept as JSON, and as ratios."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch


class Measured(NamedTuple):
    """peak: GiB; ideal: milliseconds of the frozen step's products at the speed of a large one."""

    ms: float
    peak: float
    ideal: float


def keep(folder: Path, name: str, device: str, measured: dict[tuple[str, int], Measured]) -> None:
    """FOLDER/NAME.json: the rows, and on what they were measured."""
    import diffusers
    import peft

    cuda = device.startswith("cuda")
    rows = [
        {"row": case, "batch": batch, "ms": round(m.ms, 1), "peak_gib": round(m.peak, 2),
         "of_ceiling": round(m.ideal / m.ms, 3)}
        for (case, batch), m in measured.items()
    ]  # fmt: skip
    told = {
        "network": name,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "date": date.today().isoformat(),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, peft)},
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


def print_ratios(times: dict[tuple[str, int], float], floors: dict[str, str]) -> None:
    """Each peer's time over that of our step of the same method and batch; and what ours adds to
    its own frozen step, over what theirs adds to theirs. floors: kind of ours -> frozen step.
    """
    for (case, batch), ms in times.items():
        kind, _, method = case.partition("-")
        if kind not in ("peft", "lycoris", "dense", "diffusers"):
            continue
        theirs = times.get(("frozen", batch))
        for ours, floor in floors.items():
            mine, own = times.get((f"{ours}-{method}", batch)), times.get((floor, batch))
            if mine:
                print(f"{case} / {ours}-{method}, batch {batch}: {ms / mine:.2f}")
            if mine and own and theirs:
                added = f"{mine - own:.2f} ms for {ms - theirs:.2f} ms"
                share = (mine - own) / (ms - theirs)
                print(f"  above the frozen step: {added}, {share:.3f} of it")
