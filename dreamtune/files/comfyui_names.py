"""Names of a network's layers in ComfyUI: those of the checkpoint that it was published as.

One table for both directions, a line of it a layer of the checkpoint. A network is added by an
entry of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from dreamtune.files.formats import Change
from dreamtune.files.names import checkpoint_names, flat
from dreamtune.injection.targets import layers_of, unwrapped

UNET = "UNet2DConditionModel"
# What follows a layer's name, of down and of up. ComfyUI reads all three; diffusers 0.42, where it
# reads such a file at all, one of them a family.
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
DOTTED = (".lora.down.weight", ".lora.up.weight")

Names = Mapping[str, str]  # name in the checkpoint -> path in diffusers, of several layers in order


@dataclass(frozen=True)
class Family:
    """How the layers of one class of diffusers are named.

    Attributes:
        keys: of a file that is written.
        stacks: list of blocks in diffusers -> the same in the checkpoint, and the names in a block.
        top: names outside of the blocks.
        same: diffusers has kept the checkpoint's names.
        swaps: diffusers' AdaLayerNormContinuous has scale before shift, the checkpoint behind it.
    """

    keys: tuple[str, str]
    stacks: Mapping[str, tuple[str, Names]] = field(default_factory=dict)
    top: Names = field(default_factory=dict)
    same: bool = False
    swaps: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer of the checkpoint.

    Attributes:
        paths: module paths of the layers that it is in diffusers, in the order of its outputs.
        swapped: the halves of its outputs stand the other way round there.
    """

    paths: tuple[str, ...]
    swapped: bool = False


_QKV, _ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
_FLUX_ATTENTION = {
    "img_attn.qkv": _QKV, "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": _ADDED, "txt_attn.proj": "attn.to_add_out",
}  # fmt: skip
_FLUX_TOP = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip

FLUX = Family(
    keys=KOHYA,
    stacks={
        "transformer_blocks": ("double_blocks", {
            **_FLUX_ATTENTION,
            "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
        }),
        "single_transformer_blocks": ("single_blocks", {
            "linear1": f"{_QKV} proj_mlp", "linear2": "proj_out", "modulation.lin": "norm.linear",
        }),
    },
    top={
        **_FLUX_TOP,
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    },
    swaps=True,
)  # fmt: skip
FLUX2 = Family(
    keys=PEFT,
    stacks={
        "transformer_blocks": ("double_blocks", {
            **_FLUX_ATTENTION,
            "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
        }),
        "single_transformer_blocks": ("single_blocks", {
            "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out",
        }),
    },
    top={
        **_FLUX_TOP,
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
    },
    swaps=True,
)  # fmt: skip
SD3 = Family(
    keys=KOHYA,
    stacks={
        "transformer_blocks": ("joint_blocks", {
            "x_block.attn.qkv": _QKV, "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "context_block.attn.qkv": _ADDED, "context_block.attn.proj": "attn.to_add_out",
            "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        }),
    },
    top={
        "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swaps=True,
)  # fmt: skip
_Z_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
    **{name: name for name in (
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0",
    )},
}  # fmt: skip
Z_IMAGE = Family(
    keys=DOTTED,
    stacks={s: (s, _Z_BLOCK) for s in ("layers", "noise_refiner", "context_refiner")},
    top={
        "x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
    },
)  # fmt: skip

# Class of diffusers -> its names.
FAMILIES = {
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "SD3Transformer2DModel": SD3,
    "QwenImageTransformer2DModel": Family(keys=PEFT, same=True),
    "ZImageTransformer2DModel": Z_IMAGE,
}


def family_of(network: nn.Module | None) -> Family | None:
    """Of a network's class or one that it is derived from."""
    kinds = () if network is None else type(unwrapped(network)).__mro__
    return next((FAMILIES[k.__name__] for k in kinds if k.__name__ in FAMILIES), None)


def comfyui_names(network: nn.Module | None) -> dict[str, Layer]:
    """Name in the checkpoint -> layer, of all that have one; {} for a network of another kind.

    A name whose layers are not all there has none: it could not be written whole.
    """
    if network is None:
        return {}
    network, family = unwrapped(network), family_of(network)
    paths = layers_of(network)
    if family is None:
        return {name: Layer((p,)) for name, p in checkpoint_names(paths, network).items()}
    if family.same:
        return {path: Layer((path,)) for path in paths}
    found = {}
    for name, own in _spelt(family, network).items():
        there = [path for path in own if path in paths]
        if len(there) == len(own):
            found[name] = Layer(own, family.swaps and _has_scale_first(network, own[0]))
    return found


def _spelt(family: Family, network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name -> paths, for as many blocks as the network has."""
    found = {name: tuple(paths.split()) for name, paths in family.top.items()}
    for ours, (theirs, names) in family.stacks.items():
        for number, _ in enumerate(getattr(network, ours, ())):
            for name, paths in names.items():
                own = tuple(f"{ours}.{number}.{path}" for path in paths.split())
                found[f"{theirs}.{number}.{name}"] = own
    return found


def _has_scale_first(network: nn.Module, path: str) -> bool:
    owner = network.get_submodule(path.rpartition(".")[0])
    return type(owner).__name__ == "AdaLayerNormContinuous"


def may_be_flat(name: str) -> bool:
    """Whether it may be a layer of some family with _ for each dot, where there is no network."""
    starts = {theirs for family in FAMILIES.values() for theirs, _ in family.stacks.values()}
    tops = {flat(top) for family in FAMILIES.values() for top in family.top}
    return name.startswith(tuple(f"{s}_" for s in (*starts, "transformer_blocks"))) or name in tops


def names_of(change: Change) -> dict[str, Layer]:
    """Of the checkpoint's layers that change. Raises ValueError for a network, or a layer, that has
    no name.
    """
    assert change.network is not None
    names, paths = comfyui_names(change.network), change.file.shapes
    if not names:
        kind = type(unwrapped(change.network)).__name__
        raise ValueError(
            f"the names of `{kind}` in ComfyUI are not known, known are those of"
            f" {', '.join((*FAMILIES, UNET))}: use the native file with `dreamtune.load`, or"
            " export it as `peft` or as `merged`"
        )
    found = {n: layer for n, layer in names.items() if any(path in paths for path in layer.paths)}
    named = {path for layer in found.values() for path in layer.paths}
    if missing := [path for path in paths if path not in named]:
        raise ValueError(
            f"{len(missing)} layers have no name in the checkpoint that ComfyUI reads,"
            f" `{missing[0]}` first: export it as `peft` or as `merged`, or leave them out of"
            " `target_modules`"
        )
    return found
