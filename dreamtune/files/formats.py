"""The formats of adapter files: the contract of one, and the table of all.

A new format is a module in this folder and a line in `EXPORTS`, or a word in `READ` where it is
not written: `dreamtune.export`, `dreamtune.load`, the command's --format and the search for the
file of a folder go over them. They are plain, and a module is imported when its format is needed,
so that `--help` costs no torch.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dreamtune.fields import UnreadableFile
from dreamtune.models.prefixes import Prefixes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dreamtune.adapters import Adapter
    from dreamtune.files.tensors import TensorFile
    from dreamtune.injection.adapter_file import AdapterFile

# What `export` writes: name, which is the module's -> what reads it.
EXPORTS = {
    "diffusers": "`pipe.load_lora_weights`",
    "kohya": "ComfyUI, A1111",
}
NATIVE = "native"  # what `InjectedAdapter.save` writes
READ = ("peft", "comfyui")  # what is read only
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

LayerFactors = dict[str, "tuple[Tensor, Tensor]"]  # module path -> up (out, r), down (r, in)


@dataclass(frozen=True)
class Change:
    """What is written: a low-rank change of a network.

    Attributes:
        factors: in float64, recompressed, all of one rank.
        dtype: of the file's tensors.
        about: JSON values for its header: the method, the base's fingerprint, metadata.
        network: the base, None where it was not needed.
    """

    factors: LayerFactors
    dtype: torch.dtype
    about: Mapping[str, Any]
    prefixes: Prefixes
    network: nn.Module | None = None


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
    """A format that `export` writes, and may read."""

    @abstractmethod
    def check(
        self, method: type[Adapter], options: Mapping[str, Any], network: nn.Module | None
    ) -> None:
        """Raises ValueError for what such a file cannot hold, and says what can."""

    @abstractmethod
    def write(self, path: Path, change: Change, overwrite: bool) -> None:
        """Whole or not at all. Raises ValueError where other contents would be replaced without
        `overwrite`.
        """


def export_format(name: str) -> ExportFormat:
    """Raises ValueError for an unknown name."""
    if name not in EXPORTS:
        raise ValueError(f"`format` must be one of {', '.join(EXPORTS)}, got {name!r}")
    found = _load(name)
    assert isinstance(found, ExportFormat)
    return found


def formats() -> dict[str, Format]:
    """All, in the order in which a file or a folder is asked for them."""
    return {name: _load(name) for name in (NATIVE, *EXPORTS, *READ)}


def _load(name: str) -> Format:
    found = importlib.import_module(f"dreamtune.files.{name}").FORMAT
    assert isinstance(found, Format)
    return found


def read_adapter(
    path: Path, network: nn.Module | None = None, prefixes: Prefixes | None = None
) -> AdapterFile:
    """The adapter in a file of any format, all of it checked but the base. Raises UnreadableFile
    where none reads it, and for what is wrong in it.

    network: see `Format.read`. prefixes: by default those of the network's family.
    """
    from dreamtune.files.tensors import naming
    from dreamtune.models.load import prefixes_of

    prefixes = prefixes or prefixes_of(network)
    _, found, file = open_adapter(path, prefixes)
    with naming(file.name):
        return found.read(file, network, prefixes)


def open_adapter(path: Path, prefixes: Prefixes) -> tuple[str, Format, TensorFile]:
    """A file, with the format that reads it and its name. Raises UnreadableFile where none does."""
    from dreamtune.files.tensors import read_tensors

    if path.suffix in PICKLES:
        raise UnreadableFile(
            f"`{path.name}` is a pickle, which may run code when it is read: load it where you"
            " trust it, with `pipe.load_lora_weights`, and save it with `pipe.save_lora_weights`"
        )
    file = read_tensors(path)
    for name, found in formats().items():
        if found.reads(file, prefixes):
            return name, found, file
    first = next(iter(file.tensors), "none")
    raise UnreadableFile(
        f"`{file.name}` is in none of the formats {', '.join(formats())}: its {len(file.tensors)} "
        f"keys match no attention projection, `{first}` first. For a LoRA of other layers use "
        "`pipe.load_lora_weights`"
    )
