"""Where the time of a step goes on a GPU: its kernels by kind, named as torch's libraries do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "products": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|conv|dgrad|wgrad",
    "norms": r"norm",
    "optimizer": r"multi_tensor|adam",
    "copies": r"memcpy|memset|copy|cat|fill",
}
KINDS_AND_OTHER = (*KINDS, "other")


def kind_of(name: str) -> str:
    """The first kind that a kernel's name has a word of; "other" is mostly arithmetic by element.

    >>> kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop"), kind_of("nvjet_tst_128x256")
    ('attention', 'products')
    """
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if re.search(words, lower)), "other")


def kernel_kinds(call: Callable[[], Any]) -> tuple[dict[str, float], list[tuple[float, int, str]]]:
    """Of one call: kind -> milliseconds, and the kernels that take longest: milliseconds, how
    often, name. They may run at once, so the sum can be above the step's time.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    often: Counter[str] = Counter()
    for event in trace.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total / 1e3  # type: ignore[assignment]
            often[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, ms in times.items():
        kinds[kind_of(name)] += ms
    return dict(kinds), [(ms, often[name], name) for name, ms in times.most_common(12)]


def print_kinds(rows: dict[str, tuple[dict[str, float], list[tuple[float, int, str]]]]) -> None:
    """A table of the rows, and the longest kernels of each."""
    print(f"\n| ms of kernels | {' | '.join(KINDS_AND_OTHER)} |")
    print("|---|" + "---|" * len(KINDS_AND_OTHER))
    for row, (kinds, _) in rows.items():
        print(f"| {row} | {' | '.join(f'{kinds.get(k, 0.0):.1f}' for k in KINDS_AND_OTHER)} |")
    for row, (_, longest) in rows.items():
        print(f"\nLongest of {row}:")
        for ms, often, name in longest:
            print(f"{ms:8.2f} ms {often:5d} x {name[:100]}")
