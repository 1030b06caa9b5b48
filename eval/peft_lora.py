"""A DreamBooth LoRA by PEFT and diffusers alone, without dreamtune, to be scored beside ours.

    python eval/peft_lora.py --base BASE --photos PHOTOS --prompt "a sks fox" --output OUT
    dreamtune score OUT --photos PHOTOS --instance_prompt "a sks fox" \
        --pretrained_model_name_or_path BASE

The plain loop of diffusers' example: one photo a step, AdamW, gradients clipped to 1, no weighting.
BASE is a Stable Diffusion folder; that of dreamtune's embedded base is `dreamtune.embedded.MODEL`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PREDICTIONS = ("epsilon", "v_prediction")
FILE = "pytorch_lora_weights.safetensors"  # what `save_lora_weights` writes


def latents_of(pipe: Any, photos: Path, size: int) -> torch.Tensor:
    """(N, 4, h, w): the means of the photos' codes, cut to a square in the middle."""
    codes = []
    for path in sorted(p for p in photos.iterdir() if p.suffix.lower() in SUFFIXES):
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size))
        pixels = pipe.image_processor.preprocess(image).to(pipe.device, pipe.vae.dtype)
        code = pipe.vae.encode(pixels)
        mean = code.latent_dist.mean if "latent_dist" in code else code.latents  # a tiny one's
        codes.append(mean * pipe.vae.config.scaling_factor)
    if not codes:
        raise ValueError(f"`{photos}` has no photo: {', '.join(SUFFIXES)}.")
    return torch.cat(codes)


def train(pipe: Any, photos: Path, prompt: str, steps: int, rate: float, rank: int) -> None:
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    unet, device = pipe.unet, pipe.device
    noise_of = DDPMScheduler.from_config(pipe.scheduler.config)
    if (kind := noise_of.config.prediction_type) not in PREDICTIONS:
        raise ValueError(f"the base predicts `{kind}`; known are {', '.join(PREDICTIONS)}.")
    with torch.no_grad():
        size = unet.config.sample_size * pipe.vae_scale_factor
        latents = latents_of(pipe, photos, size)
        text, _ = pipe.encode_prompt(prompt, device, 1, False)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LAYERS)
    )
    own = [p for p in unet.parameters() if p.requires_grad]
    for p in own:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    unet.train()
    for step in range(steps):
        x = latents[step % len(latents)][None]
        noise = torch.randn(x.shape, generator=generator).to(x)
        t = torch.randint(noise_of.config.num_train_timesteps, (1,), generator=generator).to(device)
        target = noise
        if noise_of.config.prediction_type == "v_prediction":
            target = noise_of.get_velocity(x, noise, t)
        with torch.autocast(device.type, unet.dtype, enabled=unet.dtype != torch.float32):
            predicted = unet(noise_of.add_noise(x, noise, t), t, text).sample
        loss = F.mse_loss(predicted.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    unet.eval()


def save(pipe: Any, output: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(output, unet_lora_layers=layers)


def main(argv: list[str] | None = None) -> int:
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.rank < 1:
        raise ValueError(f"--steps and --rank must be 1 or more, got {args.steps}, {args.rank}.")
    if not (Path(args.base) / "model_index.json").is_file():
        raise ValueError(f"`{args.base}` is no folder of a pipeline: it has no model_index.json.")
    if not args.photos.is_dir():
        raise ValueError(f"`{args.photos}` is no folder of photos.")
    if (args.output / FILE).exists():
        raise ValueError(f"`{args.output / FILE}` is there: name another --output.")
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(
        args.base, dtype=dtype, safety_checker=None, requires_safety_checker=False
    ).to("cuda" if cuda else "cpu")
    train(pipe, args.photos, args.prompt, args.steps, args.learning_rate, args.rank)
    save(pipe, args.output)
    print(f"{args.output}: {args.steps} steps on {args.photos}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (ValueError, OSError) as error:
        raise SystemExit(f"peft_lora: {error}") from None
