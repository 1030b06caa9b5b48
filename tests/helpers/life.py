"""What torch, accelerate, diffusers and PEFT do to a model, and what an adapted one should give."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny import disturb, unet_inputs
from torch import Tensor, nn

import dreamtune

D = torch.float64
Operation = Callable[[Any], Any]  # does it to the model, gives the model to call
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@functools.cache
def _base(seed: int) -> nn.Module:
    """A UNet of 6 attention modules, for there are many operations."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None, layers_per_block=1, cross_attention_dim=24, attention_head_dim=8,
        norm_num_groups=4,
    )  # fmt: skip
    return unet.double().eval()


def base(seed: int = 0) -> Any:
    return copy.deepcopy(_base(seed))


@functools.cache
def state(method: str) -> dict[str, Tensor]:
    """Of an adapter that moves the output well."""
    adapter = dreamtune.inject(base(), method)
    disturb(adapter, size=0.3)
    return adapter.state_dict()


def adapt(unet: Any, method: str) -> dreamtune.InjectedAdapter:
    adapter = dreamtune.inject(unet, method)
    adapter.load_state_dict(state(method))
    return adapter


def call(unet: Any, **options: Any) -> Tensor:
    dtype = next(p.dtype for p in unet.parameters())
    x, t, text = unet_inputs(2, D)
    with torch.no_grad():
        besides = getattr(unet, "besides", {})
        said: Tensor = unet(x.to(dtype), t, text.to(dtype), **besides, **options)[0]
    return said.to(D)


@functools.cache
def right(method: str | None, name: str, first: bool = False) -> Tensor:
    """What a stock model says: with the change in its weights, and then the operation done to it,
    the other way about where that changes the base (`first`).
    """
    operation, unet = OPERATIONS[name], base()
    unet = operation(unet) if first else unet
    if method is not None:
        adapt(unet, method).merge()
    return call(unet if first else operation(unet))


def _self(change: Callable[[Any], Any]) -> Operation:
    def operation(unet: Any) -> Any:
        change(unet)
        return unet

    return operation


def _back_and_forth(unet: Any) -> None:
    unet.to(torch.float32)
    unet.to(D)


def _new_places(unet: Any) -> None:
    for p in unet.parameters():
        p.data = p.data.clone()


def _new_parameters(unet: Any) -> None:
    tensors = {name: x.clone() for name, x in unet.state_dict().items()}
    unet.load_state_dict(tensors, assign=True)


def _other_base(unet: Any) -> None:
    unet.load_state_dict(base(1).state_dict())


def _ema(unet: Any) -> None:
    """Its `copy_to` writes through `.data`, as most of what averages does."""
    from diffusers.training_utils import EMAModel

    EMAModel(base(1).parameters()).copy_to(unet.parameters())


def _one_layer(unet: Any) -> None:
    name = [n for n, _ in unet.named_modules() if n.endswith("attn2.to_v")][-1]
    unet.get_submodule(name).weight.data.mul_(1.5)


def style(unet: Any, name: str = "style") -> Any:
    from peft import LoraConfig

    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=list(PROJECTIONS), init_lora_weights=False)
    unet.add_adapter(config, name)
    return unet.to(D)


def _fused(unet: Any) -> Any:
    style(unet).fuse_lora()
    return unet


def _fused_for_good(unet: Any) -> None:
    """As `pipe.fuse_lora(); pipe.unload_lora_weights()`: the style is in the base."""
    style(unet).fuse_lora(safe_fusing=True)
    unet.unload_lora()


def _fused_and_back(unet: Any) -> None:
    style(unet).fuse_lora()
    unet.unfuse_lora()


def _come_and_gone(unet: Any) -> None:
    style(unet)
    unet.disable_lora()
    unet.enable_lora()
    unet.unload_lora()


def _fused_projections(unet: Any) -> None:
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()


def sequential(unet: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(unet, torch.device("cpu"))


def _offload_and_back(unet: Any) -> None:
    """Accelerate leaves the method that it found on the instance."""
    from accelerate.hooks import remove_hook_from_submodules

    sequential(unet)
    remove_hook_from_submodules(unet)


def _group_offload(unet: Any) -> None:
    cpu = torch.device("cpu")
    unet.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


def _model_offload(unet: Any) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(unet, torch.device("cpu"))


def _ip_adapter(unet: Any) -> None:
    projections = (f"{n}.processor" for n, m in unet.named_modules() if n.endswith("attn2"))
    g = torch.Generator().manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(projections):
        out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind in ("to_k_ip", "to_v_ip"):
            weight = 0.1 * torch.randn(out, 24, generator=g)
            tensors[f"{2 * index + 1}.{kind}.weight"] = weight
    image = {
        "proj.weight": torch.randn(96, 16, generator=g), "proj.bias": torch.zeros(96),
        "norm.weight": torch.ones(24), "norm.bias": torch.zeros(24),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"ip_adapter": tensors, "image_proj": image}])
    unet.to(D)
    embedding = torch.randn(2, 1, 16, generator=g, dtype=D)
    unet.besides = {"added_cond_kwargs": {"image_embeds": [embedding]}}


def _hooks(unet: Any) -> None:
    for name, module in unet.named_modules():
        if name.endswith(PROJECTIONS):
            module.register_forward_hook(lambda module, args, output: 1.1 * output)


def _sliced(unet: Any) -> None:
    unet.set_attention_slice("max")


def _other_processors(unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def _slim(unet: Any) -> None:
    unet.set_attention_slice("max")
    unet.set_default_attn_processor()


def _average(unet: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(unet)


OPERATIONS: dict[str, Operation] = {
    "nothing": lambda unet: unet,
    "to a dtype and back": _self(_back_and_forth),
    "bfloat16": lambda unet: unet.to(torch.bfloat16),
    "half": lambda unet: unet.half(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda unet: pickle.loads(pickle.dumps(unet)),
    "average": _average,
    "data replaced": _self(_new_places),
    "parameters replaced": _self(_new_parameters),
    "LoRA": style,
    "LoRA fused and unfused": _self(_fused_and_back),
    "LoRA loaded and unloaded": _self(_come_and_gone),
    "projections fused and unfused": _self(_fused_projections),
    "sequential offload": _self(sequential),
    "sequential offload and back": _self(_offload_and_back),
    "group offload": _self(_group_offload),
    "model offload": _self(_model_offload),
    "IP-Adapter": _self(_ip_adapter),
    "hooks": _self(_hooks),
    "sliced attention": _self(_sliced),
    "other processors": _self(_other_processors),
    "processors reset": _self(_slim),
    "frozen": lambda unet: unet.requires_grad_(False).eval(),
}
# After these the change is that of another base.
NEW_BASE: dict[str, Operation] = {
    "another state dict": _self(_other_base),
    "EMA copied": _self(_ema),
    "one layer in place": _self(_one_layer),
    "LoRA fused for good": _self(_fused_for_good),
}
OPERATIONS |= NEW_BASE
ROUGH = {"bfloat16": 0.2, "half": 0.03}  # of the size of the change, where numbers are short


@contextmanager
def quiet() -> Iterator[None]:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
