"""Layers in parts, of Flux.2, as plain LoRA files: exact, of blocks, and read by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import without_dreamtune
from safetensors.torch import load_file
from tiny import disturb
from tiny_transformers import output, tiny
from torch import Tensor, nn

import dreamtune
from dreamtune import METHODS
from dreamtune.evaluation.analysis import analyse
from dreamtune.files.info import describe

KIND = "Flux2Transformer2DModel"
LAYER = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
TARGETS = ["to_qkv_mlp_proj", "to_out", "to_q"]
HEIGHTS = [16, 16, 16, 96]
LOW_RANK = [name for name, method in METHODS.items() if method.low_rank]
ALONE = """
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
base, out, *files = sys.argv[1:]
found = []
for file in files:
    pipe = DiffusionPipeline.from_pretrained(base)
    folder, _, name = file.rpartition("/")
    if name:
        pipe.load_lora_weights(folder, weight_name=name)
    pipe.set_progress_bar_config(disable=True)
    found.append(pipe(prompt="a sks dog", num_inference_steps=2, guidance_scale=1.0, height=16,
        width=16, generator=torch.Generator().manual_seed(0), output_type="pt").images)
assert "dreamtune" not in sys.modules
torch.save(found, out)
"""


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def check_blocks(up: Tensor, down: Tensor, rank: int) -> None:
    """Part i has rows and columns of its own."""
    assert up.shape == (sum(HEIGHTS), 4 * rank) and down.shape == (4 * rank, 16)
    for i, rows in enumerate(up.split(HEIGHTS)):
        for j, block in enumerate(rows.chunk(4, 1)):
            assert bool((block != 0).any()) is (i == j), (i, j)


@pytest.mark.parametrize("method", LOW_RANK)
def test_plain_loras_are_exact(method: str, tmp_path: Path) -> None:
    """In every format, from the adapter and from its file; of 4 times a part's rank."""
    options: dict[str, Any] = {"rank": 4} if method in ("hra", "lora", "delora") else {}
    network = tiny(KIND)
    adapter = dreamtune.inject(network, method, target_modules=TARGETS, **options)
    disturb(adapter, size=0.3)
    wanted = output(network)
    saved = adapter.save(tmp_path / "own.safetensors")
    files = {
        "diffusers": dreamtune.export(adapter, tmp_path / "d", "diffusers"),
        "kohya": dreamtune.export(adapter, tmp_path / "k", "kohya"),
    }
    (group,) = (g for g in adapter.groups if g.parts)
    rank = group.adapter.factors(group.weight)[0].shape[-1] // 4
    adapter.eject()
    before = output(network)
    assert float((wanted - before).abs().max()) > 1e-3
    for name in ("comfyui", "peft"):
        files[name] = dreamtune.export(saved, tmp_path / name, name, base=network)
    tensors = load_file(files["diffusers"])
    keys = [f"transformer.{LAYER}.lora_{x}.weight" for x in "BA"]
    check_blocks(tensors[keys[0]], tensors[keys[1]], rank)
    tensors = load_file(files["kohya"])
    keys = [f"lora_unet_single_blocks_0_linear1.lora_{x}.weight" for x in ("up", "down")]
    check_blocks(tensors[keys[0]], tensors[keys[1]], rank)
    for path in (saved, *files.values()):
        again = dreamtune.load(network, path)
        assert bool(again.parts) is (path == saved)
        close(output(network), wanted, 1e-5)
        again.eject()
    info = describe(saved, network)
    assert info.method.endswith("part by part in 2 layers") and max(info.ranks) == 4 * rank
    share = analyse(saved, network)["files"][0]["layers"][LAYER]["share"]
    assert share is None or 0 < share <= 1


def test_a_cut_is_the_best_of_the_whole(tmp_path: Path) -> None:
    """Eckart and Young of the layer, not of its parts."""
    network = tiny(KIND)
    adapter = dreamtune.inject(network, "lora", target_modules=TARGETS, rank=4)
    disturb(adapter, size=0.3)
    (group,) = (g for g in adapter.groups if g.parts)
    up, down = (x[0, 0].detach() for x in group.adapter.factors(group.weight))
    for name in ("diffusers", "native"):
        path = dreamtune.export(adapter, tmp_path / name, name, max_rank=3)
        there = load_file(path)
        keys = [k for k in there if k.removeprefix("transformer.").startswith(LAYER)]
        a, b = (there[k] for k in sorted(keys))
        u, s, v = torch.linalg.svd(up @ down)
        close(b @ a, (u[:, :3] * s[:3]) @ v[:3], 1e-5)


def test_stock_klein_draws_the_same(tmp_path: Path) -> None:
    """In a process without dreamtune, of files that diffusers names and that ComfyUI does."""
    from conftest import write_klein_pipeline
    from diffusers import DiffusionPipeline

    folder = write_klein_pipeline(tmp_path / "base")
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    network: nn.Module = pipe.transformer
    adapter = dreamtune.inject(network, "delora", target_modules=TARGETS)
    disturb(adapter, size=2.0)
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
    seed = torch.Generator().manual_seed(0)
    wanted = pipe(prompt="a sks dog", generator=seed, output_type="pt", **how).images
    files = [dreamtune.export(adapter, tmp_path / x, x) for x in ("diffusers", "comfyui")]
    without_dreamtune(ALONE, [folder, tmp_path / "out.pt", "/", *files], tmp_path / "log.txt")
    base, *found = torch.load(tmp_path / "out.pt")
    assert float((base - wanted).abs().max()) > 2e-3
    for image in found:
        close(image, wanted, 2e-5)


def test_a_lora_of_the_whole_layer_stays_one(tmp_path: Path) -> None:
    """As PEFT trains it: in the plugin, in a mix with one in parts, and exported again."""
    from diffusers import Flux2KleinPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs: Any = tiny(KIND)
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_qkv_mlp_proj"]))
    g = torch.Generator().manual_seed(2)
    state = get_peft_model_state_dict(theirs)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        {k: 2 * v if "lora_B" in k else v for k, v in get_peft_model_state_dict(theirs).items()},
    )
    assert len(state) == 4
    path = tmp_path / "pytorch_lora_weights.safetensors"
    wanted, network = output(theirs), tiny(KIND)
    own = dreamtune.inject(network, "delora", target_modules=TARGETS)
    disturb(own, size=0.5)
    saved = own.save(tmp_path / "own.safetensors")
    own.eject()
    loaded = dreamtune.load(network, path, name="theirs")
    assert loaded.parts == {} and list(loaded.state_dict()) == [
        f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj.{x}" for x in "AB" for i in range(2)
    ]
    close(output(network), wanted, 1e-5)
    dreamtune.load(network, saved, name="own")
    both = output(network)
    assert min(float((both - x).abs().max()) for x in (wanted, output(tiny(KIND)))) > 1e-3
    dreamtune.merge(network)
    close(output(network), both, 1e-5)
    dreamtune.unmerge(network)
    dreamtune.set_adapters(network, {"theirs": 1.0})
    close(output(network), wanted, 1e-5)
    with dreamtune.route(network, ["theirs"]):
        close(output(network), wanted, 1e-5)
    again = dreamtune.export(path, tmp_path / "again", "kohya", base=tiny(KIND))
    tensors = load_file(again)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (3, 16)
