"""Checkouts of dreamtune beside each other in one process: the captured step of each method, the
stacked step of each, and a pipeline's eager call of the UNet with an adapter, in turns.

    python eval/speed/versions.py BEFORE AFTER --slots 8,16 --calls 4,8     # on a GPU
    python eval/speed/versions.py BEFORE AFTER --unet tiny --rank 8    # on the CPU: a check

Each checkout runs by its own package and its own `eval/speed/step.py` and `stacked.py`, so what is
between them may differ. Ratios are to the first; name it twice to see what equal code gives.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch


class Checkout:
    """A folder's package and helpers, apart from those of other folders.

    Inside `with checkout.active():` the modules that an import finds are its own. Whatever of it
    runs must run inside: functions import as they go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        if not (self.folder / "eval" / "speed" / "step.py").is_file():
            raise ValueError(f"`{folder}` is no checkout: it has no eval/speed/step.py")
        self.modules: dict[str, ModuleType] = {}
        places = (".", "eval", "eval/speed")
        self.path = [str(self.folder / place) for place in reversed(places)]
        with self.active():
            self.step = importlib.import_module("step")
            self.stacked = importlib.import_module("stacked")
            found = importlib.import_module("dreamtune").__file__
        if self.folder not in Path(str(found)).parents:
            raise RuntimeError(f"{found} was imported, which is not in {self.folder}")

    def owns(self, name: str, module: Any) -> bool:
        file = getattr(module, "__file__", None)
        inside = file is not None and self.folder in Path(file).resolve().parents
        return inside or name.partition(".")[0] == "dreamtune"

    @contextmanager
    def active(self) -> Iterator[None]:
        before, others = list(sys.path), set(sys.modules)
        here = Path(__file__).resolve().parent  # whose helpers are none of theirs
        sys.path[:] = [*self.path, *(p for p in before if Path(p).resolve() != here)]
        sys.modules.update(self.modules)
        try:
            yield
        finally:
            new = [name for name in sys.modules if name not in others]
            for name in new:
                if self.owns(name, sys.modules[name]):
                    self.modules[name] = sys.modules.pop(name)
            sys.path[:] = before

    def alone(self, method: str, args: argparse.Namespace) -> Callable[[], None]:
        """A captured step with factors of --rank, as `methods.py` has it."""
        call: Callable[[], None] = self.step.make_call(
            f"equal-{method}", self.step.make_unet(args), args.batch, args
        )
        return call

    def together(self, method: str, slots: int, args: argparse.Namespace) -> Callable[[], None]:
        """A captured step of different adapters, as `stacked.py` has it."""
        step = self.stacked.make_step(self.step.make_unet(args), method, slots, args.batch)[1]
        run: Any = self.stacked.CapturedStep(step) if args.cuda else step
        counter = iter(range(10**9))
        return lambda: run(next(counter), 1.0)

    def pipeline_call(self, method: str, rows: int, args: argparse.Namespace) -> Callable[[], None]:
        """Of the UNet with an adapter, sped up where that is to be asked for; no method: the base.

        The layers are what `inject` and `load` leave; no factors are computed anew.
        """
        unet = self.step.make_unet(args).requires_grad_(False).eval()
        if method:
            adapter = self.step.make_step.__globals__["inject"](unet, method)
            getattr(adapter, "speed_up", lambda: None)()
        kind: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype}
        c = unet.config
        x = torch.randn(rows, c.in_channels, c.sample_size, c.sample_size, **kind)
        text = torch.randn(rows, 77, c.cross_attention_dim, **kind)
        t = torch.tensor(500, device=unet.device)

        @torch.no_grad()
        def call() -> None:
            unet(x, t, text, return_dict=False)

        return call


def now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(
    checkouts: Sequence[Checkout], calls: Sequence[Callable[[], None]], args: argparse.Namespace
) -> list[list[float]]:
    """Milliseconds a step in each turn of each; a turn is --steps steps, waited for at its end."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(args.rounds + 1):
        for checkout, call, turns in zip(checkouts, calls, times):
            with checkout.active():
                began = now(args.cuda)
                for _ in range(args.steps):
                    call()
                if number:  # the first turn warms up, and captures
                    turns.append((now(args.cuda) - began) / args.steps * 1e3)
    return times


def row(
    name: str,
    checkouts: Sequence[Checkout],
    make: Callable[[Checkout], Callable[[], None]],
    args: argparse.Namespace,
) -> str:
    """A line of the table; ratios are medians of those of each round."""
    gc.collect()
    if args.cuda:
        torch.cuda.empty_cache()
    calls = []
    for checkout in checkouts:
        with checkout.active():
            calls.append(make(checkout))
    times = in_turns(checkouts, calls, args)
    ms = " | ".join(f"{median(turns):.2f}" for turns in times)
    ratios = []
    for turns in times[1:]:
        each = sorted(a / b for a, b in zip(turns, times[0]))
        low, high = each[len(each) // 4], each[-1 - len(each) // 4]
        ratios.append(f"{median(each):.4f} ({low:.4f} to {high:.4f})")
    return f"| {name} | {ms} | {' | '.join(ratios)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="CHECKOUT")
    parser.add_argument("--unet", default="sd15", choices=("sd15", "embedded", "small", "tiny"))
    parser.add_argument("--methods", default="lora,delora,ether,ether+", help='"" for none')
    parser.add_argument("--slots", default="8,16", help='of the stacked steps; "" for none')
    parser.add_argument("--stacked", default="delora", help="methods of the stacked steps")
    parser.add_argument("--calls", default="", help="rows of a pipeline's call; one or several")
    parser.add_argument("--called", default="delora", help="methods of the calls; base for none")
    parser.add_argument("--rank", type=int, default=16, help="of the factors")
    parser.add_argument("--batch", type=int, default=1, help="rows a slot")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if len(args.folders) < 2:
        parser.error(f"takes two checkouts or more, got {len(args.folders)}")
    if args.rank % 4:
        parser.error(f"--rank must be a multiple of 4, got {args.rank}")
    args.cuda = args.device.startswith("cuda")
    args.block = 8 if args.unet == "tiny" else 32  # `step.py` reads it
    checkouts = [Checkout(folder) for folder in args.folders]
    print(torch.cuda.get_device_name() if args.cuda else "CPU", "torch", torch.__version__)
    for number, checkout in enumerate(checkouts):
        print(f"{number}: {checkout.folder.name}")
    print(f"factors of rank {args.rank}, {args.batch} rows a slot, {args.rounds} turns; ratios:")
    print("the median of those of each turn, and its quartiles\n")
    numbers = range(len(checkouts))
    heads = [f"{n}, ms" for n in numbers] + [f"{n} / 0" for n in numbers if n]
    print(f"| step | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for method in filter(None, args.methods.split(",")):
        print(row(method, checkouts, lambda c, m=method: c.alone(m, args), args), flush=True)
    for method in args.stacked.split(","):
        for slots in map(int, filter(None, args.slots.split(","))):
            name = f"{method}, {slots} slots"
            make = lambda c, m=method, s=slots: c.together(m, s, args)  # noqa: E731
            print(row(name, checkouts, make, args), flush=True)
    for method in args.called.split(","):
        for rows in map(int, filter(None, args.calls.split(","))):
            named = "" if method == "base" else method
            make = lambda c, m=named, r=rows: c.pipeline_call(m, r, args)  # noqa: E731
            print(row(f"call of {rows} rows, {method}", checkouts, make, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
