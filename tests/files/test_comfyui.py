"""ComfyUI's files of transformers, written: names, fused layers, stock diffusers as reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_pipeline
from diffusers.loaders import single_file_utils as single_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import disturb, tiny_unet
from tiny_transformers import MAKE, output, tiny
from torch import Tensor, nn
from transformer_files import C, assert_same, factors_for, model_of, products, read, write

import dreamtune
from dreamtune.files.comfyui_names import FAMILIES, comfyui_names
from dreamtune.files.formats import LayerFactors, read_adapter
from dreamtune.files.info import describe
from dreamtune.files.layers import factors_of_adapter
from dreamtune.files.names import flat
from dreamtune.injection.targets import layers_of

# What reads such a file in diffusers, and the layers that it reads rightly: see `comfyui.py`.
LOADERS: dict[str, tuple[Any, str]] = {
    "FluxTransformer2DModel": (lora_pipeline.FluxLoraLoaderMixin, "re:transformer_blocks.*"),
    "Flux2Transformer2DModel": (lora_pipeline.Flux2LoraLoaderMixin, "re:(?!norm_out).*"),
    "QwenImageTransformer2DModel": (lora_pipeline.QwenImageLoraLoaderMixin, "re:.*"),
    "ZImageTransformer2DModel": (lora_pipeline.ZImageLoraLoaderMixin, "re:(?!all_).*"),
}
CHECKPOINTS: dict[str, Any] = {
    "Flux2Transformer2DModel": single_file.convert_flux2_transformer_checkpoint_to_diffusers,
    "SD3Transformer2DModel": single_file.convert_sd3_transformer_checkpoint_to_diffusers,
    "ZImageTransformer2DModel": single_file.convert_z_image_transformer_checkpoint_to_diffusers,
}
each_kind = pytest.mark.parametrize("kind", FAMILIES)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(list(FAMILIES)), blocks=st.integers(1, 12))
def test_every_layer_has_one_name_and_no_two_share_it(kind: str, blocks: int) -> None:
    """The map is one to one, and a name means no other layer by its path."""
    count = {"n_layers": blocks} if kind.startswith("ZImage") else {"num_layers": blocks}
    with torch.device("meta"):
        network = MAKE[kind](**count)
    names = comfyui_names(network)
    paths = [path for layer in names.values() for path in layer.paths]
    assert sorted(paths) == sorted(layers_of(network)) and len(set(paths)) == len(paths)
    for name, layer in names.items():
        assert name not in paths or layer.paths == (name,)
    flats, of_paths = {flat(name): name for name in names}, {flat(path): path for path in paths}
    assert len(flats) == len(names)
    for word in flats.keys() & of_paths.keys():
        assert names[flats[word]].paths == (of_paths[word],)


@pytest.mark.parametrize("kind", LOADERS)
def test_stock_diffusers_gives_the_injected_models_output(kind: str, tmp_path: Path) -> None:
    loader, targets = LOADERS[kind]
    network = tiny(kind)
    plain = output(network)
    if kind == "FluxTransformer2DModel":  # its converter knows single blocks of 3072 alone
        targets = f"re:(?!single_).*{targets.removeprefix('re:')}"
    adapter = dreamtune.inject(network, "delora", rank=3, target_modules=[targets])
    disturb(adapter)
    wanted = output(network)
    path = dreamtune.export(adapter, tmp_path, "comfyui")
    assert path.name == "adapter_comfyui.safetensors"
    torch.testing.assert_close(output(loaded(loader, path, kind)), wanted, rtol=0, atol=1e-5)
    assert float((wanted - plain).abs().max()) > 1e-2


def loaded(loader: Any, path: Path, kind: str) -> nn.Module:
    """A transformer with a file, as the pipeline's `load_lora_weights` loads it."""
    network = tiny(kind)
    found = loader.lora_state_dict(path.parent, weight_name=path.name)
    more = {"network_alphas": None} if kind == "FluxTransformer2DModel" else {}
    tensors = found[0] if isinstance(found, tuple) else found
    loader.load_lora_into_transformer(tensors, transformer=network, **more)
    return network


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@each_kind
def test_the_other_formats_of_a_transformer(format: str, kind: str, tmp_path: Path) -> None:
    """`diffusers` has diffusers' prefix, `kohya` the names of ComfyUI; both come back as they went,
    and stock diffusers reads what it has a reader for.
    """
    loader, targets = LOADERS.get(kind, (lora_pipeline.SD3LoraLoaderMixin, "re:.*"))
    if kind == "FluxTransformer2DModel":
        targets = f"re:(?!single_).*{targets.removeprefix('re:')}"
    network = tiny(kind)
    adapter = dreamtune.inject(network, "lora", rank=3, target_modules=[targets])
    disturb(adapter)
    wanted, changes = output(network), products(factors_of_adapter(adapter))
    path = dreamtune.export(adapter, tmp_path, format)
    native = adapter.save(tmp_path / "native")
    adapter.eject()
    start = {"diffusers": "transformer.", "kohya": "lora_unet_"}[format]
    assert all(key.startswith(start) for key in load_file(path))
    assert_same(read(path, network), changes)
    if format == "kohya" and kind != "QwenImageTransformer2DModel":  # known without the network
        assert {flat(name) for name in comfyui_names(network)} >= set(describe(path).layers)
    if format == "diffusers" or kind in ("FluxTransformer2DModel", "QwenImageTransformer2DModel"):
        torch.testing.assert_close(output(loaded(loader, path, kind)), wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is no layer of a UNet.*give a transformer as `base`"):
        dreamtune.export(native, tmp_path / "x", format)
    only = dreamtune.inject(network, "lora", rank=1, target_modules=["to_q"]).save(tmp_path / "q")
    with pytest.raises(ValueError, match="only its network tells its name in the file: pass"):
        dreamtune.export(only, tmp_path / "x", format)


@pytest.mark.parametrize("left_out", ["", "proj_mlp", "attn.to_k"])
def test_stock_diffusers_reads_the_rest_of_flux(left_out: str, tmp_path: Path) -> None:
    """A single block of its width, where `linear1` is three projections and the feed-forward, a
    part of it perhaps without a change; and what diffusers takes right, but gives no prefix, so
    that its pipeline leaves it out.
    """
    wide = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}
    with torch.device("meta"):
        network = MAKE["FluxTransformer2DModel"](num_layers=0, num_single_layers=1, **wide)
    every = factors_for(network)
    kept = {p: f for p, f in every.items() if not (left_out and p.endswith(left_out))}
    path = write(tmp_path / "x.safetensors", network, kept)
    found = lora_pipeline.FluxLoraLoaderMixin.lora_state_dict(path)
    for p in every:
        key = f"transformer.{p}" if p.startswith("single_") else p
        up, down = (found.pop(f"{key}.lora_{x}.weight") for x in "BA")
        if p in kept:
            wanted_up, wanted_down = kept[p]
            x = torch.randn(3, down.shape[1], generator=torch.Generator().manual_seed(0))
            got, wanted = x @ down.mT @ up.mT, x @ wanted_down.mT @ wanted_up.mT
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)
        else:
            assert not up.any()
    assert not found
    assert read_adapter(path, network).shapes.keys() == kept.keys()


class Checkpoint(dict[str, Tensor]):
    """What is not there is zero: biases and norms."""

    def pop(self, key: str, *_: Any) -> Tensor:  # type: ignore[override]
        return super().pop(key, torch.zeros(6))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_names_are_those_of_the_checkpoint(kind: str, tmp_path: Path) -> None:
    """diffusers' converters of whole checkpoints take the changes, as ComfyUI adds them to the
    weights, to the layers that they are of, halves exchanged where they exchange them.
    """
    network = model_of(kind)
    factors = factors_for(network)
    tensors = load_file(write(tmp_path / "x.safetensors", network, factors))
    down, up = FAMILIES[kind].keys
    changes = Checkpoint()
    for key in (key for key in tensors if key.endswith(up)):
        one, other = tensors[key].flatten(1), tensors[key.replace(up, down)].flatten(1)
        changes[f"{key.removeprefix(C).removesuffix(up)}.weight"] = one @ other
    found = CHECKPOINTS[kind](changes)
    for path, wanted in products(factors).items():
        got = found[f"{path}.weight"].double()
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    swapped = [name for name, layer in comfyui_names(network).items() if layer.swapped]
    last = "final_layer.adaLN_modulation.1"
    wanted_names = {
        "Flux2Transformer2DModel": [last],
        "SD3Transformer2DModel": [last, "joint_blocks.1.context_block.adaLN_modulation.1"],
    }
    assert swapped == wanted_names.get(kind, [])


def test_the_last_modulation_of_flux_has_its_halves_exchanged(tmp_path: Path) -> None:
    network = model_of("FluxTransformer2DModel")
    up, down = factors_for(network)["norm_out.linear"]
    path = write(tmp_path / "x.safetensors", network, {"norm_out.linear": (up, down)})
    tensors = load_file(path)
    name = f"{C}final_layer.adaLN_modulation.1"
    assert torch.equal(tensors[f"{name}.lora_up.weight"], torch.cat([up[16:], up[:16]]))
    assert torch.equal(tensors[f"{name}.lora_down.weight"], down)
    assert_same(read(path, network), products({"norm_out.linear": (up, down)}))


@each_kind
def test_what_is_written_is_read_back_and_trained_further(kind: str, tmp_path: Path) -> None:
    """Of all layers; with the strengths, ranks and fingerprint; through other formats."""
    network = tiny(kind)
    adapter = dreamtune.inject(network, "lora", rank=3, target_modules=["re:.*"])
    disturb(adapter)
    wanted, changes = output(network), products(factors_of_adapter(adapter))
    path = dreamtune.export(adapter, tmp_path, "comfyui", metadata={"prompt": "a sks dog"})
    adapter.eject()
    again = dreamtune.load(network, path, trainable=True)
    torch.testing.assert_close(output(network), wanted, rtol=0, atol=1e-5)
    parameters = list(again.parameters())
    assert all(p.requires_grad for p in parameters)
    native = again.save(tmp_path / "n")
    again.eject()
    back = dreamtune.export(native, tmp_path / "again", "comfyui", base=network)
    assert_same(read(back, network), changes)
    assert_same(
        read(dreamtune.export(path, tmp_path / "p", "peft", base=network), network), changes
    )
    info = describe(path, network)
    assert info.format == "comfyui" and info.far == 0 and len(info.layers) == len(changes)
    most = 3 * max(map(len, adapter.parts.values()), default=1)  # of a layer in parts
    assert set(info.ranks) <= {1, 2, 3, most} and info.strengths == {1.0: len(changes)}
    names = comfyui_names(network)
    assert set(describe(path).layers) == set(names)  # without the network


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(list(FAMILIES)), seed=st.integers(0, 10**6))
def test_any_choice_of_layers_and_ranks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, seed: int
) -> None:
    """Parts that are left out stay out; one that is zero though it was trained is there."""
    network, g = model_of(kind), torch.Generator().manual_seed(seed)
    paths = list(layers_of(network))
    chosen = data.draw(st.sets(st.sampled_from(paths), min_size=1, max_size=9))
    factors: LayerFactors = {}
    for path in sorted(chosen):
        rank = int(torch.randint(1, 5, (), generator=g))
        up, down = factors_for(network, rank, seed)[path]
        empty = torch.rand((), generator=g) < 0.2
        factors[path] = up * 0 if empty else up, down
    path = write(tmp_path_factory.getbasetemp() / "any.safetensors", network, factors)
    assert_same(read(path, network), products(factors), 1e-4)


def test_refusals(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(4, 4))
    adapter = dreamtune.inject(other, "lora", rank=1, target_modules=["0"])
    known = f"`Sequential` in ComfyUI are not known.*{', '.join(FAMILIES)}, UNet2DConditionModel"
    with pytest.raises(ValueError, match=known):
        dreamtune.export(adapter, tmp_path, "comfyui")
    from diffusers import PixArtTransformer2DModel

    pixart = PixArtTransformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, caption_channels=12,
    )  # fmt: skip
    adapter = dreamtune.inject(pixart, "lora", rank=1)
    for format in ("comfyui", "kohya"):
        with pytest.raises(ValueError, match="`PixArtTransformer2DModel` in ComfyUI are not known"):
            dreamtune.export(adapter, tmp_path, format)
    with pytest.raises(ValueError, match="loads no LoRA into `PixArtTransformer2DModel`"):
        dreamtune.export(adapter, tmp_path)
    network = tiny("FluxTransformer2DModel")
    network.extra = nn.Linear(4, 4)
    adapter = dreamtune.inject(network, "lora", target_modules=["to_q", "extra"])
    with pytest.raises(ValueError, match="1 layers have no name in the checkpoint.*`extra` first"):
        dreamtune.export(adapter, tmp_path, "comfyui")
    adapter.eject()
    adapter = dreamtune.inject(network, "oft", target_modules=["to_q"])
    with pytest.raises(ValueError, match="no plain LoRA holds it"):
        dreamtune.export(adapter, tmp_path, "comfyui")
    assert not list(tmp_path.iterdir())
    adapter.eject()
    adapter = dreamtune.inject(network, "lora", target_modules=["to_q"])
    native = adapter.save(tmp_path)
    with pytest.raises(ValueError, match="names the layers as the base's checkpoint does: pass"):
        dreamtune.export(native, tmp_path / "out", "comfyui")
    path = dreamtune.export(adapter, tmp_path, "comfyui")
    with pytest.raises(ValueError, match="match no layer of the network"):
        dreamtune.load(tiny_unet(), path)
