"""Tiny random models, and what the tests of the adapters share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

torch.set_num_threads(1)

# Option sets beside each method's defaults; a method without an entry is tested with its defaults.
VARIANTS: dict[str, list[dict[str, object]]] = {
    "lora": [
        {"rank": 3, "alpha": 6},
        {"rank": 4, "use_rslora": True, "init_lora_weights": "gaussian"},
    ],
    "dora": [{"rank": 3, "alpha": 6}],
    "delora": [
        {"rank": 3},
        {"rank": 4, "start": "peft", "lambda_init": 2.0},
        {"rank": 2, "normalize": False, "weight_scaling": False, "lambda_learning_rate": 0},
        {"rank": 2, "multiplicative": True},
    ],
    "deft": [{"rank": 3, "projection": "qr"}, {"rank": 2, "alpha": 1.0}],
    "norm_bounded": [{"rank": 3, "delta": 0.5}],
    "oft": [{"blocks": 2, "exact": True}],
    "ether": [{"blocks": 4}, {"blocks": 2, "side": "output"}],
    "ether+": [{"blocks": 2, "sides": 1}, {"blocks": 1}],
}


def cases() -> list[tuple[str, dict[str, object]]]:
    """(method, options) over the registry."""
    from dreamtune import METHODS

    return [(name, options) for name in METHODS for options in [{}, *VARIANTS.get(name, [])]]


def tiny_unet(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A UNet of 8 attention modules in 4 transformer blocks, widths 32 and 48."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 48),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, cross_attention_dim=24, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return unet.to(dtype).eval()


def tiny_xl_unet(dtype: torch.dtype = torch.float32, seed: int = 0, **more: object) -> nn.Module:
    """A UNet as XL has it: without attention in its first block, with two transformer blocks in the
    second, told 10 numbers of pooled text and six sizes.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    options: dict[str, object] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 48),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2), "cross_attention_dim": 40,
        "attention_head_dim": (4, 6), "norm_num_groups": 8, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 10,
    }  # fmt: skip
    return UNet2DConditionModel(**(options | more)).to(dtype).eval()  # type: ignore[arg-type]


def unet_inputs(
    batch: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    """Latents, timesteps and prompt embeddings for `tiny_unet`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=g, dtype=dtype)
    t = torch.randint(0, 1000, (batch,), generator=g)
    return x, t, torch.randn(batch, 5, 24, generator=g, dtype=dtype)


def xl_inputs(
    batch: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """The same for `tiny_xl_unet`, and what its call has by name."""
    g = torch.Generator().manual_seed(1)
    x, t, _ = unet_inputs(batch, dtype)
    text = torch.randn(batch, 5, 40, generator=g, dtype=dtype)
    added = {
        "text_embeds": torch.randn(batch, 10, generator=g, dtype=dtype),
        "time_ids": torch.tensor([[1024.0, 1365, 0, 170, 1024, 1024]] * batch),
    }
    return (x, t, text), {"added_cond_kwargs": added}


def disturb(module_or_adapter: object, seed: int = 0, size: float = 0.1) -> None:
    """Moves every trainable tensor away from its start, by noise that differs between slots."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module_or_adapter.parameters():  # type: ignore[attr-defined]
            p.add_(size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p))


def tiny_pipeline(unet: nn.Module) -> object:
    """A Stable Diffusion pipeline without text encoder: prompts go in as embeddings."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4).eval()
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: object, seed: int = 0, **kwargs: object) -> Tensor:
    """Two images in 0..1 for fixed random embeddings."""
    g = torch.Generator().manual_seed(seed)
    prompt, negative = torch.randn(2, 2, 5, 24, generator=g)
    return pipe(  # type: ignore[operator]
        prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=2, height=8,
        width=8, generator=torch.Generator().manual_seed(seed), output_type="pt", **kwargs,
    ).images  # fmt: skip
