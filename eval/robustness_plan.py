"""What `robustness.py` trains: variants, rates, subjects and seeds of each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dreamtune import embedded
from dreamtune.adapters import find_method

MULTIPLIERS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)
LONG = 16  # times the steps of a usual run
REPORTED, FEW = 25, 5  # subjects


@dataclass(frozen=True)
class Variant:
    """A method with its options; `name` names it in files."""

    name: str
    title: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return find_method(self.method).learning_rate


MAIN = ("lora", "delora", "ether", "ether_plus")
VARIANTS = {
    v.name: v
    for v in (
        Variant("lora", "LoRA", "lora"),
        Variant("delora", "DeLoRA", "delora"),
        Variant("ether", "ETHER", "ether"),
        Variant("ether_plus", "ETHER+", "ether+"),
        # of LoRA's alpha: without one its scale would be LoRA's
        Variant("rslora", "rsLoRA", "lora", {"use_rslora": True, "alpha": 16.0}),
        Variant("dora", "DoRA", "dora"),
        Variant("oft", "OFT", "oft"),
        Variant("hra", "HRA", "hra"),
        Variant("deft", "DEFT", "deft"),
        Variant("norm_bounded", "NB-LoRA", "norm_bounded"),
        Variant("delora_peft", "DeLoRA, PEFT's start", "delora", {"start": "peft"}),
        Variant("delora_fixed", "DeLoRA, lambda fixed", "delora", {"lambda_learning_rate": 0.0}),
        Variant("delora_1", "DeLoRA, lambda 1", "delora", {"lambda_init": 1.0}),
        Variant("delora_15", "DeLoRA, lambda 15", "delora", {"lambda_init": 15.0}),
        Variant(
            "delora_peft_15", "DeLoRA, PEFT's start, lambda 15", "delora",
            {"start": "peft", "lambda_init": 15.0},
        ),
    )
}  # fmt: skip
STRENGTHS = ("delora_1", "delora", "delora_15", "delora_peft", "delora_peft_15")
STARTS = tuple(name for name in STRENGTHS if name != "delora_1")
LIKE = {"b": "a", "d": "a"}  # parts whose rates are those of another, where not given
TUNED = "defaults"  # the part whose best rates are the centres of CENTRED
CENTRED = ("a", "b", "c", "d")
RELATIVES = ("rslora", "dora", "oft", "hra", "deft", "norm_bounded")
OTHERS = tuple(name for name in VARIANTS if name not in (*MAIN, *STRENGTHS)) + ("delora_peft",)


@dataclass(frozen=True)
class Part:
    """Runs of one kind. at: the scored steps but 0, as shares of the usual number of steps; the
    last is the end."""

    about: str
    variants: tuple[str, ...]
    multipliers: tuple[float, ...]
    split: str
    subjects: int
    seeds: tuple[int, ...] = (0,)
    at: tuple[float, ...] = (1.0,)


PARTS = {
    "a": Part("the range of rates", MAIN, MULTIPLIERS, "report", REPORTED),
    "b": Part(
        f"{LONG} times the steps", MAIN, (1.0,), "report", FEW,
        at=tuple(2.0**n for n in range(-4, 5)),
    ),
    "c": Part("relatives and ablations", OTHERS, MULTIPLIERS, "report", FEW),
    "d": Part("more seeds of a", MAIN, MULTIPLIERS, "report", REPORTED, (1, 2)),
    "defaults": Part("rates to choose from", MAIN + OTHERS, MULTIPLIERS, "dev", FEW),
    "time": Part(
        "time to quality", MAIN, (1 / 4, 1.0, 4.0), "dev", FEW,
        at=tuple(n / 48 for n in (1, 2, 3, 4, 6, 8, 12, 15, 18, 24, 30, 36, 42, 48)),
    ),
    "lambda": Part("starts and strengths of DeLoRA", STRENGTHS, (1 / 4, 1.0, 4.0), "dev", FEW),
    "starts": Part(
        "starts and strengths of DeLoRA on more subjects", STARTS, MULTIPLIERS[:4], "report",
        REPORTED, at=(1 / 16, 3 / 16, 5 / 12, 1.0),
    ),
    "steps": Part(
        "steps to choose from", RELATIVES, (1 / 4, 1.0, 4.0), "dev", FEW,
        at=tuple(n / 16 for n in (1, 2, 3, 4, 6, 8, 12, 16)),
    ),
    "confirm": Part(
        "what was chosen", MAIN + RELATIVES + ("delora_1", "delora_15"), (1.0,), "report",
        REPORTED, at=(1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2, 3 / 4, 1.0),
    ),
    "choice": Part(
        "steps and rates to choose from", MAIN + RELATIVES, (1 / 4, 1.0, 4.0), "dev", FEW,
        (0, 1, 2), at=tuple(n / 48 for n in (3, 6, 9, 12, 15, 18, 24, 30, 36, 48)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One adapter. at: the scored steps, of which the last is the end."""

    part: str
    variant: str
    multiplier: float
    rate: float
    seed: int
    subject: str
    at: tuple[int, ...]

    @property
    def steps(self) -> int:
        return self.at[-1]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.part, self.variant, self.rate, self.seed, self.subject)

    @property
    def fields(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "at"} | {"steps": self.steps}


@dataclass(frozen=True)
class Settings:
    """What a continuation may not change. centres: part -> variant -> its rate at the multiplier
    1, where that is not the method's own."""

    steps: int = 240
    prompts: int = 8
    unrelated: int = 4
    centres: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def centre(self, part: str, variant: str) -> float:
        return self.centres.get(part, {}).get(variant, VARIANTS[variant].rate)

    @property
    def images(self) -> int:
        """Of one scoring."""
        return self.prompts + self.unrelated


@dataclass(frozen=True)
class Chosen:
    """What is asked for now; None for all."""

    parts: Sequence[str]
    variants: Sequence[str] | None = None
    multipliers: Sequence[float] | None = None
    subjects: int | None = None


def spread(names: Sequence[str], count: int) -> list[str]:
    """So many of the names, at equal distances."""
    count = min(count, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def subjects_of(part: Part, limit: int | None) -> list[str]:
    """The few are among the many, so that a comparison of two parts is paired."""
    names = [s.id for s in embedded.subjects(part.split)]
    if part.split == "report":
        names = spread(names, REPORTED)
    names = spread(names, part.subjects)
    return names if limit is None else names[:limit]


def runs_of(chosen: Chosen, settings: Settings) -> list[Run]:
    """In the order in which they are wanted: by part, then whole subjects."""
    found = []
    for name in chosen.parts:
        part = PARTS[name]
        at = tuple(sorted({max(1, round(share * settings.steps)) for share in part.at}))
        variants = [v for v in part.variants if v in (chosen.variants or VARIANTS)]
        rates = [m for m in part.multipliers if m in (chosen.multipliers or MULTIPLIERS)]
        found += [
            Run(name, v, m, settings.centre(name, v) * m, seed, subject, at)
            for seed in part.seeds
            for v in variants
            for subject in subjects_of(part, chosen.subjects)
            for m in rates
        ]
    return found
