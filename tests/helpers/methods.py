"""A method on one random weight."""

import math

import torch

from dreamtune import METHODS


def make(method, options, shape=(24, 16), slots=1, dtype=torch.float64, seed=0):
    """(adapter, weight) with a random weight of `shape`; the adapter at its start."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g, dtype=dtype) / math.sqrt(shape[-1])
    generators = [torch.Generator().manual_seed(100 + s) for s in range(slots)]
    return METHODS[method](weight, slots=slots, generator=generators, **options), weight
