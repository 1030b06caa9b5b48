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
from dreamtune.models.folder import looks_like_a_path, read_index
from dreamtune.models.prefixes import Prefixes
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.single_file import load_file

PACKAGED_MODEL = embedded.MODEL


class Family(NamedTuple):
    """Where a family is: its module and class in this folder, and what its pipelines' names begin
    with in a model_index.json.
    """

    module: str
    name: str
    pipeline: str


# Plain, so that a family is imported when a base of it is loaded.
FAMILIES = (Family("stable_diffusion", "StableDiffusion", "StableDiffusionPipeline"),)
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
    with quiet_diffusers():
        if path is not None and path.is_file():
            family, name = family_class(SINGLE_FILE), path.stem
            parts = load_file(path, prediction_type)
        else:
            source = str(path or name_or_path)
            family = family_class(family_of(source, revision))
            parts = family.load_folder(source, revision, variant, dtype)
            name = EMBEDDED if ours else path.resolve().name if path else name_or_path
    return family(
        *parts,
        id=name,
        embedded=ours,
        device=torch.device(device),
        dtype=dtype,
        prediction_type=prediction_type,
    )


def family_of(source: str, revision: str | None = None) -> Family:
    """By the model_index.json of a folder or hub id. Raises ValueError for one that is not here."""
    kind = str(read_index(source, revision).get("_class_name", "?"))
    for family in FAMILIES:
        if kind.startswith(family.pipeline):
            return family
    known = ", ".join(family.pipeline for family in FAMILIES)
    raise ValueError(
        f"`{source}` is a {kind}; a Stable Diffusion 1.x/2.x text-to-image model is needed "
        f"({known})."
    )


def family_class(family: Family) -> type[Any]:
    """The subclass of `Base`."""
    module = importlib.import_module(f"dreamtune.models.{family.module}")
    found: type[Any] = getattr(module, family.name)
    return found


def prefixes_of(network: torch.nn.Module | None) -> Prefixes:
    """Of the keys of LoRA files for that network; those of the first family for one that no family
    has, and for none.
    """
    families = [family_class(family) for family in FAMILIES]
    own = (f.prefixes for f in families if f.network_class == type(network).__name__)
    found: Prefixes = next(own, families[0].prefixes)
    return found


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
                f'"{EMBEDDED}", got {source!r}'
            )
        return unwrapped(network)
    path = locate(source)
    with quiet_diffusers():
        if path is not None and path.is_file():
            network = load_file(path, prediction_type=None)[0]
        else:
            where, families = str(path or source), list(FAMILIES)
            if path is None or (path / "model_index.json").is_file():
                families = [family_of(where, revision)]
            family = family_class(families[0])
            network = family.load_network(where, revision, variant, torch.float32)
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
