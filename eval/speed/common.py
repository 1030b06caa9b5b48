"""What the measurements share: a training step on random latents, and clocks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]

import flow_models  # noqa: E402
from random_models import build_unet  # noqa: E402, F401

from dreamtune.fast import fuse  # noqa: E402
from dreamtune.injection.inject import inject  # noqa: E402
from dreamtune.models import stable_diffusion, stable_diffusion_xl  # noqa: E402
from dreamtune.models.base import Process  # noqa: E402
from dreamtune.models.diffusion import Diffusion  # noqa: E402
from dreamtune.models.quiet import quiet_diffusers  # noqa: E402
from dreamtune.training.cache import Cache  # noqa: E402
from dreamtune.training.optim import SlotAdamW  # noqa: E402
from dreamtune.training.step import Step, StepSettings  # noqa: E402

TOKENS = 77


def pooled_width(unet: Any) -> int:
    """Numbers of pooled text that SDXL's UNet is told beside six sizes; 0 for other UNets."""
    config = unet.config
    if config.addition_embed_type != "text_time":
        return 0
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def sizes(unet: Any, rows: int) -> torch.Tensor:
    """(rows, 6) of square pictures that were not cropped."""
    side = unet.config.sample_size * 8.0
    return torch.tensor([[side, side, 0, 0, side, side]] * rows)


def make_cache(
    unet: Any, entries: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Cache:
    """Random latents with a spread, and random prompts, of the UNet's shapes."""
    g = torch.Generator().manual_seed(seed)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    shape = (entries, unet.config.in_channels, side, side)
    mean = torch.randn(shape, generator=g)
    prompts = torch.randn(entries, TOKENS, width, generator=g)
    caption = torch.arange(entries)
    told, pictures = {"prompt_embeds": prompts}, {}
    if pooled := pooled_width(unet):
        told["pooled_prompt_embeds"] = torch.randn(entries, pooled, generator=g)
        pictures["time_ids"] = sizes(unet, entries).to(device)
    return Cache(
        mean.to(device, dtype), torch.full_like(mean, 0.1).to(device, dtype), caption.to(device),
        {name: x.to(device, dtype) for name, x in told.items()}, pictures,
    )  # fmt: skip


def task(
    network: Any, entries: int, device: str, dtype: torch.dtype
) -> tuple[Callable[..., torch.Tensor], Process, Cache]:
    """What a `Step` takes: the prediction, noise and target, and random entries in `dtype`."""
    if flow := flow_models.flow_of(network):
        cache = flow.cache(entries, device, dtype)
        return flow.predictor(network), flow.process(), cache
    family = stable_diffusion_xl if pooled_width(network) else stable_diffusion
    alpha_bar = torch.linspace(0.999, 0.005, 1000, device=device, dtype=dtype)
    predict = partial(family.predict, network, next(network.parameters()).dtype)
    return predict, Diffusion(alpha_bar), make_cache(network, entries, device, dtype)


def make_step(
    unet: Any,
    method: str,
    slots: int = 1,
    batch: int = 1,
    cache_dtype: torch.dtype = torch.float32,
    fused: bool | None = None,
    compiled: bool = False,
    **options: Any,
) -> tuple[Any, Step]:
    """Our adapter and training step on `unet`; each slot draws from five entries of its own. fused:
    None is the trainer's default, on a GPU.
    """
    weight = next(unet.parameters())
    device = str(weight.device)
    entries = max(5, batch)
    predict, process, cache = task(unet, entries * slots, device, cache_dtype)
    adapter = inject(
        unet,
        method,
        slots=slots,
        target_modules=flow_models.targets(unet),
        seed=list(range(slots)),
        _fast=True,
        **options,
    )
    if fused or (fused is None and weight.device.type == "cuda"):
        with quiet_diffusers():
            fuse.fuse(unet)
    if compiled:
        fuse.compile_blocks(unet)
    unet.eval()  # as the trainer does
    groups = [adapter.parameter_groups(None, 0.01) for _ in range(slots)]
    pools = [[torch.arange(entries, device=device) + s * entries for s in range(slots)]]
    settings = StepSettings(train_batch_size=batch)
    seeds = list(range(slots))
    return adapter, Step(predict, SlotAdamW(groups), cache, pools, process, seeds, settings)


def now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def median_ms(call: Callable[[], Any], cuda: bool, repeats: int, warm_up: int = 2) -> float:
    """Median milliseconds of a call, the device waited for after each."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        began = now(cuda)
        call()
        times.append(now(cuda) - began)
    return median(times) * 1e3


def count_kernels(call: Callable[[], Any], cuda: bool) -> int:
    """Kernels on the GPU in one call; on the CPU the calls of operators, for want of kernels."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as trace:
        call()
        now(cuda)
    events = trace.events() or []
    if not cuda:
        return len(events)
    device = torch.autograd.DeviceType.CUDA
    kernels = [e for e in events if e.device_type == device]
    return len([e for e in kernels if not e.name.startswith(("Memcpy", "Memset"))])


def count_products(call: Callable[[], Any]) -> int:
    """Floating-point operations of one call's matrix products, convolutions and attention; on a
    CPU without those of its fused attention, which torch does not count.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def product_ceiling(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product of two square matrices, the median of
    several.
    """
    cuda = device.startswith("cuda")
    side, products = (8192, 10) if cuda else (512, 2)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    ms = median_ms(lambda: [a @ b for _ in range(products)], cuda, 7)
    return 2 * side**3 * products / (ms / 1e3)


def frozen(unet: nn.Module) -> nn.Module:
    return unet.requires_grad_(False)
