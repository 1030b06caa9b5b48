"""What `robustness.py` keeps: a few flat files, so that a machine lent for minutes can go on.

WORK/settings.json       what is fixed by the first start
WORK/calibration.json    what was measured of this device
WORK/scores-<n>.jsonl    of process n: a line a scored step, the base, or a wave's seconds
WORK/results.json        all of it, compact, for `robustness_report.py`
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from robustness_plan import CENTRED, LIKE, PARTS, TUNED, VARIANTS, Run, Settings

from dreamtune.files.whole import whole

SETTINGS, CALIBRATION, RESULTS = "settings.json", "calibration.json", "results.json"


def settled(
    work: Path,
    asked: Settings,
    parts: Sequence[str],
    centres: Mapping[str, float],
    tuned: Mapping[str, float | None],
    variants: Collection[str] = VARIANTS,
) -> Settings:
    """The settings of the folder, with the centres of these parts, each fixed by the first start
    that has it: what is given, else that of the part that this is like, else in CENTRED what was
    tuned, else the method's own. tuned: None for a variant that has runs of TUNED to be done, which
    of the variants that are asked for now is an error. Raises ValueError for that, and for what was
    started otherwise."""
    path = work / SETTINGS
    saved = Settings(**json.loads(path.read_text())) if path.is_file() else asked
    if replace(asked, centres=saved.centres) != saved:
        was, new = ({k: v for k, v in asdict(s).items() if k != "centres"} for s in (saved, asked))
        raise ValueError(f"`{path}` was started with {was}, not {new}: name another --work.")
    if strange := [v for v in centres if not any(v in PARTS[part].variants for part in parts)]:
        raise ValueError(f"--centres names `{strange[0]}`, which none of the parts asked for has.")
    found = {part: dict(own) for part, own in saved.centres.items()}
    for part in parts:
        known, like = found.setdefault(part, {}), found.get(LIKE.get(part, ""), {})
        best = tuned if part in CENTRED else {}
        for name in PARTS[part].variants:
            usual = like.get(name, best.get(name, VARIANTS[name].rate))
            rate = centres.get(name, known.get(name, usual))
            if known.get(name, rate) != rate:
                raise ValueError(
                    f"part {part} was started with {name} at {known[name]:g}, not {rate:g}: name "
                    "another --work."
                )
            if rate is not None:
                known[name] = rate
            elif name in variants:
                raise ValueError(
                    f"part {part} goes around the best rates of part {TUNED}, where {name} has "
                    f"runs to be done: finish that part first, or give --centres {name}=RATE."
                )
    now = replace(saved, centres=found)
    if now != saved or not path.is_file():
        with whole(path) as partial:
            partial.write_text(json.dumps(asdict(now), indent=1))
    return now


@dataclass
class State:
    """What the files of a folder hold."""

    rows: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    waves: list[dict[str, Any]] = field(default_factory=list)

    def is_done(self, run: Run) -> bool:
        return (*run.key, run.steps) in self.rows

    def take(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "wave":
            self.waves.append(dict(line))
        elif line["kind"] == "base":
            self.base[line["subject"]] = dict(line)
        else:
            names = ("part", "variant", "rate", "seed", "subject", "step")
            self.rows[tuple(line[n] for n in names)] = dict(line)


def read_state(work: Path) -> State:
    """A last line that a kill cut off is left out."""
    state = State()
    for path in sorted(work.glob("scores-*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            state.take(line)
    return state


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """After a line that was cut off a new one begins."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    cut = path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + text)
        file.flush()


def results_of(work: Path) -> dict[str, Any]:
    """All of a folder, compact: what the report is made from."""
    state = read_state(work)
    names = list(dict.fromkeys(name for row in state.rows.values() for name in row))
    names = [n for n in names if n not in ("kind", "picture")]
    # a run whose end is missing was never whole
    rows = [
        row for key, row in state.rows.items() if (*key[:-1], row["steps"]) in state.rows
    ]  # fmt: skip
    pictures = [
        {k: row[k] for k in ("part", "variant", "multiplier", "rate", "subject", "step", "picture")}
        for row in rows
        if row.get("picture")
    ]
    files = {"settings": SETTINGS, "calibration": CALIBRATION}
    return {
        "kind": "robustness",
        **{k: json.loads((work / f).read_text()) for k, f in files.items() if (work / f).is_file()},
        "variants": {v.name: v.title for v in VARIANTS.values()},
        "columns": names,
        "rows": [[row.get(name) for name in names] for row in rows],
        "base": [{k: v for k, v in b.items() if k != "kind"} for b in state.base.values()],
        "waves": [{k: v for k, v in w.items() if k != "kind"} for w in state.waves],
        "pictures": pictures,
    }


def write_results(work: Path) -> Path:
    with whole(work / RESULTS) as partial:
        partial.write_text(json.dumps(results_of(work), separators=(",", ":")), encoding="utf-8")
    return work / RESULTS
