"""The changes of LoHa and LoKr (LyCORIS, arXiv 2309.14859) as two factors, exact: no SVD.

Both are of low rank only up to a point: `r1 r2` for a Hadamard product of ranks r1 and r2, the
product of the ranks for a Kronecker product.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # up (out, r), down (r, in), of a convolution (r, in * kh * kw)


def hadamard(one: Factors, other: Factors) -> Factors:
    """`(up1 down1) * (up2 down2)`, element by element, of rank r1 r2 (LoHa, equation 7).

    The element (o, i) is a sum over pairs of ranks (j, k) of `up1[o,j] up2[o,k]` times
    `down1[j,i] down2[k,i]`.
    """
    up = torch.einsum("oj,ok->ojk", one[0], other[0]).flatten(1)
    return up, torch.einsum("ji,ki->jki", one[1], other[1]).flatten(0, 1)


def kronecker(one: Factors, other: Factors) -> Factors:
    """`(up1 down1) ⊗ (up2 down2)` of rank r1 r2 (LoKr, equation 9), by the mixed product: the
    Kronecker products of the ups and of the downs.
    """
    return torch.kron(one[0], other[0]), torch.kron(one[1], other[1])


def tucker(core: Tensor, up: Tensor, down: Tensor) -> Factors:
    """A kernel (out, in, kh, kw) of a core (r, r, kh, kw) between 1x1 ones, up (r, out) and down
    (r, in), as LyCORIS keeps them: `sum_ij core[i, j, kh, kw] down[j, in] up[i, out]`.
    """
    return up.mT.contiguous(), torch.einsum("ijkl,jn->inkl", core, down).flatten(1).contiguous()


def as_factors(whole: Tensor) -> Factors:
    """A matrix (a, b) as a product of rank min(a, b)."""
    small = torch.eye(min(whole.shape), dtype=whole.dtype)
    return (small, whole) if len(whole) <= whole.shape[1] else (whole, small)
