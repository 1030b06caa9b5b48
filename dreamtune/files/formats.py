"""The formats of adapter files: the contract of one, and the table of all.

A new format is a module in this folder and a line in `EXPORTS`: `dreamtune.export`,
`dreamtune.load`, the command's --format and the search for the file of a folder go over them. They
are plain, and a module is imported when its format is needed, so that `--help` costs no torch.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamtune.fields import UnreadableFile
from dreamtune.models.prefixes import Prefixes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dreamtune.files.tensors import TensorFile
    from dreamtune.injection.adapter_file import AdapterFile

# What `export` writes: name, which is the module's -> what reads it.
EXPORTS = {
    "diffusers": "`pipe.load_lora_weights`",
    "kohya": "ComfyUI, A1111",
    "comfyui": "ComfyUI",
    "peft": "`PeftModel.from_pretrained`",
    "merged": "diffusers' `from_pretrained`",
    "native": "dreamtune",  # what `InjectedAdapter.save` writes as well
}
NATIVE = "native"
UNNAMED = "adapter"  # the name of one that has none
OTHERS = (
    "For a LoRA of a text encoder use `pipe.load_lora_weights`, else the tool that wrote the file"
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# Module path -> up (out, r), down (r, in); of a convolution (r, in * kh * kw).
LayerFactors = dict[str, "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Change:
    """What is written: the change of a network at strength 1.

    Attributes:
        file: the adapter, its method's own parameters; with `weights` where the network is known.
        low_rank: computes the factors: in float64, recompressed, all of one rank, cut to
            `max_rank`. Only for a method that is low rank.
        dtype: of the file's tensors.
        about: JSON values for its header: the method, the base's fingerprint, metadata.
        title: a word for the header, the adapter's name.
        network: the base, None where it was not needed.
        pipeline: the base's, where it was given with the network.
        max_rank: None leaves the rank as it is.
        shard_size: bytes, or "5GB": of one file, where a format cuts a model into several.
        resolution: pixels a side, where the run says it.
    """

    file: AdapterFile
    low_rank: Callable[[], LayerFactors]
    dtype: torch.dtype
    about: Mapping[str, Any]
    prefixes: Prefixes
    title: str = UNNAMED
    network: nn.Module | None = None
    pipeline: Any = None
    max_rank: int | None = None
    shard_size: int | str = "5GB"
    resolution: int | None = None

    @cached_property
    def factors(self) -> LayerFactors:
        return self.low_rank()


class Format(ABC):
    """A format that is read.

    Attributes:
        file_name: of its files; "{name}" stands for the user's word; "" for any.
    """

    file_name: ClassVar[str]

    def reads(self, file: TensorFile, prefixes: Prefixes) -> bool:
        """Whether a file is of this format, by its keys and header."""
        return False

    def read(self, file: TensorFile, network: nn.Module | None, prefixes: Prefixes) -> AdapterFile:
        """The adapter in a file that it `reads`.

        network: where there is one, the layers must be its own. Names that the file shortens are
            looked up there.

        Raises ValueError for keys that are not understood, and for layers that do not fit.
        """
        raise NotImplementedError


class ExportFormat(Format):
    """A format that `export` writes, and may read.

    Attributes:
        whole_model: whether the base's other parts are written too, where it has them.
    """

    whole_model: ClassVar[bool] = False

    @abstractmethod
    def check(self, change: Change) -> str:
        """How such a file holds the method, the end of "written as ...". Nothing is computed yet,
        and there may be no network.

        Raises ValueError for what it cannot hold, and says what can.
        """

    def needs_base(self, change: Change) -> str:
        """Why the base is needed, as the start of a sentence; "" where it is not."""
        from dreamtune.adapters import find_method

        method = find_method(change.file.method)
        name = change.file.exported_from or method.name
        return f"`{name}` contains the base weights" if method.depends_on_weight else ""

    @abstractmethod
    def write(self, path: Path, change: Change, overwrite: bool) -> None:
        """Whole or not at all. Raises ValueError where other contents would be replaced without
        `overwrite`.
        """

    @abstractmethod
    def usage(self, path: Path, change: Change) -> str:
        """Lines of Python that use it, from the folder above; `pipe` is the base's pipeline."""

    def place(self, folder: Path, name: str) -> Path:
        """What is written in a folder."""
        return folder / self.file_name.format(name=name)


def export_format(name: str) -> ExportFormat:
    """Raises ValueError for an unknown name."""
    if name not in EXPORTS:
        listed = ", ".join(f"{name} ({reader})" for name, reader in EXPORTS.items())
        raise ValueError(f"`format` must be one of {listed}, got {name!r}")
    found = _load(name)
    assert isinstance(found, ExportFormat)
    return found


def formats() -> dict[str, Format]:
    """All, in the order in which a file or a folder is asked for them."""
    return {name: _load(name) for name in dict.fromkeys((NATIVE, *EXPORTS))}


def _load(name: str) -> Format:
    found = importlib.import_module(f"dreamtune.files.{name}").FORMAT
    assert isinstance(found, Format)
    return found


def read_adapter(
    path: Path, network: nn.Module | None = None, prefixes: Prefixes | None = None
) -> AdapterFile:
    """The adapter in a file of any format, all of it checked but the base. Raises UnreadableFile
    where none reads it, and for what is wrong in it.

    network: see `Format.read`. prefixes: by default those of the network's family; of no network,
    those that fit.
    """
    from dreamtune.files.tensors import naming
    from dreamtune.models.load import prefixes_of

    if prefixes is None and network is not None:
        prefixes = prefixes_of(network)
    _, found, file, own = open_adapter(path, prefixes)
    with naming(file.name):
        return found.read(file, network, own)


def is_adapter(path: Path) -> bool:
    """Whether some format reads a safetensors file, by its keys and header: the tensors are not
    read, for it may be a whole model. True of a damaged file, whose reader says what is wrong.
    """
    from dreamtune.files.tensors import read_keys
    from dreamtune.models.load import known_prefixes

    try:
        file = read_keys(path)
    except UnreadableFile:
        return True
    return any(found.reads(file, own) for own in known_prefixes() for found in formats().values())


def open_adapter(path: Path, prefixes: Prefixes | None) -> tuple[str, Format, TensorFile, Prefixes]:
    """A file, with the format that reads it, its name, and the prefixes by which it does. Raises
    UnreadableFile where none does. prefixes: None for those of any family.
    """
    from dreamtune.files.tensors import read_tensors
    from dreamtune.models.load import known_prefixes

    if path.suffix in PICKLES:
        raise UnreadableFile(
            f"`{path.name}` is a pickle, which may run code when it is read: load it where you"
            " trust it, with `pipe.load_lora_weights`, and save it with `pipe.save_lora_weights`"
        )
    file = read_tensors(path)
    for own in known_prefixes() if prefixes is None else [prefixes]:
        for name, found in formats().items():
            if found.reads(file, own):
                return name, found, file, own
    first = next(iter(file.tensors), "none")
    raise UnreadableFile(
        f"`{file.name}` is in none of the formats {', '.join(formats())}: its {len(file.tensors)} "
        f"keys match no layer of the network, `{first}` first. {OTHERS}"
    )
