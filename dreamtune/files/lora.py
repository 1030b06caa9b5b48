"""Plain LoRA: factors to the keys of diffusers and kohya files, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LayerFactors = dict[str, tuple[Tensor, Tensor]]


def recompress(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in float64, orthogonal on both sides, its size split evenly between them.

    Factors that cancel, or of very different size, lose accuracy in fp16; these do not. The rank
    stays, unless a side of the layer is narrower.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().mT)
    left, size, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    root = size.sqrt()
    return q_up @ (left * root), (root.unsqueeze(-1) * right) @ q_down.mT


def same_rank(factors: LayerFactors) -> LayerFactors:
    """Fills up with zeros to one rank: PEFT mixes up the alphas of a file of several ranks."""
    rank = max(up.shape[-1] for up, _ in factors.values())
    return {
        path: (F.pad(up, (0, rank - up.shape[-1])), F.pad(down, (0, 0, 0, rank - down.shape[-2])))
        for path, (up, down) in factors.items()
    }


def diffusers_keys(factors: LayerFactors, dtype: torch.dtype) -> dict[str, Tensor]:
    # No alpha: diffusers then takes alpha = rank, a scale of 1.
    tensors = {}
    for path, (up, down) in factors.items():
        tensors[f"unet.{path}.lora_A.weight"] = down.to(dtype).cpu().contiguous()
        tensors[f"unet.{path}.lora_B.weight"] = up.to(dtype).cpu().contiguous()
    return tensors


def kohya_keys(factors: LayerFactors, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for path, (up, down) in factors.items():
        key = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = down.to(dtype).cpu().contiguous()
        tensors[f"{key}.lora_up.weight"] = up.to(dtype).cpu().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def plain_lora(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Layer key -> (up, down) of a diffusers or kohya file, alpha in up; keys not understood.

    Layer keys are module paths, or kohya's `lora_unet_...` names.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    endings = {
        ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
        ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up", ".alpha": "alpha",
    }  # fmt: skip
    for key, tensor in tensors.items():
        ending = next((e for e in endings if key.endswith(e)), None)
        if ending is None or not key.startswith(("unet.", "lora_unet_")):
            unknown.append(key)
            continue
        layer = key.removesuffix(ending).removeprefix("unet.")
        parts.setdefault(layer, {})[endings[ending]] = tensor
    factors = {}
    for layer, found in parts.items():
        if "up" not in found or "down" not in found or found["up"].dim() != 2:
            unknown.append(layer)
            continue
        up, down = found["up"].float(), found["down"].float()
        rank = down.shape[0]
        alpha = float(found["alpha"]) if "alpha" in found else float(rank)
        factors[layer] = (up * (alpha / rank) if not math.isclose(alpha, rank) else up, down)
    return factors, unknown
