"""What the step is compared with: PEFT's adapters, LyCORIS' with its own kernels, and the dense
forms of the released code.

Written so as to favour them: PEFT's and LyCORIS' adapters in the UNet's dtype, no clipping, nothing
drawn at random, torch's fused AdamW.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import pooled_width, sizes
from flow_models import flow_of, targets
from flow_peer import flow_loss
from torch import Tensor, nn

from dreamtune.fast import fuse
from dreamtune.fast.graphs import CapturedStep
from dreamtune.injection.targets import find_targets

LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {
        "algo": "lora",
        "bypass_mode": True,
    },  # the change beside the weight, as ours and PEFT's
    "rebuilt": {"algo": "lora"},  # LyCORIS' default: W' is made at each forward
    "dora": {"algo": "lora", "dora_wd": True},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "oft": {"algo": "diag-oft"},
}
PEFT = ("lora", "dora", "delora", "oft", "hra")
DENSE = ("ether", "ether+", "delora")


def layers(network: nn.Module) -> list[str]:
    """The layers that ours adapts, by their whole paths: "to_out" alone would be a list of modules
    too, in the first blocks of Flux.2.
    """
    return list(find_targets(network, targets(network)))


def add_peft(unet: nn.Module, name: str, rank: int, block: int) -> list[nn.Parameter]:
    """Puts a PEFT adapter into the UNet; returns its trainable parameters."""
    import peft

    common: dict[str, Any] = {"target_modules": layers(unet)}
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, **common),
        "dora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=True, **common),
        "delora": lambda: peft.DeloraConfig(r=rank, delora_lambda=15, **common),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=block, use_cayley_neumann=True, **common),
        "hra": lambda: peft.HRAConfig(r=8, **common),
    }
    peft.inject_adapter_in_model(configs[name](), unet)
    return [p for p in unet.parameters() if p.requires_grad]


def add_lycoris(unet: nn.Module, name: str, rank: int, block: int) -> list[nn.Parameter]:
    """Puts a LyCORIS network into the UNet; returns its trainable parameters. Its kernels are used
    where it finds that they can be, which is its default.
    """
    from lycoris import create_lycoris
    from lycoris.wrapper import PRESET

    PRESET["attention"] = {
        **PRESET["attn-only"], "target_module": ["Attention"], "target_name": [],
    }  # fmt: skip
    weight = next(unet.parameters())
    unet.requires_grad_(False)
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    expected = len(find_targets(unet))
    dim = block if name == "oft" else rank
    net = create_lycoris(
        unet, 1.0, linear_dim=dim, linear_alpha=dim, preset="attention", **LYCORIS[name]
    )
    net.apply_to()
    net.to(weight.device, weight.dtype)
    unet.lycoris = net  # kept alive with it
    parameters = [p for p in net.parameters() if p.requires_grad]
    if len(net.loras) != expected:
        raise ValueError(f"LyCORIS adapts {len(net.loras)} layers, not {expected}")
    return parameters


class FrozenStep:
    """Forward and backward of the frozen UNet as our trainer runs it: fused kernels, the gradient
    of the input alone. For `CapturedStep`.
    """

    generators = ()

    def __init__(self, unet: Any, batch: int) -> None:
        fuse.fuse(unet)
        self.run, self.unet = plain_step(unet, [], batch, keep=True), unet
        unet.eval()

    def prepare(self, k: int, multiplier: float) -> None:
        pass

    def body(self) -> None:
        self.run()

    def reads(self) -> list[Tensor]:
        return list(self.unet.parameters())

    def changes(self) -> list[Tensor]:
        return [next(self.unet.parameters())]  # none, but the graph asks where it is


def captured_frozen(unet: Any, batch: int) -> Callable[[], None]:
    run = CapturedStep(FrozenStep(unet, batch))
    return lambda: run(0, 1.0)


def unit(x: Tensor, dim: int) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True)


class Dense(nn.Module):
    """A layer that makes its whole transformed weight at every forward."""

    def __init__(self, layer: nn.Linear, name: str, rank: int, blocks: int) -> None:
        super().__init__()
        self.layer, self.name, self.rank = layer, name, rank
        out, width = layer.weight.shape
        like: dict[str, Any] = {"device": layer.weight.device}

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, **like) / math.sqrt(shape[-1]))

        if name == "delora":
            self.a, self.b = random(rank, width), random(out, rank)
            self.strength = nn.Parameter(torch.ones(1, **like))
            self.register_buffer("start", torch.zeros(out, width, **like))
            self.register_buffer("norms", layer.weight.detach().float().norm(dim=0))
        elif name == "ether":
            self.u = random(1, out)
        else:
            self.u, self.v = random(blocks, out // blocks), random(blocks, out // blocks)
            self.s, self.t = random(blocks, width // blocks), random(blocks, width // blocks)

    def weight(self) -> Tensor:
        w = self.layer.weight
        if self.name == "delora":
            change = unit(self.b, 0) @ unit(self.a, 1) * (self.strength / self.rank)
            return w + ((change - self.start) * self.norms).to(w.dtype)
        if self.name == "ether":
            return self.blockwise(-2 * self.outer(self.u)).to(w.dtype) @ w
        left = self.blockwise(self.outer(self.v) - self.outer(self.u)).to(w.dtype)
        right = self.blockwise(self.outer(self.t) - self.outer(self.s)).to(w.dtype)
        return left @ w @ right

    @staticmethod
    def outer(u: Tensor) -> Tensor:
        """(n, k) -> (n, k, k)."""
        u = unit(u, -1)
        return u.unsqueeze(-1) * u.unsqueeze(-2)

    @staticmethod
    def blockwise(change: Tensor) -> Tensor:
        """I + the blocks, as one dense matrix."""
        eye = torch.eye(change.shape[-1], device=change.device)
        return torch.block_diag(*(change + eye))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.layer.bias)


def add_dense(unet: nn.Module, name: str, rank: int) -> list[nn.Parameter]:
    """Wraps every projection; returns the trainable parameters."""
    unet.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for path, layer in find_targets(unet).items():
        parent, _, child = path.rpartition(".")
        dense = Dense(layer, name, rank, blocks=4)
        setattr(unet.get_submodule(parent), child, dense)
        parameters += [p for p in dense.parameters() if p.requires_grad]
    return parameters


def told(unet: Any, batch: int, **kind: Any) -> dict[str, Any]:
    """Random text of 77 tokens and, of SDXL, pooled text and sizes: arguments of the UNet."""
    text = torch.randn(batch, 77, unet.config.cross_attention_dim, **kind)
    found: dict[str, Any] = {"encoder_hidden_states": text}
    if pooled := pooled_width(unet):
        found["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, **kind),
            "time_ids": sizes(unet, batch).to(**kind),
        }
    return found


def diffusers_step(unet: Any, rank: int, batch: int) -> Callable[[], None]:
    """A step of diffusers' train_dreambooth_lora_sdxl.py (train_dreambooth_lora.py for other UNets,
    those of `flow_loss` for transformers) as of 0.42 with --mixed_precision bf16, the latents
    cached: PEFT's LoRA on the same layers, draws and noise, autocast, clipping to 1, torch's AdamW,
    the schedule's step.
    """
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    weight = next(unet.parameters())
    device, dtype = weight.device, weight.dtype
    unet.requires_grad_(False)
    gaussian: dict[str, Any] = {"init_lora_weights": "gaussian", "target_modules": layers(unet)}
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, **gaussian))
    unet.train()
    own = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    half = device.type != "cpu" and dtype != torch.float32

    def update(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    if flow := flow_of(unet):
        loss_of = flow_loss(flow, unet, batch)

        def flow_step() -> None:
            with torch.autocast(device.type, dtype, enabled=half):
                loss = loss_of()
            update(loss)

        return flow_step
    noise_of = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    side, channels = unet.config.sample_size, unet.config.in_channels
    latents = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    arguments = told(unet, batch, device=device, dtype=dtype)

    def step() -> None:
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (batch,), device=device)
        noisy = noise_of.add_noise(latents, noise, t)
        with torch.autocast(device.type, dtype, enabled=half):
            said = unet(noisy, t, **arguments, return_dict=False)[0]
        update(F.mse_loss(said.float(), noise.float()))

    return step


def plain_step(
    unet: Any, parameters: list[nn.Parameter], batch: int, keep: bool = False
) -> Callable[[], None]:
    """Forward, backward and AdamW on fixed inputs. Without parameters: gradient to the input, which
    is kept for a graph that writes to it.
    """
    weight = next(unet.parameters())
    device, dtype = weight.device, weight.dtype
    unet.train()
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    if flow := flow_of(unet):
        shape, conditioning = flow.latents, flow.conditioning(batch, **kind)
        predict = flow.predictor(unet)
        said_of = partial(predict, conditioning=conditioning)
    else:
        side = unet.config.sample_size
        shape, arguments = (unet.config.in_channels, side, side), told(unet, batch, **kind)

        def said_of(x: Tensor, t: Tensor) -> Tensor:
            return unet(x, t, **arguments, return_dict=False)[0]

    x = torch.randn(batch, *shape, **kind).requires_grad_(not parameters)
    t = torch.randint(0, 1000, (batch,), device=device)
    goal = torch.randn(batch, *shape, **kind)
    optimizer = None
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda" or None)

    def step() -> None:
        F.mse_loss(said_of(x, t).float(), goal.float()).backward()
        if optimizer is None:
            x.grad = x.grad if keep else None
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
