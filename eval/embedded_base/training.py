"""One training loop for every network here: captured step, averaged weights, sharded state."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

SHARD = 15 * 2**20  # bytes; every file of a training state stays under 16 MiB


def autocast(device: torch.device):
    """bf16 on the GPU; the weight cache of autocast must be off inside a captured step."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
    )


class Pool:
    """Examples kept on the device, some made anew in each step: composing costs more than a step.

    Args:
        make: rows (n,) -> tuple of tensors (n, ...), the examples of those rows; capturable.
        size: rows kept.
        refresh: rows replaced by each call of `refresh`.
    """

    def __init__(
        self,
        make: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        size: int,
        refresh: int,
        device,
    ):
        self.make, self.size, self.count, self.device = make, size, refresh, device
        self.at = torch.zeros((), dtype=torch.long, device=device)
        self.tensors: list[torch.Tensor] = []
        for start in range(0, size, 512):
            rows = torch.arange(start, min(start + 512, size), device=device)
            made = make(rows)
            if not self.tensors:
                self.tensors = [
                    torch.zeros(size, *t.shape[1:], dtype=t.dtype, device=device) for t in made
                ]
            for kept, new in zip(self.tensors, made, strict=True):
                kept[rows] = new

    def refresh(self) -> None:
        rows = (self.at + torch.arange(self.count, device=self.device)) % self.size
        for kept, new in zip(self.tensors, self.make(rows), strict=True):
            kept.index_copy_(0, rows, new.contiguous())
        self.at.copy_((self.at + self.count) % self.size)

    def draw(self, n: int) -> list[torch.Tensor]:
        return self.rows(torch.randint(self.size, (n,), device=self.device))

    def rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [kept[rows] for kept in self.tensors]


class Run:
    """A stage's training: modules with learning rates, `steps` in all, resumable from `folder`.

    Args:
        modules: name -> (module, peak learning rate).
        loss: draws its own batch, returns a scalar; called inside the captured step.
        folder: where state shards are written; a finished stage is not trained again.
    """

    def __init__(
        self,
        name,
        modules: dict[str, tuple[nn.Module, float]],
        loss: Callable[[], torch.Tensor],
        *,
        steps: int,
        folder: Path,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        flat=0.3,
        average=0.999,
        after: Callable[[], None] | None = None,
        warm_up=100,
    ):
        self.name, self.modules, self.loss, self.steps, self.folder = (
            name,
            modules,
            loss,
            steps,
            folder,
        )
        self.planned = steps
        self.flat, self.after, self.warm_up, self.average = flat, after, warm_up, average
        self.parameters = [
            p for m, _ in modules.values() for p in m.parameters() if p.requires_grad
        ]
        self.device = self.parameters[0].device
        cuda = self.device.type == "cuda"
        groups = []
        for module, rate in modules.values():
            trained = [p for p in module.parameters() if p.requires_grad]
            for decay, part in (
                (weight_decay, [p for p in trained if p.ndim > 1]),
                (0.0, [p for p in trained if p.ndim < 2]),
            ):
                lr = torch.tensor(rate, device=self.device) if cuda else rate
                groups.append({"params": part, "lr": lr, "weight_decay": decay, "peak": rate})
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=betas, fused=cuda, capturable=cuda
        )
        self.done = 0
        self.restarted = 0
        self.curve: list[tuple[int, float]] = []
        self.load()
        self.ema = (
            [p.detach().clone() for p in self.parameters] if not hasattr(self, "ema") else self.ema
        )

    def _step(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            step = torch._foreach_sub(self.parameters, self.ema)
            torch._foreach_mul_(step, self.blend)
            torch._foreach_add_(self.ema, step)
            if self.after is not None:
                self.after()
        return loss.detach()

    def _schedule(self) -> None:
        """Warm-up, flat, then cosine to zero; a restart without optimizer state warms up again."""
        share = self.done / self.steps
        factor = (
            1.0
            if share < self.flat
            else 0.5 + 0.5 * math.cos(math.pi * (share - self.flat) / (1 - self.flat))
        )
        factor = max(factor, 0.002) * min(1.0, (self.done - self.restarted + 1) / self.warm_up)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(group["peak"] * factor)
            else:
                group["lr"] = group["peak"] * factor
        self.blend.fill_(max(1 - self.average, 1 / (self.done + 2)))

    def _captured(self) -> tuple[Callable[[], None], torch.Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._step()
        return graph.replay, loss

    def train(self, seconds: float = math.inf, fit: bool = False) -> bool:
        """Train until done or `seconds` from now; returns whether the stage is finished.

        With `fit` the schedule shrinks to the steps that fit into `seconds` at the pace seen.
        """
        cuda = self.device.type == "cuda"
        self.blend = torch.zeros((), device=self.device)
        self._schedule()
        begin = time.time()
        if cuda and self.done < self.steps:
            replay, loss = self._captured()
            print(f"[{self.name}] captured after {time.time() - begin:.1f} s", flush=True)
        mean, seen, start, lap = 0.0, 0, time.time(), time.time()
        while self.done < self.steps and time.time() - begin < seconds:
            self._schedule()
            if cuda:
                replay()
            else:
                loss = self._step()
            self.done += 1
            seen += 1
            if self.done % 20 == 0:  # a sync, so rare
                value = float(loss)
                if not math.isfinite(value):
                    raise FloatingPointError(f"{self.name}: loss {value} at step {self.done}")
                mean = value if mean == 0 else mean * 0.95 + value * 0.05
            if fit and seen % 100 == 0:
                pace, lap = (time.time() - lap) / 100, time.time()
                left = int((seconds - 4 - (time.time() - begin)) / pace)
                self.steps = min(self.planned, self.done + max(left, 1))
            if self.done % 500 == 0 or seen in (100, 200) or self.done == self.steps:
                rate = (time.time() - start) / seen * 1e3
                self.curve.append((self.done, round(mean, 5)))
                print(
                    f"[{self.name}] {self.done}/{self.steps} loss {mean:.4f} {rate:.1f} ms/step "
                    f"{time.time() - begin:.0f} s",
                    flush=True,
                )
        if cuda:
            torch.cuda.synchronize()
        self.save()
        return self.done >= self.steps

    def swap_in_average(self) -> None:
        """Put the averaged weights into the modules."""
        with torch.no_grad():
            for p, q in zip(self.parameters, self.ema, strict=True):
                p.copy_(q)

    def save(self) -> None:
        """Weights and their average, fp16 shards; the optimizer warms up again after a restart."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, (module, _) in self.modules.items():
            for key, value in module.state_dict().items():
                tensors[f"now.{name}.{key}"] = value
        tensors |= {f"average.{i}": p for i, p in enumerate(self.ema)}
        shards: list[dict[str, torch.Tensor]] = [{}]
        size = 0
        for key, value in tensors.items():
            value = (value.half() if value.is_floating_point() else value).contiguous().cpu()
            if size + value.nbytes > SHARD:
                shards.append({})
                size = 0
            shards[-1][key] = value
            size += value.nbytes
        for old in self.folder.glob(f"{self.name}-*.safetensors"):
            old.unlink()
        for i, shard in enumerate(shards):
            save_file(shard, self.folder / f"{self.name}-{i}.safetensors")
        state = {"done": self.done, "steps": self.steps, "shards": len(shards), "curve": self.curve}
        partial = self.folder / f"{self.name}.json.part"
        partial.write_text(json.dumps(state))
        os.replace(partial, self.folder / f"{self.name}.json")

    def load(self) -> None:
        path = self.folder / f"{self.name}.json"
        if not path.is_file():
            return
        state = json.loads(path.read_text())
        tensors = {}
        for i in range(state["shards"]):
            tensors |= load_file(
                self.folder / f"{self.name}-{i}.safetensors", device=str(self.device)
            )
        for name, (module, _) in self.modules.items():
            prefix = f"now.{name}."
            module.load_state_dict(
                {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            )
        self.ema = [tensors[f"average.{i}"].float() for i in range(len(self.parameters))]
        self.done = self.restarted = min(state["done"], self.steps)
        self.curve = [tuple(c) for c in state["curve"]]


def restore(name: str, modules: dict[str, nn.Module], folder: Path) -> None:
    """The averaged weights of a stage, into its modules, ready for use.

    Raises:
        FileNotFoundError: the stage has not been trained yet.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"stage {name!r} has left no state in {folder}; run it first")
    run = Run(
        name,
        {k: (m, 0.0) for k, m in modules.items()},
        lambda: torch.zeros(()),
        steps=1,
        folder=folder,
    )
    run.swap_in_average()
    for module in modules.values():
        module.eval().requires_grad_(False)
