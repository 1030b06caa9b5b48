"""The training step as one CUDA graph: the eager step is bound by launching its kernels one by one,
a replay launches them all.
"""

from __future__ import annotations

import gc
import importlib
from typing import Any

import torch
from torch import Tensor

from dreamtune.step import Step

WARM_UP = 3  # steps, so that libraries have made their workspaces and chosen their kernels


def reason_against(device: torch.device, gradient_checkpointing: bool = False) -> str | None:
    """Why a step here cannot be captured, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, this is {device.type}"
    if not hasattr(torch.cuda.CUDAGraph, "register_generator_state"):
        return f"torch {torch.__version__} cannot register generators with a CUDA graph"
    if gradient_checkpointing:
        return "gradient checkpointing saves the state of random generators, which a graph cannot"
    return None


def choose(option: str, value: str, against: str | None) -> bool:
    """Whether to, of `value` auto, on or off. ValueError for "on" where it cannot be."""
    if value == "on" and against is not None:
        raise ValueError(f"`{option}` is on, but {against}. Use auto or off.")
    return value != "off" and against is None


class CapturedStep:
    """`captured(k, factor)` is `step(k, factor)` by the replay of a CUDA graph.

    Captured at the first call, after warm-up steps whose effect is undone. The random numbers are
    those of the eager step: its generators are registered with the graph and seeded before every
    replay.

    The graph holds the addresses of everything that a step reads: after the first call parameters,
    weights, cache and optimizer state may be changed in place, not replaced.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.graph: Any = None
        self._addresses: list[int] = []

    def __call__(self, k: int, factor: float) -> None:
        if self.graph is None:
            self.graph = self._capture(k, factor)
            self._addresses = self._where()
        elif self._where() != self._addresses:
            raise RuntimeError(
                "parameters, optimizer state or the cache were replaced after the step was captured"
            )
        self.step.prepare(k, factor)
        self.graph.replay()
        # autograd saw nothing of the replay; what is cached by version must be computed again
        for p in self.step.optimizer.params:
            _increment_version(p)

    def _where(self) -> list[int]:
        cache = self.step.cache
        read = [cache.mean, cache.prompts, self.step.alpha_bar, *self._changing()]
        return [t.data_ptr() for t in read]

    def _changing(self) -> list[Tensor]:
        """What a step changes."""
        return [*self.step.optimizer.params, *self.step.state_dict().values()]

    def _capture(self, k: int, factor: float) -> Any:
        step, changing = self.step, self._changing()
        device = changing[0].device
        with torch.cuda.device(device):
            before = [t.detach().clone() for t in changing]
            # One stream for both: autograd runs a parameter's gradient on the stream that it was
            # first used on.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    step.prepare(k, factor)
                    step.body()
                with torch.no_grad():
                    for t, old in zip(changing, before, strict=True):
                        t.copy_(old)
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.synchronize(device)
            del before
            return self._record(stream, k, factor)

    def _record(self, stream: torch.cuda.Stream, k: int, factor: float) -> Any:
        graph = torch.cuda.CUDAGraph()
        for generator in self.step.generators:
            graph.register_generator_state(generator)
        self.step.prepare(k, factor)
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # what a collection would free now could end the capture
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.step.body()
        except RuntimeError as error:
            first = error.__context__ or error
            raise RuntimeError(
                f"the training step could not be captured as a CUDA graph: {first}. Start again "
                "with --capture off (or `capture: off`)"
            ) from error
        finally:
            if collecting:
                gc.enable()
        return graph


# by name: the stubs of some torch versions lack it
_increment_version: Any = importlib.import_module("torch.autograd.graph").increment_version
