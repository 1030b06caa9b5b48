"""Parity with PEFT's own layers on the same parameters, and every intended difference."""

import pytest
import torch
from methods import make
from tiny import disturb
from torch import nn


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.to_q = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
        self.to_q.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        return self.to_q(x)


def peft_output(config, weight, parameters, x):
    """The output of PEFT's layer with the given parameters."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(config, Holder(weight)).double()
    layer = model.to_q
    with torch.no_grad():
        for name, value in parameters.items():
            holder = getattr(layer, name)["default"]
            target = holder.weight if isinstance(holder, nn.Module) else holder
            assert target.shape == value.shape
            target.copy_(value)
        return model(x)


def assert_same(adapter, weight, config, parameters, atol=1e-10):
    x = torch.randn(5, weight.shape[1], dtype=torch.float64)
    theirs = peft_output(config, weight, parameters, x)
    torch.testing.assert_close(x @ adapter.merged(weight)[0].T, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("alpha", [None, 12])
def test_lora_is_peft_lora(alpha, stabilized):
    """Without alpha the scale is 1 here; PEFT's alpha is 8."""
    from peft import LoraConfig

    adapter, weight = make("lora", {"rank": 6, "alpha": alpha, "use_rslora": stabilized})
    disturb(adapter)
    config = LoraConfig(
        r=6, lora_alpha=adapter.options["alpha"], target_modules=["to_q"], use_rslora=stabilized
    )
    assert_same(adapter, weight, config, {"lora_A": adapter.A[0], "lora_B": adapter.B[0]})


def test_dora_is_peft_dora():
    from peft import LoraConfig

    adapter, weight = make("dora", {"rank": 6, "alpha": 9})
    disturb(adapter)
    parameters = {
        "lora_A": adapter.A[0],
        "lora_B": adapter.B[0],
        "lora_magnitude_vector": adapter.magnitude[0],
    }
    config = LoraConfig(r=6, lora_alpha=9, target_modules=["to_q"], use_dora=True)
    assert_same(adapter, weight, config, parameters)


@pytest.mark.parametrize("exact", [False, True])
def test_oft_is_peft_oft(exact):
    """PEFT's inverse is of the other sign than its own sum of powers: it is ours of -Q."""
    from peft import OFTConfig

    adapter, weight = make("oft", {"blocks": 4, "exact": exact})
    disturb(adapter)
    config = OFTConfig(oft_block_size=4, r=0, target_modules=["to_q"], use_cayley_neumann=not exact)
    assert_same(adapter, weight, config, {"oft_R": adapter.q[0] * (-1 if exact else 1)})


def test_hra_is_peft_hra():
    """PEFT holds the vectors as columns; of an odd rank it only warns."""
    from peft import HRAConfig

    adapter, weight = make("hra", {"rank": 6})
    disturb(adapter)
    config = HRAConfig(r=6, target_modules=["to_q"])
    assert_same(adapter, weight, config, {"hra_u": adapter.u[0].T})


@pytest.mark.parametrize("projection", ["relu", "qr"])
def test_deft_is_peft_deft(projection):
    """PEFT learns R itself, whose start is Pᵀ W / s; here its difference to that. PEFT computes in
    float32, and takes the signs of a QR decomposition as they come.
    """
    from peft import DeftConfig

    adapter, weight = make("deft", {"rank": 4, "alpha": 2.0, "projection": projection})
    disturb(adapter)
    contents = adapter._pair(adapter.P0[0])[1].T @ weight / 0.5 + adapter.R[0]
    if projection == "qr":
        contents = torch.linalg.qr(adapter.P[0])[1].diagonal().sign()[:, None] * contents
    config = DeftConfig(r=4, alpha=2, target_modules=["to_q"], decomposition_method=projection)
    parameters = {"deft_P": adapter.P[0], "deft_R": contents}
    assert_same(adapter, weight, config, parameters, atol=1e-5)


@pytest.mark.parametrize("start", ["peft", "residual"])
def test_delora_is_peft_delora(start):
    """The residual form is PEFT's of rank 2r: lambda' = 2 lambda, A' = [A; A0], B' = [B, -B0]."""
    from peft import DeloraConfig

    rank = 4
    adapter, weight = make("delora", {"rank": rank, "start": start, "lambda_init": 3.0})
    disturb(adapter)
    a, b, strength = adapter.A[0], adapter.B[0], adapter.lambda_[0]
    if start == "residual":
        a, b = torch.cat([a, adapter.A0[0]]), torch.cat([b, -adapter.B0[0]], 1)
        strength, rank = 2 * strength, 2 * rank
    x = torch.randn(5, weight.shape[1], dtype=torch.float64)
    config = DeloraConfig(r=rank, delora_lambda=1, target_modules=["to_q"])
    parameters = {"delora_A": a, "delora_B": b, "delora_lambda": strength}
    theirs = peft_output(config, weight, parameters, x)
    torch.testing.assert_close(x @ adapter.merged(weight)[0].T, theirs, rtol=0, atol=1e-10)
