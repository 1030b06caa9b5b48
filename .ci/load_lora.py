"""Loads a run's LoRA with stock diffusers alone and checks that it changes the image.

python load_lora.py BASE_FOLDER RUN_FOLDER
"""

import sys

import torch
from diffusers import StableDiffusionPipeline


def image(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a photo", num_inference_steps=4, generator=generator, output_type="pt").images


base, run = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
before = image(pipe)
pipe.load_lora_weights(run)
assert pipe.get_active_adapters(), "diffusers loaded no adapter"
assert "dreamtune" not in sys.modules
difference = (image(pipe) - before).abs().max().item()
assert difference > 0, "the LoRA changes nothing"
print(f"LoRA loaded by diffusers alone; largest pixel change {difference:.3f} of 1")
