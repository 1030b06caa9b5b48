"""The methods that PEFT has as well: its settings and tensors for the same change.

What differs is said where it does; `tests/adapters/test_peft_parity.py` compares the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamtune.files.formats import Change
from dreamtune.files.layers import on_meta

Tensors = dict[str, Tensor]


class Form(NamedTuple):
    """A method as PEFT has it.

    Attributes:
        config: of `adapter_config.json`.
        tensors: by the ends of their keys, of a layer's own parameters and the base's weight.
        exact: whether rounded parameters still are the change.
        takes_weight: whether the weight is needed.
    """

    name: str
    config: dict[str, Any]
    tensors: Callable[[Tensors, Tensor | None], Tensors]
    exact: bool
    takes_weight: bool = False


def dora(options: Mapping[str, Any]) -> Form:
    config = {"peft_type": "LORA", "use_dora": True, "r": options["rank"]}
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    return Form(
        "DoRA",
        {**config, "lora_alpha": _whole(options["alpha"])},
        lambda own, weight: {name: own[ours] for ours, name in names.items()},
        exact=True,
    )


def oft(options: Mapping[str, Any]) -> Form:
    """PEFT's inverse is of the other sign than its own sum of powers: it is ours of -Q."""
    config = {
        "peft_type": "OFT", "r": options["blocks"], "oft_block_size": 0,
        "use_cayley_neumann": not options["exact"], "num_cayley_neumann_terms": options["terms"],
    }  # fmt: skip
    sign = -1 if options["exact"] else 1
    return Form("OFT", config, lambda own, weight: {"oft_R.weight": sign * own["q"]}, exact=True)


def hra(options: Mapping[str, Any]) -> Form:
    """PEFT holds the vectors as columns. Pairs that are nearly equal lose their difference in fp16
    and bf16.
    """
    config = {"peft_type": "HRA", "r": options["rank"]}
    return Form("HRA", config, lambda own, weight: {"hra_u": own["u"].mT}, exact=False)


def delora(options: Mapping[str, Any]) -> Form | None:
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


FORMS: dict[str, Callable[[Mapping[str, Any]], Form | None]] = {
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
    found = make(on_meta(change.file).options)  # the file may be older than an option
    if found is None or not (found.exact or change.dtype == torch.float32):
        return None
    return found


def _whole(value: float) -> int | float:
    """PEFT calls alpha an int, and takes a float."""
    return int(value) if float(value).is_integer() else value
