"""The timesteps that a strength goes by, of each network's own."""

from __future__ import annotations

import pytest
import torch
from tiny_transformers import MAKE, output, tiny

import dreamtune
from dreamtune.injection import timesteps as read


@pytest.mark.parametrize("kind", MAKE)
def test_a_strength_by_the_timestep(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`output` asks at 0.3 of the way, whose noise is 0.7 for Z-Image: a floor of 0 leaves as much
    as a scale does.
    """
    model = tiny(kind)
    base = output(model)
    adapter = dreamtune.inject(model, "delora", rank=2, timestep_floor=0.0, start="peft")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2)
    found = output(model)
    monkeypatch.setitem(read.KNOWN, kind, lambda t: torch.zeros_like(t))
    adapter.scale = 0.3 if kind == "ZImageTransformer2DModel" else 0.7
    torch.testing.assert_close(found, output(model), rtol=1e-4, atol=1e-6)
    assert float((found - base).abs().max()) > 1e-4
