"""The methods that PEFT has as well: its settings and tensors for the same change.

What differs is said where it does; `tests/adapters/test_peft_parity.py` compares the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamtune.adapters.in_parts import joined
from dreamtune.files.formats import Change
from dreamtune.files.layers import on_meta, own_tensors
from dreamtune.injection.adapter_file import AdapterFile

Tensors = dict[str, Tensor]


class Form(NamedTuple):
    """A method as PEFT has it.

    Attributes:
        config: of `adapter_config.json`.
        tensors: by the ends of their keys, of a layer's own parameters and the base's weight.
        exact: whether rounded parameters still are the change.
        takes_weight: whether the weight is needed.
        whole: our tensors of a layer of those of its parts, from above; None where PEFT's layer
            cannot be several.
    """

    name: str
    config: dict[str, Any]
    tensors: Callable[[Tensors, Tensor | None], Tensors]
    exact: bool
    takes_weight: bool = False
    whole: Callable[[Sequence[Tensors]], Tensors] | None = None


def dora(options: Mapping[str, Any], parts: int) -> Form:
    """Of layers in P parts all have P times the rank, and so the same strength; where a layer is of
    fewer the rest is zero.
    """
    rank, alpha = parts * options["rank"], parts * options["alpha"]
    config = {"peft_type": "LORA", "use_dora": True, "r": rank, "lora_alpha": _whole(alpha)}

    def tensors(own: Tensors, weight: Tensor | None) -> Tensors:
        a, b = own["A"], own["B"]
        return {
            "lora_A.weight": F.pad(a, (0, 0, 0, rank - len(a))),
            "lora_B.weight": F.pad(b, (0, rank - b.shape[1])),
            "lora_magnitude_vector": own["magnitude"],
        }

    def whole(own: Sequence[Tensors]) -> Tensors:
        up, down = joined([part["B"] for part in own], [part["A"] for part in own])
        return {"A": down, "B": up, "magnitude": torch.cat([part["magnitude"] for part in own])}

    return Form("DoRA", config, tensors, exact=True, whole=whole)


def oft(options: Mapping[str, Any], parts: int) -> Form:
    """PEFT's inverse is of the other sign than its own sum of powers: it is ours of -Q."""
    config = {
        "peft_type": "OFT", "r": options["blocks"], "oft_block_size": 0,
        "use_cayley_neumann": not options["exact"], "num_cayley_neumann_terms": options["terms"],
    }  # fmt: skip
    sign = -1 if options["exact"] else 1
    return Form("OFT", config, lambda own, weight: {"oft_R.weight": sign * own["q"]}, exact=True)


def hra(options: Mapping[str, Any], parts: int) -> Form:
    """PEFT holds the vectors as columns. Pairs that are nearly equal lose their difference in fp16
    and bf16.
    """
    config = {"peft_type": "HRA", "r": options["rank"]}
    return Form("HRA", config, lambda own, weight: {"hra_u": own["u"].mT}, exact=False)


def delora(options: Mapping[str, Any], parts: int) -> Form | None:
    """The residual start is PEFT's DeLoRA of rank 2r: lambda' = 2 lambda, A' = [A; A0], B' =
    [B, -B0], whose difference fp16 and bf16 lose. Without norms or a constant lambda it is another
    function.
    """
    if not (options["normalize"] and options["weight_scaling"]):
        return None
    if options["multiplicative"] or options["timestep_floor"] != 1:
        return None
    residual = options["start"] == "residual"

    def tensors(own: Tensors, weight: Tensor | None) -> Tensors:
        assert weight is not None
        a, b, strength = own["A"], own["B"], own["lambda_"]
        if residual:
            a, b = torch.cat([a, own["A0"]]), torch.cat([b, -own["B0"]], 1)
            strength = 2 * strength
        norms = torch.linalg.vector_norm(weight, dim=0, dtype=a.dtype)
        return {
            "delora_A": a, "delora_B": b, "delora_lambda": strength, "delora_w_norm": norms,
        }  # fmt: skip

    rank = options["rank"] * (2 if residual else 1)
    return Form(
        "DeLoRA", {"peft_type": "DELORA", "r": rank}, tensors, not residual, takes_weight=True
    )


# Of the options, and the most parts that a layer is of, 1 where none is of several.
FORMS: dict[str, Callable[[Mapping[str, Any], int], Form | None]] = {
    "dora": dora, "oft": oft, "hra": hra, "delora": delora,
}  # fmt: skip


def form_of(change: Change) -> Form | None:
    """PEFT's own form of a method, as far as it holds the change in the file's dtype at its whole
    rank.
    """
    make = FORMS.get(change.file.method)
    whole = all(len(shape) == 2 for shape in change.file.shapes.values())
    if make is None or change.max_rank is not None or not whole or change.file.layer_options:
        return None
    parts = max(map(len, change.file.parts.values()), default=1)
    found = make(on_meta(change.file).options, parts)  # the file may be older than an option
    if found is None or not (found.exact or change.dtype == torch.float32):
        return None
    return found if not change.file.parts or found.whole is not None else None


def tensors_of(form: Form, file: AdapterFile, path: str) -> Tensors:
    """Of a layer, by the ends of their keys."""
    own = own_tensors(file, path)
    if parts := file.parts.get(path):
        assert form.whole is not None
        own = form.whole([own_tensors(file, f"{path}.{name}") for name in parts])
    return form.tensors(own, file.weights.get(path))


def _whole(value: float) -> int | float:
    """PEFT calls alpha an int, and takes a float."""
    return int(value) if float(value).is_integer() else value
