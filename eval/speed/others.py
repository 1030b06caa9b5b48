"""What the step is compared with: PEFT's adapters, and the dense forms of the released code.

Written so as to favour them: PEFT's adapters in the UNet's dtype, as PEFT makes them, no clipping,
nothing drawn at random, torch's fused AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.injection.targets import TARGET_MODULES, find_targets

PEFT = ("lora", "dora", "delora", "oft", "hra")
DENSE = ("ether", "ether+", "delora")


def add_peft(unet: nn.Module, name: str, rank: int, block: int) -> list[nn.Parameter]:
    """Puts a PEFT adapter into the UNet; returns its trainable parameters."""
    import peft

    common: dict[str, Any] = {"target_modules": list(TARGET_MODULES)}
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, **common),
        "dora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=True, **common),
        "delora": lambda: peft.DeloraConfig(r=rank, delora_lambda=15, **common),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=block, use_cayley_neumann=True, **common),
        "hra": lambda: peft.HRAConfig(r=8, **common),
    }
    peft.inject_adapter_in_model(configs[name](), unet)
    return [p for p in unet.parameters() if p.requires_grad]


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


def plain_step(unet: Any, parameters: list[nn.Parameter], batch: int) -> Callable[[], None]:
    """Forward, backward and AdamW on fixed inputs. Without parameters: gradient to the input."""
    weight = next(unet.parameters())
    device, dtype = weight.device, weight.dtype
    side, channels = unet.config.sample_size, unet.config.in_channels
    unet.train()
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    x = torch.randn(batch, channels, side, side, **kind).requires_grad_(not parameters)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim, **kind)
    t = torch.randint(0, 1000, (batch,), device=device)
    goal = torch.randn(batch, channels, side, side, **kind)
    optimizer = None
    if parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda" or None)

    def step() -> None:
        said = unet(x, t, text, return_dict=False)[0]
        F.mse_loss(said.float(), goal.float()).backward()
        if optimizer is None:
            x.grad = None
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
