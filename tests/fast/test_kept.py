"""What a fused block keeps for its backward: the peak of a step's memory is where that begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kept import bytes_kept, storages_kept
from torch import nn

from dreamtune.fast import fuse, ops
from dreamtune.fast import unet as fast_unet

N, SIDE, TIME = 2, 9, 24


class NoKernels:
    """Launches nothing: shapes, and what is kept, are those of the real ones."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, grid: Any) -> Any:
        return lambda *given, **named: None


@pytest.mark.parametrize("kernel, padding", [((3, 3), (1, 1)), ((1, 1), (0, 0)), ((3, 5), (0, 1))])
def test_a_convolution_has_torchs_values_and_gradients(
    kernel: tuple[int, int], padding: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight = draw(N, 6, SIDE, SIDE + 2).requires_grad_(), draw(5, 6, *kernel)
    y, wanted = ops.convolution(x, weight, padding), F.conv2d(x, weight, padding=padding)
    assert torch.equal(y, wanted)
    into = draw(*y.shape)
    (got,) = torch.autograd.grad(y, x, into)
    torch.testing.assert_close(got, *torch.autograd.grad(wanted, x, into), rtol=1e-12, atol=1e-12)


def test_a_convolution_keeps_its_weight_alone() -> None:
    x, weight = torch.randn(N, 6, SIDE, SIDE, requires_grad=True), torch.randn(5, 6, 3, 3)
    held = bytes_kept(lambda: ops.convolution(x, weight, (1, 1)))
    assert held == weight.nbytes < bytes_kept(lambda: F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("out", [32, 64])  # without and with a shortcut
def test_a_resnet_keeps_what_its_norms_read(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    monkeypatch.setattr(ops, "kernels", NoKernels)
    monkeypatch.setattr(ops, "accumulator", lambda dtype: None)
    block = ResnetBlock2D(in_channels=32, out_channels=out, temb_channels=TIME, groups=8)
    block.requires_grad_(False)
    holder = nn.ModuleList([block])
    assert fuse.fuse(holder).modules == [block]
    shape = N, 32, SIDE, SIDE
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    own = {p.nbytes for p in block.parameters()}
    kept = storages_kept(lambda: block(x, torch.randn(N, TIME)))
    pictures = [n for n in kept if n >= x.nbytes and n not in own]
    # the input, and the output of the first convolution; of no convolution the input
    assert sorted(pictures) == sorted([x.nbytes, x.nbytes // 32 * out])


@pytest.mark.parametrize(
    "change",
    [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"padding_mode": "circular"}, {"padding": "same"}],
)
def test_another_convolution_runs_as_diffusers_wrote_it(change: dict[str, Any]) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=32, temb_channels=TIME, groups=8)
    assert fast_unet.knows_resnet(block)
    for name, value in change.items():
        setattr(block.conv2, name, value)
    assert not fast_unet.knows_resnet(block)
