"""The names of a family's layers in files. Without torch: formats are asked before it is there."""

from __future__ import annotations

from dataclasses import dataclass

TRANSFORMER = "transformer."  # of diffusers' keys for the transformer of any of its pipelines


@dataclass(frozen=True)
class Prefixes:
    """What stands before a module path in the keys of a LoRA file.

    Attributes:
        roots: what the paths themselves begin with, for files without a prefix.
    """

    peft: str
    kohya: str
    roots: tuple[str, ...] = ()
