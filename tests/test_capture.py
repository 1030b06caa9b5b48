"""The captured step: the same as the eager one, resumable, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import make
from test_train import scorer_names, settings  # noqa: F401  (fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

from dreamtune import METHODS
from dreamtune.capture import CapturedStep, choose, reason_against
from dreamtune.config import Config
from dreamtune.run import Run
from dreamtune.train import Interrupted, train

STEPS = 50
# Parameters and losses of float64 runs, relative to the largest: the same kernels run, only the
# order of sums in some of them is not fixed.
TOLERANCE = 1e-8

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(method: str, slots: list[int], **options: Any) -> tuple[Any, Any]:
    return make(method, slots, device="cuda", **options)


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-12)).item() for n in a)


@needs_cuda
@pytest.mark.parametrize("method", ["lora", "delora", "ether", "ether+"])
@pytest.mark.parametrize("slots", [[0], [0, 1, 2]])
def test_captured_equals_eager(method: str, slots: list[int]) -> None:
    """Parameters, losses, skipped steps; with prior, clipping, accumulation and a schedule."""
    eager_adapter, eager = on_cuda(method, slots, accumulation=2)
    adapter, step = on_cuda(method, slots, accumulation=2)
    captured = CapturedStep(step)
    for k in range(STEPS):
        eager(k, 1 - k / STEPS)
        captured(k, 1 - k / STEPS)
    for slot in range(len(slots)):
        assert gap(adapter.state_dict(slot), eager_adapter.state_dict(slot)) < TOLERANCE
    assert gap(step.state_dict(), eager.state_dict()) < TOLERANCE


@needs_cuda
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


@needs_cuda
def test_what_is_cached_by_version_sees_the_replay() -> None:
    """Sampling between replays must not use the factors of the sampling before."""
    adapter, step = on_cuda("delora", [0])
    captured = CapturedStep(step)
    cache = step.cache
    row = (cache.mean[:1], torch.zeros(1, device="cuda").long(), cache.prompts[:1])
    said = []
    for k in range(3):
        captured(k, 1.0)
        with torch.no_grad():
            said.append(step.unet(*row, return_dict=False)[0])
    assert not torch.equal(said[0], said[1]) and not torch.equal(said[1], said[2])
    with torch.no_grad():
        adapter.refresh()
        assert torch.equal(step.unet(*row, return_dict=False)[0], said[2])


@needs_cuda
def test_a_replaced_parameter_is_an_error() -> None:
    _, step = on_cuda("lora", [0])
    captured = CapturedStep(step)
    captured(0, 1.0)
    step.optimizer.params[0].data = step.optimizer.params[0].data.clone()
    with pytest.raises(RuntimeError, match="were replaced after the step was captured"):
        captured(1, 1.0)


@needs_cuda
@pytest.mark.parametrize("capture", ["on", "off"])
def test_killed_and_resumed_equals_whole(
    settings: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    capture: str,
) -> None:
    """To what kernels without a fixed order of sums leave: a second whole run says how much."""
    common = {**settings, "device": "cuda", "mixed_precision": "no", "capture": capture}
    whole = train(Config(**common))
    again = train(Config(**{**common, "output_dir": str(tmp_path / "again")}))
    broken = {**common, "output_dir": str(tmp_path / "second")}
    original, calls = Run.step, []

    def step(self: Run, k: int, factor: float) -> None:
        calls.append(k)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self, k, factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        with pytest.raises(Interrupted):
            train(Config(**broken))
    second = train(Config(**broken, resume_from_checkpoint="latest"))
    from safetensors.torch import load_file

    ends = [load_file(r.run_dir / "adapter.safetensors") for r in (whole, again, second)]
    assert gap(ends[2], ends[0]) < max(1e-3, 5 * gap(ends[1], ends[0]))


def test_what_cannot_be_captured_says_why() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "CUDA device" in (reason_against(cpu) or "")
    if torch.backends.cuda.is_built():
        assert reason_against(gpu) is None
    assert "checkpointing" in (reason_against(gpu, gradient_checkpointing=True) or "")
    assert choose("capture", "auto", None) and not choose("capture", "off", None)
    assert not choose("capture", "auto", "why")
    with pytest.raises(ValueError, match="`capture` is on, but CUDA graphs need a CUDA device"):
        choose("capture", "on", reason_against(cpu))


def test_capture_is_refused_before_any_work(
    settings: dict[str, Any],  # noqa: F811
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


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("slots", [[0], [0, 1, 2]])
def test_a_step_asks_nothing_of_the_device(method: str, slots: list[int]) -> None:
    """Checked on the CPU, where the step is the same function."""
    _, step = make(method, slots, accumulation=2, loss_scale=1024.0)
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
