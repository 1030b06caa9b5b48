"""LoRA files of layers that are no attention projections: feed-forwards, resnets, convolutions."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loras import assert_same, flat, in_peft, loads_or_is_named, ours, stock, unet_of, write
from stock import in_checkpoint
from test_out import xl_output, xl_unet
from tiny import disturb, tiny_unet, unet_inputs
from torch import Tensor, nn

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.info import describe
from dreamtune.files.info_page import page
from dreamtune.files.native import load_adapter_file
from dreamtune.injection.targets import layers_of

File = tuple[dict[str, Tensor], dict[str, Tensor]]  # tensors; module path -> (out, in * kh * kw)


@cache
def layers() -> dict[str, nn.Linear | nn.Conv2d]:
    return layers_of(tiny_unet())


def locon(name: Callable[[str], str], tucker: bool, only: str = "") -> File:
    """As kohya's scripts and LyCORIS write it: a rank and an alpha a kind of layer. tucker: 3x3
    kernels between 1x1 ones.
    """
    g = torch.Generator().manual_seed(4)
    tensors, changes = {}, {}
    for path, layer in layers().items():
        if only not in path:
            continue
        out, width, *kernel = layer.weight.shape
        rank, alpha = (2, 1.0) if kernel == [3, 3] else (4, 3.0)
        up = torch.randn(out, rank, *(1 for _ in kernel), generator=g) * 0.3
        if tucker and kernel == [3, 3]:
            down = torch.randn(rank, width, 1, 1, generator=g)
            mid = torch.randn(rank, rank, *kernel, generator=g)
            tensors[f"{name(path)}.lora_mid.weight"] = mid
            x = torch.eye(width)[:, :, None, None]  # each input channel alone, at one point
            h = torch.nn.functional.conv2d(x, down)
            kernels = torch.nn.functional.conv2d(h, mid.flip(2, 3), padding=2)
            change = torch.nn.functional.conv2d(kernels, up).transpose(0, 1)
        else:
            down = torch.randn(rank, width, *kernel, generator=g)
            change = (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)
        tensors[f"{name(path)}.lora_up.weight"] = up
        tensors[f"{name(path)}.lora_down.weight"] = down
        tensors[f"{name(path)}.alpha"] = torch.tensor(alpha)
        changes[path] = alpha / rank * change.double().flatten(1)
    return tensors, changes


def kohya(path: str) -> str:
    return f"lora_unet_{flat(path)}"


NAMES: dict[str, Callable[[str], str]] = {
    "kohya": kohya,
    "kohya, first names": lambda path: f"lora_unet_{flat(in_checkpoint(path))}",
    "ComfyUI": lambda path: f"diffusion_model.{in_checkpoint(path)}",
    "diffusers": lambda path: f"unet.{path}",
}


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("names", NAMES)
def test_every_layer_of_a_unet(names: str, tucker: bool, tmp_path: Path) -> None:
    """What stands in the file is what is loaded, with each layer's rank and alpha."""
    tensors, changes = locon(NAMES[names], tucker)
    path = write(tmp_path, tensors)
    assert len(changes) == 83
    assert_same(ours(path), changes)
    if names == "kohya":
        again = dreamtune.export(path, tmp_path / "out", base=unet_of("ours"))
        assert_same(stock(again), changes)


def test_what_becomes_of_such_a_file(tmp_path: Path) -> None:
    """Trained further, kept as a native file, described; and without a base, by its paths."""
    tensors, changes = locon(NAMES["diffusers"], False, only="resnets")
    path = write(tmp_path, tensors)
    unet = tiny_unet()
    adapter = dreamtune.load(unet, path)
    assert adapter.weights().keys() == changes.keys()
    for group in adapter.groups:
        group.adapter.requires_grad_(True)
    parameters = list(adapter.parameters())
    unet(*unet_inputs(1)).sample.square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in parameters)
    kept = adapter.save(tmp_path / "n")
    adapter.eject()
    assert_same(ours(kept), changes)
    native = dreamtune.export(path, tmp_path / "out", "native", base=unet)
    file = load_adapter_file(native)
    assert not file.some_layers and file.shapes.keys() == changes.keys()
    assert_same(ours(native), changes)
    assert_same(ours(dreamtune.export(path, tmp_path / "alone", "peft")), changes)
    small = dreamtune.export(path, tmp_path / "small", "native", base=unet, max_rank=1)
    for layer, cut in ours(small).items():
        wanted = torch.linalg.svdvals(changes[layer])
        torch.testing.assert_close(torch.linalg.matrix_norm(cut, 2), wanted[0], rtol=1e-5, atol=0)
        left = torch.linalg.matrix_norm(changes[layer] - cut)
        torch.testing.assert_close(left, wanted[1:].norm(), rtol=1e-4, atol=0)
    text = page(describe(path, unet))
    assert "rank      2 in 16 layers, 4 in 13 layers" in text
    assert "layers    29: conv1, conv2, conv_shortcut, time_emb_proj" in text
    assert "down_blocks.0.resnets.0 " in text


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"mid_block.resnets.0.conv1": None}, "1 layers have no keys, `mid_block.resnets.0.conv1`"),
        ({"up_blocks.0.resnets.1.conv_shortcut": None}, "1 layers have no keys, `up_blocks.0.res"),
        ({"mid_block.attentions.0.proj_out": None}, "1 layers have no keys, `mid_block.*proj_out"),
        ({"conv_in": (1, 1)}, r"`conv_in` is \(32, 4, 3, 3\) here and \(32, 4, 1, 1\) in the file"),
        ({"conv_in": ()}, r"`conv_in` is \(32, 4, 3, 3\) here and \(32, 4\) in the file"),
    ],
)
def test_layers_that_are_lost_or_of_another_kernel(
    edit: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors, _ = locon(kohya, False)
    for path, kernel in edit.items():
        tensors = {k: t for k, t in tensors.items() if not k.startswith(f"{kohya(path)}.")}
        if kernel is not None:
            tensors[f"{kohya(path)}.lora_down.weight"] = torch.ones(2, 4, *kernel)
            tensors[f"{kohya(path)}.lora_up.weight"] = torch.ones(32, 2, *(1 for _ in kernel))
    file = write(tmp_path, tensors)
    with pytest.raises(UnreadableFile, match=f"`{file.name}`: {message}"):
        dreamtune.load(unet_of("ours"), file)


@pytest.mark.parametrize("only", ["down_blocks.0", "conv1", "mid_block.resnets.1", "conv_shortcut"])
def test_a_part_of_the_network_is_no_loss(only: str, tmp_path: Path) -> None:
    tensors, changes = locon(kohya, False, only=only)
    assert 0 < len(changes) < 83
    assert_same(ours(write(tmp_path, tensors)), changes)


def test_a_choice_that_is_not_regular_comes_back(tmp_path: Path) -> None:
    """Our header says which layers were written."""
    targets = ["mid_block.resnets.0.conv1", "conv2", "mid_block.*.to_q", "*.attn1.to_k"]
    adapter = dreamtune.inject(tiny_unet(), "ether+", target_modules=targets)
    disturb(adapter)
    paths = adapter.weights().keys()
    path = dreamtune.export(adapter, tmp_path, "kohya")
    assert ours(path).keys() == paths


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_convolutions_of_lycoris(kind: str, effective: bool, tmp_path: Path) -> None:
    """As PEFT saves them, as matrices or in Tucker form."""
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(1)
    names = ["conv1", "proj_in", "ff.net.2"]
    more = {"rank_pattern": {"ff.net.2": 3}} if kind == "LoHaConfig" else {"decompose_both": True}
    method = getattr(peft, kind)(
        r=2, alpha=3, target_modules=names, use_effective_conv2d=effective, **more
    )
    model = peft.get_peft_model(tiny_unet(), method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada" in name or "lokr" in name:
                parameter.normal_(0, 0.4)
    model.save_pretrained(tmp_path)
    assert_same(ours(tmp_path), in_peft(model.base_model.model.named_modules()))
    if not effective and kind == "LoHaConfig":
        with pytest.raises(
            ValueError, match="do not tell whether it is a convolution: pass the UN"
        ):
            dreamtune.export(tmp_path, tmp_path / "out")


def test_every_layer_of_sdxl_in_kohyas_names(tmp_path: Path) -> None:
    """diffusers' own conversion of SDXL's kohya files finds them."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

    unet = xl_unet()
    base = xl_output(unet)
    adapter = dreamtune.inject(unet, "lora", target_modules="*", rank=2)
    disturb(adapter, size=0.05)
    wanted, count = xl_output(unet), len(adapter.weights())
    path = dreamtune.export(adapter, tmp_path, "kohya")
    lora = dreamtune.export(adapter, tmp_path / "lora", "kohya", base=None)
    assert lora.read_bytes() == path.read_bytes()
    adapter.eject()
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(16,), norm_num_groups=8), text_encoder=None,
        text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=xl_unet(),
        scheduler=DDIMScheduler(),
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert sum(hasattr(m, "lora_A") for m in pipe.unet.modules()) == count == 264
    torch.testing.assert_close(xl_output(pipe.unet), wanted, rtol=0, atol=1e-5)
    dreamtune.load(unet, path)
    torch.testing.assert_close(xl_output(unet), wanted, rtol=0, atol=1e-5)
    assert float((wanted - base).abs().max()) > 1e-2


def test_a_kohya_file_of_layers_that_do_not_tell_the_family_needs_the_base(tmp_path: Path) -> None:
    adapter = dreamtune.inject(tiny_unet(), "lora", target_modules=["conv1"])
    disturb(adapter)
    path = adapter.save(tmp_path)
    with pytest.raises(ValueError, match="other names for SDXL, and these layers do not tell it"):
        dreamtune.export(path, tmp_path / "k", "kohya")
    assert dreamtune.export(path, tmp_path / "k", "kohya", base=unet_of("ours")).is_file()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), tucker=st.booleans())
def test_a_file_that_fails_leaves_the_model_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, tucker: bool
) -> None:
    rng, folder = random.Random(seed), tmp_path_factory.getbasetemp() / "other-layers"
    path = write(folder, locon(kohya, tucker, only="down_blocks.0")[0])
    path.write_bytes(rng.choice(damage.TENSORS)(path.read_bytes(), rng))
    loads_or_is_named(path)
