"""Pipeline x feature: the table of README.md. Each cell is run, on tiny random models.

python tests/helpers/pipeline_matrix.py    # the table, as README.md has it
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import cpu_offload
from pipelines import KITS, Kit, network_of
from tiny import disturb
from torch import Tensor
from transformers import CLIPImageProcessor

import dreamtune

YES, NO, NONE = "yes", "refused", "—"  # NONE: the pipeline has no such thing
Row = str | None | dict[str, float]
Prepare = Callable[[Any], None]
MIXED = {"dog": 0.5, "cat": 1.0}
ROWS: tuple[Row, ...] = ("dog", None, MIXED)
METHODS = {"dog": ("lora", {"rank": 4}), "cat": ("ether", {"blocks": 2})}


def weights(pipe: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network_of(pipe).state_dict().items()}


def check_near(got: Tensor, want: Tensor, base: Tensor, about: str = "it") -> None:
    """To rounding, of what an adapter changes and of the numbers themselves. The same bits do not
    come twice: a product of a transposed tensor, as Flux.2 has, is summed by where the tensor lies.
    """
    change = float((want - base).abs().max())
    size = float(want.abs().max())
    assert change > 1e-3 * size, "an adapter that changes nothing"
    far = float((got - want).abs().max())
    assert far <= max(1e-4 * change, 2e-5 * size), f"{about} is {far:.1e} from what it is alone"


class Absent(Exception):
    """The pipeline has no such thing."""


class Bench:
    """A kit with two adapters' files, and pipelines that have them together and alone."""

    def __init__(self, kit: Kit, folder: Path) -> None:
        self.kit, self.files, self.plain = kit, {}, {}
        for seed, (name, (method, options)) in enumerate(METHODS.items()):
            adapter = dreamtune.inject(kit.network(), method, seed=seed, **options)
            disturb(adapter, seed=seed, size=0.3)
            self.files[name] = adapter.save(folder / name)

    def loaded(self, row: Row, prepare: Prepare | None = None) -> Any:
        """A new pipeline that has a row's adapters alone, at its strengths."""
        strengths = {} if row is None else {row: 1.0} if isinstance(row, str) else row
        pipe = self.kit.pipe()
        for name in strengths:
            dreamtune.load(pipe, self.files[name], name=name)
        if strengths:
            dreamtune.set_adapters(pipe, strengths)
        if prepare is not None:
            prepare(pipe)
        return pipe

    def routed(
        self, rows: Sequence[Row] = ROWS, prepare: Prepare | None = None, **more: Any
    ) -> Tensor:
        """A batch of prompts with a row each, each of which is the picture that it is alone: to
        rounding, as a share of the change that its adapters make, or where `prepare` casts, as near
        as that is to the picture in float32.
        """
        images, kept = more.get("images", 1), self.plain if prepare is None else {}

        def pipe_of(row: Row, kept: dict[str, Any] = kept, prepare: Any = prepare) -> Any:
            if str(row) not in kept:
                kept[str(row)] = self.loaded(row, prepare)
            return kept[str(row)]

        together = pipe_of({"dog": 1.0, "cat": 0.9})
        with dreamtune.route(together, rows):
            got = self.kit.draw(together, range(len(rows)), **more).float()
        low = network_of(together).dtype != torch.float32
        for i, row in enumerate(rows):
            own = got[images * i : images * (i + 1)]
            want = self.kit.draw(pipe_of(row), [i], **more).float()
            if row is None:
                far = float((own - want).abs().max() / want.abs().max())
                assert far <= (0.1 if low else 5e-5), f"the base is {far:.1e} from itself"
                continue
            base = self.kit.draw(pipe_of(None), [i], **more).float()
            if not low:
                check_near(own, want, base, f"row {i}")
                continue
            exact = self.kit.draw(pipe_of(row, self.plain, None), [i], **more)
            far, near = (float((x - want).abs().max()) for x in (own, exact))
            assert far <= 2 * near, f"row {i} is {far:.1e} from what it is alone"
            assert near < (want - base).abs().max(), "nothing is left of it in this dtype"
        return got


def load_and_unload(bench: Bench) -> None:
    pipe, draw = bench.kit.pipe(), bench.kit.draw
    base, before = draw(pipe), weights(pipe)
    dreamtune.load(pipe, bench.files["dog"], name="dog")
    changed = draw(pipe)
    dreamtune.unload(pipe, "dog")
    assert all(torch.equal(v, before[k]) for k, v in weights(pipe).items())
    check_near(draw(pipe), base, changed)


def strengths(bench: Bench) -> None:
    """Of the whole, of a part, and a sweep in one call."""
    draw, base = bench.kit.draw, bench.kit.draw(bench.kit.pipe())
    pipe = bench.loaded("dog")
    one = draw(pipe)
    parts = {p.split(".")[0] for g in dreamtune.get_adapters(pipe)["dog"].groups for p in g.names}
    for nothing in (0.0, dict.fromkeys(parts, 0)):
        dreamtune.set_adapters(pipe, {"dog": nothing})
        check_near(draw(pipe), base, one)
    dreamtune.set_adapters(pipe, {"dog": [1.0, 0.0, 1.0]})
    for got, want, other in zip(draw(pipe), (one[0], base[1], one[2]), (base[0], one[1], base[2])):
        check_near(got, want, other)


def mix(bench: Bench) -> None:
    """In whatever order, and as rows of a route that are all alike."""
    both, draw = {"dog": 1.0, "cat": 0.4}, bench.kit.draw
    want, base = draw(bench.loaded(both)), draw(bench.kit.pipe())
    pipe = bench.loaded({"cat": 0.4, "dog": 1.0})
    check_near(draw(pipe), want, base)
    with dreamtune.route(pipe, [both] * 3):
        check_near(draw(pipe), want, base)


def rows(bench: Bench, **more: Any) -> None:
    if more.get("guided") and bench.kit.guidance[1] is None:
        raise Absent
    bench.routed(**more)


def images(bench: Bench) -> None:
    """Two, of two prompts: a guided batch of one image each has the same size."""
    for guided in (False, True)[: 1 + (bench.kit.guidance[1] is not None)]:
        bench.routed(ROWS[:2], guided=guided, images=2)


def negative(bench: Bench) -> None:
    if bench.kit.guidance[1] is None:
        raise Absent
    first, second = (bench.routed(ROWS[:2], guided=True, negative=i) for i in range(2))
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


def schedulers(bench: Bench) -> None:
    if not bench.kit.other:
        raise Absent
    for name in bench.kit.other:
        bench.routed(ROWS[:2], scheduler=getattr(diffusers, name), steps=2)


def callbacks(bench: Bench) -> None:
    """One that changes the latents, and one that interrupts."""
    seen: list[int] = []

    def halve(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] * 0.5}

    def stop(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    bench.routed(ROWS[:2], callback_on_step_end=halve, steps=2)
    assert set(seen) == {0, 1}, f"called at the steps {seen}"
    bench.routed(ROWS[:2], callback_on_step_end=stop, steps=2)


def changing(bench: Bench) -> None:
    """Of two images of two prompts, as above."""
    if not bench.kit.changing:
        raise Absent
    plain = bench.routed(ROWS[:2], images=2, guided=True, steps=2)
    for way, more in bench.kit.changing.items():
        got = bench.routed(ROWS[:2], images=2, guided=True, steps=2, **more)
        assert (got - plain).abs().max() > 1e-4 * plain.abs().max(), f"{way} changes nothing"


def model_offload(bench: Bench) -> None:
    """To a device that is the CPU as well."""
    bench.routed(ROWS[:2], prepare=lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))


def sequential_offload(bench: Bench) -> None:
    """As the pipeline's method does it, which takes no CPU for its accelerator."""

    def prepare(pipe: Any) -> None:
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)

    bench.routed(ROWS[:2], prepare=prepare)


def cast(bench: Bench, dtype: torch.dtype) -> None:
    bench.routed(ROWS[:2], prepare=lambda pipe: pipe.to(dtype))


def slicing(bench: Bench) -> None:
    if not hasattr(bench.kit.pipe(), "unet"):
        raise Absent
    bench.routed(ROWS[:2], prepare=lambda pipe: pipe.enable_attention_slicing(1))


def merge(bench: Bench) -> None:
    pipe, draw = bench.loaded(MIXED), bench.kit.draw
    before, want, base = weights(pipe), draw(pipe), draw(bench.kit.pipe())
    dreamtune.merge(pipe)
    check_near(draw(pipe), want, base)
    dreamtune.unmerge(pipe)
    assert all(torch.equal(v, before[k]) for k, v in weights(pipe).items())
    check_near(draw(pipe), want, base)


def speed_up(bench: Bench) -> None:
    """One adapter, in all rows."""
    pipe, draw = bench.loaded("dog"), bench.kit.draw
    want = draw(pipe)
    dreamtune.speed_up(pipe)
    check_near(draw(pipe), want, draw(bench.kit.pipe()))


def safety(bench: Bench) -> None:
    """Pictures through a checker that looks at each."""
    if "safety_checker" not in bench.kit.pipe().components:
        raise Absent
    looked: list[int] = []

    class Checker(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, images: Any, clip_input: Tensor) -> tuple[Any, list[bool]]:
            looked.append(len(clip_input))
            return images, [False] * len(clip_input)

    def prepare(pipe: Any) -> None:
        pipe.register_modules(
            safety_checker=Checker(), feature_extractor=CLIPImageProcessor(size=8, crop_size=8)
        )

    bench.routed(ROWS[:2], prepare=prepare, output_type="pt")
    assert looked


FEATURES: dict[str, Callable[[Bench], None]] = {
    "`load`, `unload`": load_and_unload,
    "`route` without guidance": partial(rows, guided=False),
    "`route` under guidance": partial(rows, guided=True),
    "negative prompts": negative,
    "several images a prompt": images,
    "step callbacks, an interrupt": callbacks,
    "guidance that changes on the way": changing,
    "safety checker": safety,
}
# What a pipeline has no part in: of each network once.
OF_THE_NETWORK: dict[str, Callable[[Bench], None]] = {
    "strengths: of parts, a sweep": strengths,
    "a mix": mix,
    "other schedulers": schedulers,
    "attention slicing": slicing,
    "model offload": model_offload,
    "sequential offload": sequential_offload,
    "`pipe.to(torch.bfloat16)`": partial(cast, dtype=torch.bfloat16),
    "`merge`, `unmerge`": merge,
    "`speed_up`": speed_up,
}
REFUSED = {"`speed_up`": "the adapter cannot be sped up: the processor of `.*` is `.*`, not `Attn"}
TITLES = {name: name.removesuffix("Pipeline") for name in KITS}


def column(name: str) -> dict[str, str]:
    """Feature -> what became of it in a pipeline. Raises where it is neither right nor refused with
    the message that is known.
    """
    kit, found = KITS[name], {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(kit, Path(folder))
        for feature, run in (FEATURES | OF_THE_NETWORK).items():
            if feature in OF_THE_NETWORK and kit.like:
                found[feature] = ""
                continue
            try:
                run(bench)
                found[feature] = YES
            except Absent:
                found[feature] = NONE
            except ValueError as error:
                if not re.match(REFUSED.get(feature, "$."), str(error)):
                    raise
                found[feature] = NO
            except AssertionError as error:
                raise AssertionError(f"{name}, {feature}: {error}") from error
    return found


def row(feature: str, cells: Sequence[str]) -> str:
    return f"| {feature} | {' | '.join(cells)} |"


def table() -> str:
    columns = {name: column(name) for name in KITS}
    return "\n".join(
        [
            row("", list(TITLES.values())),
            "|---" * (len(KITS) + 1) + "|",
            *(row(f, [found[f] for found in columns.values()]) for f in FEATURES | OF_THE_NETWORK),
        ]
    )


if __name__ == "__main__":
    print(table())
