"""A base model, or its trained network alone, by folder, file, hub id or "embedded"."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dreamtune import embedded
from dreamtune.config import EMBEDDED
from dreamtune.injection.targets import unwrapped
from dreamtune.models.base import Base, Parts
from dreamtune.models.checkpoint import kind_of
from dreamtune.models.folder import ModelFolder, looks_like_a_path
from dreamtune.models.prefixes import TRANSFORMER, Prefixes
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.room import check_room, weights_of_file, weights_of_folder
from dreamtune.models.rules import NAMED
from dreamtune.models.single_file import load_encoders, load_file

PACKAGED_MODEL = embedded.MODEL


class Family(NamedTuple):
    """Where a family is.

    Attributes:
        title: as users know it.
        module, name: its module in this folder, and its class there.
        pipelines: their names in a model_index.json, those of the same parts.
        since: the diffusers that has the first of these, as it is used here.
        kinds: of single files, as `checkpoint.KINDS` names them.
    """

    title: str
    module: str
    name: str
    pipelines: tuple[str, ...]
    since: str
    kinds: tuple[str, ...] = ()


# Plain, so that a family is imported when a base of it is loaded.
FAMILIES = (
    Family(
        "Stable Diffusion 1.x, 2.x",
        "stable_diffusion",
        "StableDiffusion",
        (
            "StableDiffusionPipeline",
            "StableDiffusionPipelineSafe",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipelineLegacy",
        ),
        "0.1.0",
        ("v1", "v2"),
    ),
    Family(
        "Stable Diffusion XL",
        "stable_diffusion_xl",
        "StableDiffusionXL",
        ("StableDiffusionXLPipeline",),
        "0.19.0",
        ("xl",),
    ),
    Family(
        "Stable Diffusion 3, 3.5",
        "stable_diffusion_3",
        "StableDiffusion3",
        ("StableDiffusion3Pipeline",),
        "0.29.0",
    ),
    Family("Flux.1", "flux", "Flux", ("FluxPipeline",), "0.30.0"),
    Family("Chroma", "chroma", "Chroma", ("ChromaPipeline",), "0.36.0"),
    Family("Flux.2 klein", "flux2_klein", "Flux2Klein", ("Flux2KleinPipeline",), "0.37.0"),
    Family("Qwen-Image", "qwen_image", "QwenImage", ("QwenImagePipeline",), "0.37.0"),
    Family("Krea 2", "krea2", "Krea2", ("Krea2Pipeline",), "0.39.0"),
    Family("Z-Image", "z_image", "ZImage", ("ZImagePipeline",), "0.36.0"),
)


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

    The network comes in `dtype` on `device`; all other parts wait on the CPU (see `Base`).
    Raises ValueError for what is no text-to-image model of the `FAMILIES`, for a hub id that cannot
    be had, and for a network that is larger than the memory of `device`.
    """
    path = locate(name_or_path)
    ours = path is not None and path.resolve() == PACKAGED_MODEL.resolve()
    device = torch.device(device)
    notes: list[str] = []
    read_encoders: Callable[[], Parts]
    with quiet_diffusers():
        if path is not None and not path.is_dir():
            family, name = family_class(family_of_file(path)), path.stem
            check_room(name, partial(weights_of_file, path), dtype, device)
            parts = load_file(path, dtype, prediction_type, notes)
            read_encoders = partial(load_encoders, path)
        else:
            folder = open_folder(str(path or name_or_path), revision, variant)
            family = family_class(family_of(folder))
            name = EMBEDDED if ours else path.resolve().name if path else name_or_path
            count = partial(weights_of_folder, folder, family.network_name)
            check_room(name, count, dtype, device)
            parts = family.load_folder(folder, dtype, prediction_type)
            notes = folder.notes
            read_encoders = partial(family.load_encoders, folder, family.encoder_dtype(dtype))
    base: Base = family(
        parts,
        id=name,
        embedded=ours,
        device=device,
        dtype=dtype,
        notes=notes,
        read_encoders=read_encoders,
    )
    return base


def open_folder(
    source: str, revision: str | None, variant: str | None, network_alone: bool = False
) -> ModelFolder:
    """A folder here, or a hub id with the parts of every family."""
    families = [family_class(family) for family in FAMILIES]
    parts = [p for f in families for p in ((f.network_name,) if network_alone else f.folders)]
    return ModelFolder.open(source, revision, variant, list(dict.fromkeys(parts)))


def family_of(folder: ModelFolder) -> Family:
    """By its model_index.json. Raises ValueError for a family that is not here."""
    kind = folder.index()["_class_name"]
    for family in FAMILIES:
        if kind in family.pipelines:
            return installed(family)
    known = "; ".join(f"{family.title} ({family.pipelines[0]})" for family in FAMILIES)
    raise ValueError(
        f"`{folder.name}` is a {kind[:100]}, which is none of the families that can be tuned here: "
        f"{known}."
    )


def family_of_file(path: Path) -> Family:
    """By the file's header."""
    kind = kind_of(path)
    return installed(next(family for family in FAMILIES if kind in family.kinds))


def family_of_network(folder: ModelFolder) -> Family:
    """Of a network's folder alone: by the class in its config.json, the first family's for one
    without, whose `load_network` says what is missing.
    """
    for family in FAMILIES:
        own = family_class(family)
        part = own.network_name if "config.json" in folder.names(own.network_name) else ""
        there = "config.json" in folder.names(part)
        if there and folder.config(part, NAMED).get("_class_name") == own.network_class:
            return installed(family)
    return FAMILIES[0]


def installed(family: Family) -> Family:
    """Raises ValueError where the diffusers that is installed has no such pipeline, or an older
    one.
    """
    import diffusers
    from packaging.version import Version

    there = Version(diffusers.__version__).release >= Version(family.since).release
    if not there or not hasattr(diffusers, family.pipelines[0]):
        raise ValueError(
            f"{family.title} needs diffusers {family.since} or newer, with its "
            f"{family.pipelines[0]}; installed is {diffusers.__version__}: pip install --upgrade "
            "diffusers."
        )
    return family


def family_class(family: Family) -> type[Any]:
    """The subclass of `Base`."""
    module = importlib.import_module(f"dreamtune.models.{family.module}")
    found: type[Any] = getattr(module, family.name)
    return found


def prefixes_of(network: torch.nn.Module | None) -> Prefixes:
    """Of the keys of LoRA files for that network: its family's; diffusers' of any transformer, for
    one of its that no family has; else those of the first family.
    """
    own = None if network is None else family_with(network)
    if own is None and network is not None and _is_transformer(type(unwrapped(network))):
        roots = tuple(f"{name}." for name, _ in unwrapped(network).named_children())
        return Prefixes(TRANSFORMER, "lora_unet_", roots)  # the latter of every network
    found: Prefixes = (own or family_class(FAMILIES[0])).prefixes
    return found


def known_prefixes() -> list[Prefixes]:
    """Those of all families, each once: of files whose network is not known."""
    return list(dict.fromkeys(family_class(family).prefixes for family in FAMILIES))


def prefixes_for(layers: Iterable[str]) -> Prefixes:
    """Of the first family whose networks have the first part of one of these module paths; else
    those of the first family.
    """
    paths, known = tuple(layers), known_prefixes()
    return next((p for p in known if any(x.startswith(p.roots) for x in paths)), known[0])


def family_with(network: torch.nn.Module) -> type[Any] | None:
    """The first subclass of `Base` whose networks are of that class."""
    kind = type(unwrapped(network)).__name__
    families = (family_class(family) for family in FAMILIES)
    return next((own for own in families if own.network_class == kind), None)


def _is_transformer(kind: type) -> bool:
    """Of diffusers, by what its classes inherit."""
    return "Transformer" in kind.__name__ and hasattr(kind, "load_config")


def load_network(
    source: Any, *, revision: str | None = None, variant: str | None = None
) -> torch.nn.Module:
    """The trained network: itself, also where it is given compiled or wrapped, of a pipeline, or
    loaded alone in float32 on the CPU from all that `load_base` takes or from a network's folder.
    Raises ValueError for anything else.
    """
    if not isinstance(source, (str, Path)):
        names = [family_class(family).network_name for family in FAMILIES]
        found = [getattr(source, name) for name in names if hasattr(source, name)]
        network = source if isinstance(source, torch.nn.Module) else next(iter(found), None)
        if not isinstance(network, torch.nn.Module):
            raise ValueError(
                "`base` must be a network, a pipeline, a folder, a .safetensors file, a hub id or "
                f'"{EMBEDDED}", got a {type(source).__name__}'
            )
        return unwrapped(network)
    path = locate(source)
    with quiet_diffusers():
        if path is not None and not path.is_dir():
            family = family_class(family_of_file(path))
            network = load_file(path, torch.float32, None, [], network_alone=True)
            network = network[family.network_name]
        else:
            folder = open_folder(str(path or source), revision, variant, True)
            whole = path is None or (path / "model_index.json").exists()
            own = family_of(folder) if whole else family_of_network(folder)
            network = family_class(own).load_network(folder, torch.float32)
    network.requires_grad_(False).eval()
    return network  # type: ignore[no-any-return]


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
