"""ComfyUI's files of transformers, read: of other tools, damaged, wrong."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import damage
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_transformers import tiny
from torch import Tensor
from transformer_files import C, assert_same, factors_for, model_of, products, read, write

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.comfyui_names import FAMILIES
from dreamtune.files.formats import read_adapter
from dreamtune.files.info import describe
from dreamtune.files.layers import factors_of_adapter


def foreign(path: Path, tensors: dict[str, Tensor], **strings: str) -> Path:
    save_file({f"{C}{key}": t for key, t in tensors.items()}, path, strings)
    return path


def test_a_fused_layer_of_another_tool(tmp_path: Path) -> None:
    """One down for all three parts: each has its rows of up with the same down, and the strength of
    the whole; of a block-diagonal up its own block.
    """
    network, g = model_of("FluxTransformer2DModel"), torch.Generator().manual_seed(0)
    up, down = torch.randn(48, 4, generator=g), torch.randn(4, 16, generator=g)
    diagonal = torch.block_diag(*(torch.randn(16, 2, generator=g) for _ in range(3)))
    tensors = {
        "double_blocks.0.img_attn.qkv.lora_A.weight": down,
        "double_blocks.0.img_attn.qkv.lora_B.weight": up,
        "double_blocks.0.img_attn.qkv.alpha": torch.tensor(2.0),
        "double_blocks.1.txt_attn.qkv.lora_down.weight": torch.randn(6, 16, generator=g),
        "double_blocks.1.txt_attn.qkv.lora_up.weight": diagonal,
        "double_blocks.1.txt_attn.qkv.alpha": torch.tensor(3.0).to(torch.float8_e4m3fn),
    }
    path = foreign(tmp_path / "x.safetensors", tensors)
    other = tensors["double_blocks.1.txt_attn.qkv.lora_down.weight"]
    wanted = {}
    for n, word in enumerate("qkv"):
        rows = slice(16 * n, 16 * n + 16)
        wanted[f"transformer_blocks.0.attn.to_{word}"] = 0.5 * up[rows].double() @ down.double()
        change = 0.5 * diagonal[rows].double() @ other.double()
        wanted[f"transformer_blocks.1.attn.add_{word}_proj"] = change
    assert_same(read(path, network), wanted)
    info = describe(path, network)
    assert info.ranks == {4: 3, 2: 3} and info.strengths == {0.5: 6}
    stated = '{"transformer.r": 4, "transformer.lora_alpha": 8}'
    only = {k: t for k, t in tensors.items() if "img" in k and not k.endswith("alpha")}
    twice = {p: c * 4 for p, c in wanted.items() if "to_" in p}
    header = foreign(tmp_path / "y.safetensors", only, lora_adapter_metadata=stated)
    assert_same(read(header, network), twice)


def test_a_pipeline_with_a_transformer(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    network, parts = tiny("FluxTransformer2DModel"), FluxPipeline.__init__.__annotations__
    pipe = FluxPipeline(**dict.fromkeys(parts) | {"transformer": network,
                        "scheduler": FlowMatchEulerDiscreteScheduler()})  # fmt: skip
    path = write(tmp_path / "x.safetensors", network, factors_for(network))
    with pytest.warns(UserWarning, match="50 of 50 layers differ"):  # `write` keeps no prints
        adapter = dreamtune.load(pipe, path, force=True)
    assert adapter.model is network
    assert_same(products(factors_of_adapter(adapter)), products(factors_for(network)))


def test_a_zero_part_of_another_tools_file_is_a_layer(tmp_path: Path) -> None:
    network, g = model_of("ZImageTransformer2DModel"), torch.Generator().manual_seed(0)
    up = torch.cat([torch.randn(32, 4, generator=g), torch.zeros(32, 4), torch.ones(32, 4)])
    qkv = "layers.0.attention.qkv.lora"
    path = foreign(
        tmp_path / "x.safetensors",
        {f"{qkv}_up.weight": up, f"{qkv}_down.weight": torch.randn(4, 32, generator=g)},
    )
    file = read_adapter(path, network)
    assert {p: file.options_at(p)["rank"] for p in file.shapes} == {
        f"layers.0.attention.to_{word}": 4 for word in "qkv"
    }


def test_module_paths_behind_the_prefix(tmp_path: Path) -> None:
    """As some tools write Z-Image and Flux.2; not beside the same layer in one piece."""
    network = model_of("ZImageTransformer2DModel")
    factors = {p: f for p, f in factors_for(network).items() if "layers.1.att" in p}
    tensors = {f"{p}.lora_B.weight": up for p, (up, _) in factors.items()}
    tensors |= {f"{p}.lora_A.weight": down for p, (_, down) in factors.items()}
    path = foreign(tmp_path / "x.safetensors", tensors)
    assert_same(read(path, network), products(factors))
    qkv = "layers.1.attention.qkv"
    tensors |= {f"{qkv}.lora_up.weight": torch.ones(96, 1)}
    tensors |= {f"{qkv}.lora_down.weight": torch.ones(1, 32)}
    with pytest.raises(UnreadableFile, match=r"`x.safetensors` has two names for one layer"):
        read(foreign(path, tensors), network)


def test_loha_and_lokr_of_a_fused_layer(tmp_path: Path) -> None:
    network, g = model_of("SD3Transformer2DModel"), torch.Generator().manual_seed(0)
    name = "joint_blocks.0.x_block.attn2.qkv"
    a, b, c, d = (torch.randn(*s, generator=g) for s in ((48, 2), (2, 16), (48, 2), (2, 16)))
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    one, two, three = (torch.randn(*s, generator=g) for s in ((2, 2), (24, 2), (2, 8)))
    lokr = {"lokr_w1": one, "lokr_w2_a": two, "lokr_w2_b": three}
    whole = 0.5 * (a @ b).double() * (c @ d).double()
    for tensors, change in ((loha, whole), (lokr, 0.5 * torch.kron(one, two @ three).double())):
        tensors = {f"{name}.{k}": t for k, t in tensors.items()} | {f"{name}.alpha": torch.ones(())}
        path = foreign(tmp_path / "x.safetensors", tensors)
        parts = change.split(16)
        wanted = {f"transformer_blocks.0.attn2.to_{w}": x for w, x in zip("qkv", parts)}
        assert_same(read(path, network), wanted)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"img_attn.qkv.lora_up.weight": torch.ones(47, 2)}, "47 outputs, .* 16 . 16 . 16"),
        ({"img_attn.qkv.lora_up.weight": torch.ones(48, 3)}, "must be of one rank"),
        (
            {"img_attn.qkv.lora_down.weight": torch.ones(2, 15)},
            "to_q` is .* here and .16, 15. in",
        ),
        ({"img_attn.qkv.lora_up.weight": torch.ones(48, 2).long()}, "must be floats"),
        ({"img_attn.qkv.alpha": torch.ones(2)}, "`alpha` of .* must be one finite number"),
        ({"img_attn.qkv.diff": torch.ones(48, 16)}, "match no layer .*diff` first"),
        (
            {"img_attn.kqv.lora_up.weight": torch.ones(48, 2)},
            "match no layer .*kqv` first",
        ),
        ({"img_attn.qkv.dora_scale": torch.ones(48)}, "DoRA"),
        ({"img_attn.qkv.lora_B.weight": torch.ones(48, 2)}, "has its `up` twice"),
        ({"img_attn.qkv.lora_up.weight": torch.full((48, 2), torch.nan)}, "not finite"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    network = model_of("FluxTransformer2DModel")
    sound = {"img_attn.qkv.lora_up.weight": torch.ones(48, 2),
             "img_attn.qkv.lora_down.weight": torch.ones(2, 16)}  # fmt: skip
    tensors = {f"double_blocks.0.{k}": t for k, t in (sound | change).items()}
    with pytest.raises(UnreadableFile, match=f"x.safetensors`.*{said}"):
        read(foreign(tmp_path / "x.safetensors", tensors), network)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(FAMILIES)), ours=st.booleans())
def test_damage_is_named_and_leaves_the_network(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str, ours: bool
) -> None:
    rng, network = random.Random(seed), model_of(kind)
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write(path, network, factors_for(network))
    if not ours:
        save_file(load_file(path), path)
    before = {k: t.clone() for k, t in network.state_dict().items()}
    sound = read(path, network)
    path.write_bytes(rng.choice(damage.TENSORS)(path.read_bytes(), rng))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            adapter = dreamtune.load(network, path)
        except UnreadableFile as error:
            assert path.name in str(error)
            return
        finally:
            assert all(torch.equal(t, before[k]) for k, t in network.state_dict().items())
    got = products(factors_of_adapter(adapter))
    adapter.eject()
    if ours:  # its hashes tell what changed
        said = any(path.name in str(w.message) for w in caught)
        assert said or damage.equal(got, sound, 1e-6)
