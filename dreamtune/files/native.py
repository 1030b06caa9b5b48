"""The native file: every method's own parameters, by module path, and a JSON header."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dreamtune.files.find import adapter_file
from dreamtune.files.fingerprint import fingerprint
from dreamtune.files.formats import Format, Prefixes
from dreamtune.files.tensors import TensorFile, read_tensors, write_tensors
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.models.load import prefixes_of
from dreamtune.version import __version__

FORMAT_VERSION = 1


class Native(Format):
    file_name = "adapter.safetensors"

    def reads(self, file: TensorFile, prefixes: Prefixes) -> bool:
        return "method" in file.about

    def read(self, file: TensorFile, network: nn.Module | None, prefixes: Prefixes) -> AdapterFile:
        header = file.about
        if header["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"`{file.name}` has format version {header['format_version']}, this dreamtune reads"
                f" up to {FORMAT_VERSION}: install a newer one"
            )
        return AdapterFile(
            method=header["method"],
            options=header["options"],
            target_modules=tuple(header["target_modules"]),
            tensors=dict(file.tensors),
            metadata=header["metadata"],
            fingerprint=header["fingerprint"],
            shapes={name: (shape[0], shape[1]) for name, shape in header["shapes"].items()},
        )


FORMAT = Native()


def save_adapter(file: AdapterFile, path: str | Path) -> Path:
    """Writes one slot; a crash leaves an earlier file whole.

    path: the file, or a folder that gets `adapter.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / FORMAT.file_name
    about = {
        "format_version": FORMAT_VERSION,
        "dreamtune_version": __version__,
        "method": file.method,
        "options": file.options,
        "target_modules": list(file.target_modules),
        "shapes": {name: list(shape) for name, shape in file.shapes.items()},
        "fingerprint": file.fingerprint or fingerprint(file.weights),
        "metadata": file.metadata,
    }
    write_tensors(path, file.tensors, about)
    return path


InjectedAdapter.write = staticmethod(save_adapter)


def load_adapter_file(path: str | Path) -> AdapterFile:
    """Reads a native file, or the one that a folder means (`adapter_file`); a ValueError says what
    is wrong with another.
    """
    file = read_tensors(adapter_file(path))
    if "dreamtune" not in file.header:
        raise ValueError(f"`{file.name}` is not a native adapter file: no `dreamtune` header")
    prefixes = prefixes_of(None)
    if not FORMAT.reads(file, prefixes):
        raise ValueError(f"`{file.name}` is an exported file, not a native one")
    return FORMAT.read(file, None, prefixes)
