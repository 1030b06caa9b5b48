"""LoRA files as other trainers write them, and what stock diffusers makes of one. A change of a
convolution is (out, in * kh * kw).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_unet
from torch import Tensor, nn

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.layers import factors_of_adapter
from dreamtune.injection.targets import find_targets

Pairs = dict[str, tuple[Tensor, Tensor]]  # module path -> up, down


@cache
def targets() -> dict[str, nn.Linear]:
    return find_targets(tiny_unet())


@cache
def unet_of(reader: str) -> nn.Module:
    """One for each reader: to make one takes longer than a test of a file."""
    return tiny_unet()


def pairs(
    rank: int | Callable[[str], int] = 4, keep: Callable[[str], bool] = lambda path: True
) -> Pairs:
    """Random factors of the layers of `tiny_unet`."""
    g = torch.Generator().manual_seed(5)
    found = {}
    for path, layer in targets().items():
        r = rank if isinstance(rank, int) else rank(path)
        up = torch.randn(layer.out_features, r, generator=g) * 0.1
        down = torch.randn(r, layer.in_features, generator=g)
        if keep(path):
            found[path] = (up, down)
    return found


def products(factors: Pairs, scale: float | Callable[[str], float] = 1.0) -> dict[str, Tensor]:
    """Module path -> change (out, in) in float64."""
    size = scale if callable(scale) else lambda path: scale
    return {p: size(p) * (up.double() @ down.double()) for p, (up, down) in factors.items()}


def flat(path: str) -> str:
    return path.replace(".", "_")


def in_checkpoint(path: str) -> str:
    """The name in an SD checkpoint of a layer of `tiny_unet`, which has one layer a block: conv_in,
    block, downsampler, block; upwards two layers a block, the upper block has the attentions.
    """
    for ours, theirs in (
        ("down_blocks.0.attentions.0.", "input_blocks.1.1."),
        ("mid_block.attentions.0.", "middle_block.1."),
        ("up_blocks.1.attentions.0.", "output_blocks.2.1."),
        ("up_blocks.1.attentions.1.", "output_blocks.3.1."),
    ):
        if path.startswith(ours):
            return path.replace(ours, theirs)
    raise AssertionError(path)


def keys(factors: Pairs, up: str, down: str) -> dict[str, Tensor]:
    """up, down: keys with {path}, {flat}, {old} (the attention's processor), {checkpoint}."""
    found = {}
    for path, pair in factors.items():
        owner, _, layer = path.removesuffix(".0").rpartition(".")
        words = {"path": path, "flat": flat(path), "old": f"{owner}.processor.{layer}_lora"}
        words["checkpoint"] = in_checkpoint(path)
        words["flat_checkpoint"] = flat(words["checkpoint"])
        for key, tensor in zip((up, down), pair):
            found[key.format(**words)] = tensor
    return found


# Spelling -> key of up, key of down, whether stock diffusers reads it.
SPELLINGS: dict[str, tuple[str, str, bool]] = {
    "diffusers": ("unet.{path}.lora_B.weight", "unet.{path}.lora_A.weight", True),
    "without prefix": ("{path}.lora_B.weight", "{path}.lora_A.weight", False),
    "diffusers 0.2": ("unet.{path}.lora.up.weight", "unet.{path}.lora.down.weight", True),
    "processors": ("unet.{old}.up.weight", "unet.{old}.down.weight", True),
    "attn_procs": ("{old}.up.weight", "{old}.down.weight", False),
    "kohya": ("lora_unet_{flat}.lora_up.weight", "lora_unet_{flat}.lora_down.weight", True),
    "kohya, first names": (
        "lora_unet_{flat_checkpoint}.lora_up.weight",
        "lora_unet_{flat_checkpoint}.lora_down.weight",
        False,  # of SDXL only
    ),
    "PEFT": (
        "base_model.model.{path}.lora_B.weight",
        "base_model.model.{path}.lora_A.weight",
        False,
    ),
    "ComfyUI": (
        "diffusion_model.{checkpoint}.lora_up.weight",
        "diffusion_model.{checkpoint}.lora_down.weight",
        False,
    ),
}


def spelt(spelling: str, factors: Pairs) -> dict[str, Tensor]:
    return keys(factors, *SPELLINGS[spelling][:2])


def write(
    folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None, **strings: str
) -> Path:
    """metadata: as diffusers keeps it in the header."""
    folder.mkdir(exist_ok=True)
    path = folder / "pytorch_lora_weights.safetensors"
    if metadata is not None:
        strings["lora_adapter_metadata"] = json.dumps(metadata, sort_keys=True)
    save_file({k: t.clone() for k, t in tensors.items()}, path, strings)
    return path


def ours(path: Path) -> dict[str, Tensor]:
    """What `dreamtune.load` makes of a file: the changes that are not zero."""
    adapter = dreamtune.load(unet_of("ours"), path)
    found = products({p: (u.detach(), d.detach()) for p, (u, d) in
                      factors_of_adapter(adapter).items()})  # fmt: skip
    adapter.eject()
    return {p: change for p, change in found.items() if change.any()}


def stock(path: Path) -> dict[str, Tensor]:
    """What `pipe.load_lora_weights` makes of it."""
    pipe = tiny_pipeline(unet_of("stock"))
    pipe.load_lora_weights(path.parent, weight_name=path.name)  # type: ignore[attr-defined]
    found = in_peft(unet_of("stock").named_modules())
    pipe.unload_lora_weights()  # type: ignore[attr-defined]
    return found


def in_peft(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """The changes of PEFT's layers, in float64."""
    found = {}
    for name, module in modules:
        adapters = getattr(module, "scaling", {})
        if adapters and hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight(next(iter(adapters)))
            found[name] = delta.detach().double().flatten(1)
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(got[path], change, rtol=0, atol=1e-5)
        assert float(change.abs().max()) > 1e-3


def loads_or_is_named(path: Path) -> None:
    """A damaged file loads and leaves again, or the error has its name; then the model is as it
    was, bit for bit.
    """
    unet = unet_of("ours")
    before = {k: t.clone() for k, t in unet.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            dreamtune.load(unet, path).eject()
        except UnreadableFile as error:
            assert path.name in str(error)
    assert not any("Adapted" in type(m).__name__ for m in unet.modules())
    assert all(torch.equal(t, before[k]) for k, t in unet.state_dict().items())
