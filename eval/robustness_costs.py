"""What a wave of `robustness.py` costs, and which waves fit into the minutes that there are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from robustness_plan import FEW, PARTS, VARIANTS, Run, Settings
from robustness_state import State

WAVE_SECONDS = 150.0  # a longer wave is made smaller: a killed one is lost
MARGIN = 1.15  # of what a wave is thought to take
UNSEEN = 1.6  # times the calibrated method's cost, of a variant that no wave was seen of


@dataclass(frozen=True)
class Wave:
    """Runs that train at once: of one variant and schedule."""

    runs: tuple[Run, ...]
    seconds: float

    @property
    def name(self) -> str:
        first = self.runs[0]
        return f"{first.part} {first.variant}, {len(self.runs)} runs of {first.steps} steps"


class Costs:
    """Seconds of a wave, by what was measured of this device and by the waves that were seen on
    it."""

    def __init__(self, measured: Mapping[str, Any], settings: Settings, state: State) -> None:
        self.measured, self.settings = measured, settings
        self.points = sorted((int(n), float(s)) for n, s in measured["seconds_a_step"].items())
        self.seen: dict[str, float] = {}
        here = [w for w in state.waves if w["device"] == measured["device"]]
        for name in VARIANTS:
            ratios = [
                w["step_seconds"] / w["steps"] / self.step(w["slots"])
                for w in here
                if w["variant"] == name
            ]
            if ratios:
                self.seen[name] = statistics.median(ratios)

    def step(self, slots: int) -> float:
        """Seconds of one step of so many slots, of the calibrated method: on the lines through the
        measured points."""
        points = self.points
        if len(points) == 1:
            return points[0][1] * slots / points[0][0]
        upper = next((i for i, (n, _) in enumerate(points) if n >= slots), len(points) - 1)
        (n0, s0), (n1, s1) = points[max(upper - 1, 0)], points[max(upper, 1)]
        return max(s0 + (s1 - s0) * (slots - n0) / (n1 - n0), points[0][1] / 2)

    def factor(self, variant: str) -> float:
        return self.seen.get(variant, 1.0 if variant == self.measured["variant"] else UNSEEN)

    def seconds(self, variant: str, slots: int, at: Sequence[int]) -> float:
        images = slots * self.settings.images * len(at)
        return (
            float(self.measured["setup_seconds"])
            + at[-1] * self.step(slots) * self.factor(variant)
            + images / float(self.measured["images_a_second"])
        )

    def again(self, wave: Wave) -> Wave:
        """The wave with what it costs by what is known now."""
        first = wave.runs[0]
        return replace(wave, seconds=self.seconds(first.variant, len(wave.runs), first.at))

    def size(self, variant: str, at: Sequence[int], most: int | None) -> int:
        """Slots of a wave: the most run-steps a second of the measured sizes, in WAVE_SECONDS."""
        sizes = [n for n, _ in self.points if most is None or n <= most] or [most or 1]
        best = max(sizes, key=lambda n: n / self.step(n))
        while best > 1 and self.seconds(variant, best, at) > WAVE_SECONDS:
            best = max(1, best // 2)
        return max(best, min(FEW, most or FEW))


def waves_of(runs: Sequence[Run], costs: Costs, most: int | None) -> list[Wave]:
    """Runs of one part, variant, seed and schedule together; the variants of a part take turns, so
    that each has as many subjects as the others wherever it ends."""
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = {}
    for run in runs:
        alike = groups.setdefault((run.part, run.seed, run.at), {})
        alike.setdefault(run.variant, []).append(run)
    found: list[Wave] = []
    for (_, _, at), by_variant in groups.items():
        turns: list[list[Wave]] = []
        for variant, own in by_variant.items():
            count = -(-len(own) // costs.size(variant, at, most))
            cuts = [len(own) * i // count for i in range(count + 1)]
            parts = [tuple(own[a:b]) for a, b in zip(cuts, cuts[1:])]
            turns.append([Wave(p, costs.seconds(variant, len(p), at)) for p in parts])
        longest = max(len(turn) for turn in turns)
        found += [turn[i] for i in range(longest) for turn in turns if i < len(turn)]
    return found


def fitted(waves: Sequence[Wave], seconds: float) -> tuple[list[Wave], list[Wave]]:
    """(those that fit into the seconds, in their order, the rest)."""
    fit: list[Wave] = []
    rest: list[Wave] = []
    for wave in waves:
        taken = sum(w.seconds for w in fit) + wave.seconds
        (fit if taken * MARGIN <= seconds else rest).append(wave)
    return fit, rest


def plan_text(fit: Sequence[Wave], rest: Sequence[Wave], seconds: float) -> str:
    lines = [f"Plan for {seconds / 60:.1f} minutes:"]
    for head, waves in (("", fit), ("Does not fit; run again for it:", rest)):
        if head and waves:
            lines.append(head)
        for part in dict.fromkeys(w.runs[0].part for w in waves):
            own = [w for w in waves if w.runs[0].part == part]
            for variant in dict.fromkeys(w.runs[0].variant for w in own):
                these = [w for w in own if w.runs[0].variant == variant]
                runs, cost = sum(len(w.runs) for w in these), sum(w.seconds for w in these)
                steps = these[0].runs[0].steps
                lines.append(
                    f"  {part} ({PARTS[part].about}), {VARIANTS[variant].title}: {runs} runs of "
                    f"{steps} steps in {len(these)} waves, {cost / 60:.1f} minutes"
                )
    total = sum(w.seconds for w in fit), sum(w.seconds for w in rest)
    lines.append(f"In all {total[0] / 60:.1f} minutes, and {total[1] / 60:.1f} that do not fit.")
    return "\n".join(lines)
