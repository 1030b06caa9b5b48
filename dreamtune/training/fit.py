"""How many slots fit into a GPU's memory: one and two are tried, the rest is a line."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

from dreamtune.models.base import Base
from dreamtune.models.sample import sample
from dreamtune.training.run import Run
from dreamtune.training.slots import build_step

USABLE = 0.9  # of the memory that is free: pieces between allocations, kernels' workspaces


def largest_wave(base: Base, runs: Sequence[Run]) -> int:
    """The number of runs, at most all, whose step and whose sampling fit at once."""
    if len(runs) < 3:
        return len(runs)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(base.device)
    sampling = peak(base, lambda: one_sampling(base, runs[0]))
    one = peak(base, lambda: one_step(base, runs[:1]))
    two = peak(base, lambda: one_step(base, runs[:2]))
    # a captured step keeps its memory while images are sampled
    return wave_size(free * USABLE - sampling, one, two, len(runs))


def wave_size(room: float, one: float, two: float, most: int) -> int:
    """Slots that fit into `room` where one takes `one` and two take `two`; at least 1."""
    more = max(two - one, 1.0)
    return max(1, min(most, 1 + int((room - one) // more)))


def peak(base: Base, work: Callable[[], None]) -> float:
    """Bytes that `work` needs beyond what is held before it."""
    gc.collect()
    torch.cuda.synchronize(base.device)
    torch.cuda.reset_peak_memory_stats(base.device)
    before = torch.cuda.memory_allocated(base.device)
    work()
    torch.cuda.synchronize(base.device)
    most = torch.cuda.max_memory_allocated(base.device)
    gc.collect()
    torch.cuda.empty_cache()
    return float(most - before)


def one_step(base: Base, runs: Sequence[Run]) -> None:
    for run in runs:
        if not hasattr(run, "cache"):
            run.fill_cache()
    caches, pools = [r.cache for r in runs], [r.pools for r in runs]
    adapter, step = build_step(base, [r.config for r in runs], caches, pools)
    step(0, 1.0)
    adapter.eject()


def one_sampling(base: Base, run: Run) -> None:
    """A batch as large as `sample_batch_size`, in one sampling step."""
    sampling, n = run.evaluator.sampling, run.config.sample_batch_size
    arguments = base.sampling_arguments([run.evaluator.prompts[0]] * n)
    with base.sampling(sampling.sampler, prompts=False) as pipe:
        options = {**sampling.options(), "steps": 1}
        sample(pipe, [""] * n, [0] * n, arguments=arguments, **options)
