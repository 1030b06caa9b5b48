"""`eval/speed/step.py` on tiny transformers of the flow-matching families."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EVAL = Path(__file__).parents[2] / "eval"
sys.path += [str(EVAL), str(EVAL / "speed")]

import flow_models  # noqa: E402
import flow_peer  # noqa: E402
import step as script  # noqa: E402
from common import make_step  # noqa: E402
from others import diffusers_step, layers  # noqa: E402

# Name of the size, layers adapted, billions of weights of the published one.
NETWORKS = {"sd35": (19, 2.243), "z-image": (16, 6.155), "flux2-klein": (12, 3.876)}
# Of the last block, whose text nothing reads.
UNUSED = "transformer_blocks.1.attn.add_q_proj.lora_B.default.weight"
PUBLISHED = {"sd35": "sd35-medium", "z-image": "z-image", "flux2-klein": "flux2-klein-4b"}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--unet", f"{name}-tiny", "--device", "cpu", "--batches", "2", "--rank", "4"]
    flags += ["--repeats", "1", "--rounds", "2", "--no-kernels"]
    flags += ["--methods", "frozen,frozen-captured,eager-lora,diffusers-lora"]
    assert script.main(flags) == 0
    said = capsys.readouterr().out
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")][1:]
    assert [r[0] for r in rows] == ["| frozen", "| eager-lora", "| diffusers-lora"]
    ms = {r[0][2:]: float(r[2]) for r in rows}
    assert min(ms.values()) > 0 and all(0 <= float(r[4]) < 1 for r in rows)
    (ratio,) = [line for line in said.splitlines() if line.startswith("diffusers-lora / eager")]
    assert float(ratio.split()[-1]) == pytest.approx(
        ms["diffusers-lora"] / ms["eager-lora"], abs=0.05
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_both_steps_train_the_same_layers(name: str) -> None:
    """Ours and the peer's move what they train, of every layer, and nothing else."""
    adapted = NETWORKS[name][0]
    ours, theirs = (flow_models.FLOWS[f"{name}-tiny"].build("cpu", torch.float32) for _ in "12")
    before = {k: x.clone() for k, x in ours.state_dict().items()}
    assert len(layers(ours)) == adapted
    adapter, step = make_step(ours, "lora", batch=2, rank=4)
    assert len(adapter.weights()) == adapted
    step(0, 1.0)
    assert step.loss.isfinite().all() and step.skipped.item() == 0

    torch.manual_seed(0)
    call = diffusers_step(theirs, 4, 2)
    start = {k: p.detach().clone() for k, p in theirs.named_parameters() if p.requires_grad}
    assert len(start) == 2 * adapted
    call()
    found = dict(theirs.named_parameters())
    ups = [k for k in start if "lora_B" in k]
    assert len(ups) == adapted
    for name_, p in found.items():
        if name_ in ups:
            assert torch.equal(p, start[name_]) == (name_ == UNUSED), name_
        elif name_ not in start:
            assert torch.equal(p, before[name_.replace(".base_layer", "")]), name_


@pytest.mark.parametrize("name", NETWORKS)
def test_both_ask_the_network_the_same(name: str) -> None:
    """The prediction for the same latents, timesteps and prompts."""
    flow = flow_models.FLOWS[f"{name}-tiny"]
    network = flow.build("cpu", torch.float32)
    x, t = torch.randn(2, *flow.latents), torch.tensor([250.0, 700.0])
    torch.manual_seed(3)
    told = flow.conditioning(2, "cpu", torch.float32)
    torch.manual_seed(3)
    theirs = flow_peer.asked(flow, network, 2)
    with torch.no_grad():
        torch.testing.assert_close(flow.predictor(network)(x, t, told), theirs(x, t))


@pytest.mark.parametrize("name", NETWORKS)
def test_published_shapes(name: str) -> None:
    flow = flow_models.FLOWS[PUBLISHED[name]]
    network = flow.build("meta", torch.bfloat16)
    weights = sum(p.numel() for p in network.parameters())
    assert weights / 1e9 == pytest.approx(NETWORKS[name][1], abs=5e-4)
    assert flow_models.flow_of(network) is flow


@pytest.mark.parametrize("method", ["lycoris-lora", "dense-delora"])
def test_rows_of_unets_are_refused(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--unet", "sd35-tiny", "--device", "cpu", "--methods", method])
    assert f"of UNets alone: {method}" in capsys.readouterr().err
