"""One slot of an adapter as data: what an injected adapter gives, and what files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dreamtune.adapters.in_parts import Parts

Fingerprint = dict[str, list[float]]


@dataclass
class AdapterFile:
    """An adapter's method and tensors, and the base that it was made on.

    Attributes:
        tensors: `<module path>.<name>` -> parameters, and constants to be saved, of one slot.
        metadata: JSON values to keep: prompt, scores, base model id. No paths, no user names.
        shapes: module path -> (out, in) of each adapted layer, (out, in, kh, kw) of a convolution.
        fingerprint: of the base's weights, as it was read from a file; empty where `weights` are
            here.
        weights: module path -> frozen weight (out, in), or (out, in * kh * kw). Not written: their
            fingerprint is.
        exported_from: the method whose change it is, where a file holds only the factors of it;
            `method` is then LoRA.
        layer_options: module path -> the options of that layer that are not `options`.
        parts: module path -> outputs of the parts of that layer, from above, where the method acts
            on each for itself.
        some_layers: only `shapes` are changed, whatever other layers `target_modules` mean: they
            are ends of their names.
        source: name of the file that it was read from, for messages.
    """

    method: str
    options: dict[str, Any]
    target_modules: tuple[str, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    fingerprint: Fingerprint = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    exported_from: str | None = None
    source: str = "the adapter"
    some_layers: bool = False
    layer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: Mapping[str, Parts] = field(default_factory=dict)

    def options_at(self, path: str) -> dict[str, Any]:
        """The options of one layer."""
        return {**self.options, **self.layer_options.get(path, {})}
