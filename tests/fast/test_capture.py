"""The captured step: the same as the eager one, resumable, and refused where it cannot be."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import make
from tiny import unet_inputs, xl_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from dreamtune import METHODS
from dreamtune.config import Config
from dreamtune.fast.graphs import CapturedForward, CapturedStep, switched, why_not_captured
from dreamtune.training.run import Run
from dreamtune.training.train import Interrupted, train
from dreamtune.training.wave import Wave

STEPS = 50
# Parameters and losses of float64 runs, relative to the largest: the same kernels run, only the
# order of sums in some of them is not fixed.
TOLERANCE = 1e-8


def on_cuda(method: str, slots: list[int], **options: Any) -> tuple[Any, Any]:
    return make(method, slots, device="cuda", **options)


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-12)).item() for n in a)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "xl"),
    [*((m, False) for m in ("lora", "delora", "ether", "ether+", "oft")), ("delora", True)],
)
@pytest.mark.parametrize("slots", [[0], [0, 1, 2]])
def test_captured_equals_eager(method: str, xl: bool, slots: list[int]) -> None:
    """Parameters, losses, skipped steps; with prior, clipping, accumulation and a schedule."""
    eager_adapter, eager = on_cuda(method, slots, xl=xl, gradient_accumulation_steps=2)
    adapter, step = on_cuda(method, slots, xl=xl, gradient_accumulation_steps=2)
    captured = CapturedStep(step)
    for k in range(STEPS):
        eager(k, 1 - k / STEPS)
        captured(k, 1 - k / STEPS)
    for slot in range(len(slots)):
        assert gap(adapter.state_dict(slot), eager_adapter.state_dict(slot)) < TOLERANCE
    assert gap(step.state_dict(), eager.state_dict()) < TOLERANCE


@pytest.mark.gpu
def test_warm_up_leaves_no_trace_and_replays_differ() -> None:
    _, step = on_cuda("delora", [0])
    captured = CapturedStep(step)
    losses = []
    for k in range(4):
        captured(k, 1.0)
        losses.append(step.loss.item())
    assert step.optimizer.count.item() == 4 and step.loss_count.item() == 4
    assert len(set(losses)) == 4  # each replay draws anew
    captured(3, 1.0)
    assert step.optimizer.count.item() == 5


@pytest.mark.gpu
def test_what_is_cached_by_version_sees_the_replay() -> None:
    """Sampling between replays must not use the factors of the sampling before."""
    adapter, step = on_cuda("delora", [0])
    captured = CapturedStep(step)
    cache = step.cache
    row = (cache.mean[:1], torch.zeros(1, device="cuda").long(), cache.prompts["prompt_embeds"][:1])
    said = []
    for k in range(3):
        captured(k, 1.0)
        with torch.no_grad():
            said.append(adapter.model(*row, return_dict=False)[0])
    assert not torch.equal(said[0], said[1]) and not torch.equal(said[1], said[2])
    with torch.no_grad():
        adapter.refresh()
        assert torch.equal(adapter.model(*row, return_dict=False)[0], said[2])


@pytest.mark.gpu
def test_a_step_is_captured_after_eager_ones() -> None:
    eager_adapter, eager = on_cuda("delora", [0])
    adapter, step = on_cuda("delora", [0])
    captured = CapturedStep(step)
    for k in range(6):
        eager(k, 1.0)
        (step if k < 3 else captured)(k, 1.0)
    assert gap(adapter.state_dict(), eager_adapter.state_dict()) < TOLERANCE


class Repeated(CapturedForward):
    """Where there is no GPU: a replay runs the forward that was recorded, into the same places."""

    recorded = 0

    def _capture(self, run: Any, device: torch.device) -> Any:
        leaves, spec = run()
        self.recorded += 1

        def replay() -> None:
            for place, x in zip(leaves, run()[0], strict=True):
                place.copy_(x)

        return replay, (leaves, spec)


def test_memory_is_renewed_once_graphs_are_gone_and_not_before() -> None:
    """What a step was recorded into before the first pictures stays that of both."""
    adapter, step = make("delora", [0])
    step(0, 1.0)
    forward = Repeated(adapter)
    of_step = forward.pool.handle
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    given = x, torch.tensor(3.0), torch.randn(2, 5, 24, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad(), forward.installed():
            for _ in range(2):
                adapter.model(*given, return_dict=False)
        assert forward.pool.handle == of_step and forward.recorded == 1
    moved = next(adapter.model.parameters())
    moved.data = moved.data.clone()
    with torch.no_grad(), forward.installed():
        assert forward.pool.handle != of_step and not forward.graphs


@pytest.mark.parametrize("kind", [Repeated, pytest.param(CapturedForward, marks=pytest.mark.gpu)])
def test_a_forward_that_is_told_more_is_replayed(kind: type[CapturedForward]) -> None:
    """XL's, with a dictionary of tensors: one graph a shape, whatever is in them."""
    device = "cpu" if kind is Repeated else "cuda"
    adapter, step = make("delora", [0], device=device, xl=True)
    step(0, 1.0)
    forward, seen = kind(adapter), []
    for seed in range(5):
        (x, t, text), more = xl_inputs(2 + seed % 2, torch.float64)
        added = {n: (v + seed).to(device) for n, v in more["added_cond_kwargs"].items()}  # type: ignore[attr-defined]
        given = [z.to(device) for z in (x, t[0] + seed, text)]
        with torch.no_grad():
            wanted = adapter.model(*given, added_cond_kwargs=added, return_dict=False)[0]
            with forward.installed():
                found = adapter.model(*given, added_cond_kwargs=added, return_dict=False)[0]
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
        seen.append(found)
    assert not torch.equal(seen[0], seen[2])
    assert [g is not None for g in forward.graphs.values()] == [True, True]
    if isinstance(forward, Repeated):
        assert forward.recorded == 2
    with torch.no_grad(), forward.installed():  # a number, and an object: as they are
        adapter.model(given[0], 3, given[2], added_cond_kwargs=added, return_dict=False)
        adapter.model(*given, added_cond_kwargs=added, return_dict=True)
    assert len(forward.graphs) == 2


def said_by(adapter: Any, batch: int, route: list[int] | None) -> torch.Tensor:
    device = adapter.groups[0].weight.device
    x, t, text = (z.to(device) for z in unet_inputs(batch, torch.float64))
    rows = None if route is None else torch.tensor(route, device=device)
    adapter.route(rows)
    with torch.no_grad():
        said: torch.Tensor = adapter.model(x, t[0], text, return_dict=False)[0]
    adapter.route(None)
    return said


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "delora", "ether", "ether+"])
@pytest.mark.parametrize("slots, routes", [([0], [None]), ([0, 1, 2], [[2, 0, 1], [1, 1, 0]])])
def test_replayed_forward_equals_eager(
    method: str, slots: list[int], routes: list[list[int] | None]
) -> None:
    """Between steps, for other strengths, routes and batch sizes, in a pool with the step."""
    adapter, step = on_cuda(method, slots)
    forward = CapturedForward(adapter)
    captured = CapturedStep(step, forward.pool)
    for k in range(4):
        captured(k, 1.0)
        for scale in (1.0, 0.5):
            adapter.scale = scale
            for route in routes:
                batch = 3 if route else 1 + k % 2
                plain = said_by(adapter, batch, route)
                with forward.installed():
                    again = [said_by(adapter, batch, route) for _ in range(3)]
                assert all(torch.allclose(x, plain, rtol=1e-9, atol=1e-12) for x in again)
        adapter.scale = 1.0
    kept = [g for g in forward.graphs.values() if g is not None]
    assert len(kept) == (1 if len(slots) > 1 else 2)
    assert "forward" not in adapter.model.__dict__


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("slots, route", [([0], None), ([0, 1, 2], [2, 0, 1])])
def test_factors_stay_where_a_recorded_forward_reads_them(
    method: str, slots: list[int], route: list[int] | None
) -> None:
    adapter, step = make(method, slots)
    places, said = [], []
    for k in range(2):
        step(k, 1.0)
        said.append(said_by(adapter, 3, route))
        parts = [part for group in adapter.groups for part in group.stack.parts]
        read = [p.wide and (p.wide.flat, p.wide.up) or p.factors for p in parts]
        places.append([x.data_ptr() for some in read for x in some if x is not None])
    assert places[0] == places[1] and not torch.equal(said[0], said[1])


def test_a_refresh_lets_go_of_the_graph_before() -> None:
    """Else its gradients decide on which stream those of the next step run."""
    adapter, _ = make("delora", [0])
    adapter.refresh()
    before = weakref.ref(adapter.groups[0].stack.parts[0].factors.up)
    seen: list[Any] = []
    original = type(adapter.groups[0].adapter).factors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(adapter.groups[0].adapter), "factors",
            lambda self, *given: seen.append(before()) or original(self, *given),
        )  # fmt: skip
        adapter.refresh()
    assert seen and all(x is None for x in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "oft"])
def test_forward_and_backward_share_a_thread_and_so_its_workspaces(method: str) -> None:
    _, step = on_cuda(method, [0])
    predict, threads = step.predict, []

    def seen(*given: Any) -> torch.Tensor:
        y: torch.Tensor = predict(*given)
        y.register_hook(lambda _: threads.append(threading.get_ident()))
        return y

    step.predict = seen
    CapturedStep(step)(0, 1.0)
    assert set(threads) == {threading.get_ident()}


@pytest.mark.gpu
def test_a_replaced_parameter_is_an_error() -> None:
    _, step = on_cuda("lora", [0])
    captured = CapturedStep(step)
    captured(0, 1.0)
    step.optimizer.params[0].data = step.optimizer.params[0].data.clone()
    with pytest.raises(RuntimeError, match="were replaced after the step was captured"):
        captured(1, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["on", "off"])
def test_killed_and_resumed_equals_whole(
    settings: dict[str, Any],
    tmp_path: Path,
    capture: str,
) -> None:
    """To what kernels without a fixed order of sums leave: a second whole run says how much."""
    common = {**settings, "device": "cuda", "mixed_precision": "no", "capture": capture}
    whole = train(Config(**common))
    again = train(Config(**{**common, "output_dir": str(tmp_path / "again")}))
    broken = {**common, "output_dir": str(tmp_path / "second")}
    original, calls = Wave.advance, []

    def advance(self: Wave, k: int) -> None:
        calls.append(k)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self, k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wave, "advance", advance)
        with pytest.raises(Interrupted):
            train(Config(**broken))
    second = train(Config(**broken, resume_from_checkpoint="latest"))
    from safetensors.torch import load_file

    ends = [load_file(r.run_dir / "adapter.safetensors") for r in (whole, again, second)]
    assert gap(ends[2], ends[0]) < max(1e-3, 5 * gap(ends[1], ends[0]))


def test_what_cannot_be_captured_says_why() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "CUDA device" in (why_not_captured(cpu) or "")
    if torch.backends.cuda.is_built():
        assert why_not_captured(gpu) is None
    assert "checkpointing" in (why_not_captured(gpu, gradient_checkpointing=True) or "")
    assert switched("capture", "auto", None) and not switched("capture", "off", None)
    assert not switched("capture", "auto", "why")
    with pytest.raises(ValueError, match="`capture` is on, but CUDA graphs need a CUDA device"):
        switched("capture", "on", why_not_captured(cpu))


def test_capture_is_refused_before_any_work(
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="`capture` is on"):
        Run(Config(**{**settings, "device": "cpu", "capture": "on"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value, word", [(True, "on"), (False, "off"), ("auto", "auto")])
def test_yaml_booleans_are_words(value: object, word: str) -> None:
    assert Config(capture=value).capture == word  # type: ignore[arg-type]


# They copy between host and device, or wait to learn a shape: no CUDA graph can hold them.
FORBIDDEN = {
    "_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal",
    "unique_consecutive", "_unique2", "bincount", "item",
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Notes the operators that a capture forbids, and how many there are in all."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bad = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.count += 1
        if name in FORBIDDEN:
            self.bad.add(name)
        indices = args[1] if name.startswith("index") and len(args) > 1 else None
        if isinstance(indices, (list, tuple)) and any(
            t is not None and t.dtype == torch.bool for t in indices
        ):
            self.bad.add(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "xl"), [*((method, False) for method in METHODS), ("delora", True)]
)
@pytest.mark.parametrize("slots", [[0], [0, 1, 2]])
def test_a_step_asks_nothing_of_the_device(method: str, xl: bool, slots: list[int]) -> None:
    """Checked on the CPU, where the step is the same function."""
    _, step = make(method, slots, xl=xl, gradient_accumulation_steps=2, loss_scale=1024.0)
    step(0, 1.0)
    step.prepare(1, 1.0)
    # a tensor made without naming the device would be on `meta`, and fail where it is used
    with torch.device("meta"), Calls() as calls:
        step.body()
    assert calls.count > 1000 and not calls.bad


def test_the_optimizer_takes_few_kernels() -> None:
    """However many parameters there are."""
    _, step = make("delora", [0])
    step(0, 1.0)
    ok = step.loss.isfinite()
    with Calls() as calls:
        flats = step.optimizer.gather(step.optimizer.params)
        step.optimizer.step(flats, step.loss * 0 + 1, ok)
    assert calls.count < 250  # views included
