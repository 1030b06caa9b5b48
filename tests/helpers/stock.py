"""Loads the files of `matrix.py` with the libraries that they are for, and without dreamtune.

    python stock.py FOLDER FORMAT...

Prints, as JSON, FORMAT -> row -> largest differences of the output: to that of the adapter, and to
the base's; and what the loader warned of. Exits with 1 where an output is another one.
"""

import copy
import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

torch.set_num_threads(1)
TOLERANCE, CHANGED = 2e-5, 1e-3
BLOCKS = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
# Of the tests' UNet (conv_in, a resnet with attention, a downsampler, a resnet; upwards two): how a
# module path begins, and how it does in a checkpoint; and what a resnet's layers are called there.
STARTS = {
    "down_blocks.0.resnets.0.": "input_blocks.1.0.", "down_blocks.0.attentions.0.":
    "input_blocks.1.1.", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.", "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.", "mid_block.resnets.1.": "middle_block.2.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.", "up_blocks.0.resnets.1.":
    "output_blocks.1.0.", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.", "up_blocks.1.attentions.0.":
    "output_blocks.2.1.", "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    "up_blocks.1.attentions.1.": "output_blocks.3.1.", "conv_in": "input_blocks.0.0",
    "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip
RESNET = {
    ".conv1": ".in_layers.2", ".conv2": ".out_layers.3", ".time_emb_proj": ".emb_layers.1",
    ".conv_shortcut": ".skip_connection",
}  # fmt: skip
# What diffusers says of every LoRA that has no text encoder's.
USUAL = "No LoRA keys associated to"


def image(pipe):
    """One image in 0..1 of a prompt: tokenizer, text encoder, network and autoencoder."""
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16, "num_inference_steps": 3}
    return pipe("a b", generator=g, output_type="pt", **size).images


def diffusers(unet, folder):
    """By `load_lora_weights`, of whatever file lies there."""
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(16,), norm_num_groups=8), text_encoder=None,
        tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    (file,) = folder.glob("*.safetensors")
    pipe.load_lora_weights(folder, weight_name=file.name)
    assert pipe.get_active_adapters()
    return pipe.unet


def kohya(unet, folder):
    """By diffusers, and by what sd-scripts and ComfyUI do with such keys: the same weights."""
    (file,) = folder.glob("*_kohya.safetensors")
    merged = by_names(copy.deepcopy(unet), load_file(file))
    loaded = diffusers(unet, folder)
    assert_alike(merged, loaded)
    return loaded


def by_names(unet, tensors):
    """sd-scripts' `networks/lora.py`: `lora_unet_`, then a layer's path with _ for each dot, of the
    layers in every block of `BLOCKS`; W + up @ down * alpha / rank. ComfyUI's key map has the same
    names for SD 1.x and 2.x, and those of the layers outside. No key may be left.
    """
    left = dict(tensors)
    for name, block in unet.named_modules():
        inside = block.named_modules() if type(block).__name__ in BLOCKS else [("", block)]
        for child, layer in inside:
            key = f"lora_unet_{name}.{child}".removesuffix(".").replace(".", "_")
            if not isinstance(layer, LAYERS) or f"{key}.alpha" not in left:
                continue
            up, down = left.pop(f"{key}.lora_up.weight"), left.pop(f"{key}.lora_down.weight")
            change(layer, up, down, left.pop(f"{key}.alpha") / down.shape[0])
    assert not left, next(iter(left))
    return unet


def in_checkpoint(path):
    """The name of a layer of the tests' UNet in a checkpoint."""
    start = next(start for start in STARTS if path.startswith(start))
    name = path.replace(start, STARTS[start])
    for ours, theirs in RESNET.items() if "resnets" in path else ():
        name = name.replace(ours, theirs)
    return name


def comfyui(unet, folder):
    """ComfyUI's `model_lora_keys_unet` and `weight_adapter/lora.py`: the key of a weight without
    its end, then words for up and down; W + up @ down where there is no alpha. No key may be left.
    """
    (file,) = folder.glob("*_comfyui.safetensors")
    left = load_file(file)
    for path, layer in unet.named_modules():
        name = f"diffusion_model.{in_checkpoint(path)}" if isinstance(layer, LAYERS) else ""
        if f"{name}.lora_up.weight" in left:
            up, down = left.pop(f"{name}.lora_up.weight"), left.pop(f"{name}.lora_down.weight")
            change(layer, up, down, 1.0)
    assert not left, next(iter(left))
    return unet


def change(layer, up, down, scale):
    """Of a convolution up is 1x1, down has its kernel."""
    kernel = layer.weight.shape[2:]
    assert up.shape[2:] == (1, 1)[: len(kernel)] and down.shape[2:] == kernel
    with torch.no_grad():
        layer.weight += (up.flatten(1) @ down.flatten(1) * scale).view_as(layer.weight)


def peft(unet, folder):
    """By PEFT; a plain LoRA also by what vLLM and vLLM-Omni do with such a folder."""
    from peft import PeftModel

    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] != "LORA" or config.get("use_dora"):  # which they refuse
        return PeftModel.from_pretrained(unet, str(folder))
    merged = by_paths(copy.deepcopy(unet), config, load_file(folder / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(unet, str(folder))
    assert_alike(merged, loaded)
    return loaded


def by_paths(unet, config, tensors):
    """vLLM's `PEFTHelper` and `parse_fine_tuned_lora_name`: bias "none", names of modules whose
    ends are among the targets, `base_model.model.`, then the module's path; W + B @ A * alpha / r.
    """
    assert config["bias"] == "none"
    left = dict(tensors)
    for name in sorted({k.rpartition(".lora_")[0] for k in tensors}):
        start, path = name[: len("base_model.model.")], name[len("base_model.model.") :]
        assert start == "base_model.model."
        assert any(path == t or path.endswith(f".{t}") for t in config["target_modules"])
        up, down = left.pop(f"{name}.lora_B.weight"), left.pop(f"{name}.lora_A.weight")
        assert down.shape[0] == config["r"]
        change(unet.get_submodule(path), up, down, config["lora_alpha"] / config["r"])
    assert not left, next(iter(left))
    return unet


def assert_alike(one, other):
    x = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 24)
    with torch.no_grad():
        difference = (one(*x).sample - other(*x).sample).abs().max()
    assert difference < TOLERANCE, difference


def merged(unet, folder):
    (model,) = folder.glob("*_merged")
    return UNet2DConditionModel.from_pretrained(model)


class Heard(logging.Handler):
    """Collects what libraries log as a warning."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def column(folder, name):
    heard = Heard()
    for library in ("diffusers", "peft", "transformers"):
        logging.getLogger(library).addHandler(heard)
    base = UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet")
    inputs, outputs = (load_file(folder / f"{n}puts.safetensors") for n in ("in", "out"))
    load, rows, found = globals()[name], json.loads((folder / "rows.json").read_text()), {}
    for place in sorted((folder / name).glob("*")):
        if not any(place.iterdir()):
            continue
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always", UserWarning)
            got = load(copy.deepcopy(base), place)(inputs["x"], inputs["t"], inputs["text"]).sample
        words = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        words += [said for said in heard.said if not said.startswith(USUAL)]
        to_adapter, to_base = (float((got - outputs[k]).abs().max()) for k in (place.name, "base"))
        found[rows[int(place.name)]] = {
            "error": to_adapter, "change": to_base, "warned": words,
        }  # fmt: skip
        heard.said = []
    return found


def whole(folder):
    """The pipeline that was merged: its text encoder must not have come up random."""
    pipe = StableDiffusionPipeline.from_pretrained(folder / "whole_merged")
    wanted = load_file(folder / "image.safetensors")["image"]
    return float((image(pipe) - wanted).abs().max())


def main():
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    found = {n: column(folder, n) for n in names}
    if "merged" in names:
        found["whole"] = {"image": {"error": whole(folder), "change": 1.0, "warned": []}}
    assert "dreamtune" not in sys.modules
    print(json.dumps(found))
    cells = [cell for column in found.values() for cell in column.values()]
    return any(cell["error"] > TOLERANCE or cell["change"] < CHANGED for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
