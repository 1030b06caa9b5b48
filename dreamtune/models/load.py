"""A base model, or its trained network alone, by folder, file, hub id or "embedded"."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dreamtune import embedded
from dreamtune.config import EMBEDDED
from dreamtune.injection.targets import unwrapped
from dreamtune.models.base import Base
from dreamtune.models.folder import ModelFolder, looks_like_a_path
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.single_file import load_file

PACKAGED_MODEL = embedded.MODEL


class Family(NamedTuple):
    """Where a family is: its module and class in this folder, and its pipelines' names in a
    model_index.json, those of the same parts.
    """

    module: str
    name: str
    pipelines: tuple[str, ...]


# Plain, so that a family is imported when a base of it is loaded.
FAMILIES = (
    Family(
        "stable_diffusion",
        "StableDiffusion",
        (
            "StableDiffusionPipeline",
            "StableDiffusionPipelineSafe",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipelineLegacy",
        ),
    ),
)
SINGLE_FILE = FAMILIES[0]  # the family of single files


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Base:
    """The base from a folder, a single .safetensors file, a hub id, or "embedded".

    The UNet comes in `dtype` on `device`; autoencoder and text encoder wait on the CPU in float32.
    Raises ValueError for what is not a Stable Diffusion 1.x/2.x text-to-image model, and for a hub
    id that cannot be had.
    """
    path = locate(name_or_path)
    ours = path is not None and path.resolve() == PACKAGED_MODEL.resolve()
    notes: list[str] = []
    with quiet_diffusers():
        if path is not None and not path.is_dir():
            family, name = family_class(SINGLE_FILE), path.stem
            parts = load_file(path, prediction_type, notes)
        else:
            folder = open_folder(str(path or name_or_path), revision, variant)
            family = family_class(family_of(folder))
            parts = family.load_folder(folder, dtype, prediction_type)
            name = EMBEDDED if ours else path.resolve().name if path else name_or_path
            notes = folder.notes
    return family(
        *parts,
        id=name,
        embedded=ours,
        device=torch.device(device),
        dtype=dtype,
        notes=notes,
    )


def open_folder(
    source: str, revision: str | None, variant: str | None, network_alone: bool = False
) -> ModelFolder:
    """A folder here, or a hub id with the parts of every family."""
    families = [family_class(family) for family in FAMILIES]
    parts = [p for f in families for p in ((f.network_name,) if network_alone else f.parts)]
    return ModelFolder.open(source, revision, variant, parts)


def family_of(folder: ModelFolder) -> Family:
    """By its model_index.json. Raises ValueError for a family that is not here."""
    kind = folder.index()["_class_name"]
    for family in FAMILIES:
        if kind in family.pipelines:
            return family
    known = ", ".join(family.pipelines[0] for family in FAMILIES)
    raise ValueError(
        f"`{folder.name}` is a {kind[:100]}; a Stable Diffusion 1.x/2.x text-to-image model is "
        f"needed ({known})."
    )


def family_class(family: Family) -> type[Any]:
    """The subclass of `Base`."""
    module = importlib.import_module(f"dreamtune.models.{family.module}")
    found: type[Any] = getattr(module, family.name)
    return found


def prefixes_of(network: torch.nn.Module | None) -> Prefixes:
    """Of the keys of LoRA files for that network: its family's; diffusers' of any transformer, for
    one of its that no family has; else those of the first family.
    """
    families = [family_class(family) for family in FAMILIES]
    kind = type(None if network is None else unwrapped(network))
    own = next((f.prefixes for f in families if f.network_class == kind.__name__), None)
    if own is None and network is not None and _is_transformer(kind):
        roots = tuple(f"{name}." for name, _ in unwrapped(network).named_children())
        return Prefixes(TRANSFORMER, "lora_unet_", roots)  # the latter of every network
    found: Prefixes = own or families[0].prefixes
    return found


def _is_transformer(kind: type) -> bool:
    """Of diffusers, by what its classes inherit."""
    return "Transformer" in kind.__name__ and hasattr(kind, "load_config")


def load_network(
    source: Any, *, revision: str | None = None, variant: str | None = None
) -> torch.nn.Module:
    """The trained network: itself, also where it is given compiled or wrapped, of a pipeline, or
    loaded alone in float32 on the CPU from all that `load_base` takes or from a folder of a UNet.
    Raises ValueError for anything else.
    """
    if not isinstance(source, (str, Path)):
        names = [family_class(family).network_name for family in FAMILIES]
        found = [getattr(source, name) for name in names if hasattr(source, name)]
        network = source if isinstance(source, torch.nn.Module) else next(iter(found), None)
        if not isinstance(network, torch.nn.Module):
            raise ValueError(
                "`base` must be a UNet, a pipeline, a folder, a .safetensors file, a hub id or "
                f'"{EMBEDDED}", got a {type(source).__name__}'
            )
        return unwrapped(network)
    path = locate(source)
    with quiet_diffusers():
        if path is not None and not path.is_dir():
            network = load_file(path, None, [], network_alone=True)[0]
        else:
            folder, family = open_folder(str(path or source), revision, variant, True), FAMILIES[0]
            if path is None or (path / "model_index.json").exists():
                family = family_of(folder)
            network = family_class(family).load_network(folder, torch.float32)
    return network.requires_grad_(False).eval()


def locate(name_or_path: str | Path) -> Path | None:
    """Where a base is on this machine, None for a hub id. Raises ValueError for a path with nothing
    there.
    """
    name = str(name_or_path)
    path = PACKAGED_MODEL if name == EMBEDDED else Path(name).expanduser()
    if path.exists():
        return path
    if path == PACKAGED_MODEL or looks_like_a_path(name):
        raise ValueError(
            f"there is no base model at `{name}`: a folder with model_index.json, a .safetensors "
            "file, or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    return None
