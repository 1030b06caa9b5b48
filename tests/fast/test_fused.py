"""The fused step. Its kernels run in Triton's interpreter, which takes what the compiler does not:
so they are compiled too, for two makes of GPU, and run on one where there is one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from steps import make
from tiny import disturb, tiny_unet, tiny_xl_unet, unet_inputs, xl_inputs

from dreamtune.config import Config
from dreamtune.fast import fuse, ops
from dreamtune.injection.attention import JointProjections
from dreamtune.training.run import Run

pytest.importorskip("triton", reason="triton is not on this platform")
ROOT = Path(ops.__file__).parent


def load_kernels(module_name: str) -> ModuleType:
    """A copy of the module of its own."""
    name = f"compiled_{module_name}"
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{module_name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("lanes", [128, 512])
def test_kernels_compile(target: int, lanes: int) -> None:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"GROUPS": 32, "LANES": lanes, "ROWS": 8, "PARTS": 128, "ACC": tl.float32}
    kernels = [
        kernel
        for module in map(load_kernels, ("kernels", "row_kernels"))
        for name, kernel in vars(module).items()
        if hasattr(kernel, "params") and not name.startswith("_")
    ]
    assert len(kernels) == 16
    for kernel in kernels:
        declared = {p.name: p.annotation_type for p in kernel.params}
        assert declared.get("eps", "fp64") == "fp64", "a Python float goes in as float32"
        kinds: dict[str, str] = {}
        for argument in kernel.arg_names:
            if argument in constants:
                kinds[argument] = "constexpr"
            elif argument.endswith("_ptr"):
                kinds[argument] = "*fp32" if argument in ("part_ptr", "stat_ptr") else "*bf16"
            else:
                kinds[argument] = declared[argument] or "i32"
        own = {k: v for k, v in constants.items() if k in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=own, attrs={})
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", target, 32)).asm


INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    "more", [pytest.param(INTERPRETED, id="cpu"), pytest.param({}, id="gpu", marks=pytest.mark.gpu)]
)
def test_kernels_equal_torch(more: dict[str, str]) -> None:
    environment = {**os.environ, **more}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
    files = [str(Path(__file__).parent / f"{name}_parity.py") for name in ("kernel", "row")]
    done = subprocess.run(
        [*command, *files],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr


def test_a_trainable_or_unknown_unet_is_left_alone() -> None:
    unet = tiny_unet()
    with pytest.raises(ValueError, match="must be frozen"):
        fuse.fuse(unet.requires_grad_(True))
    unet.requires_grad_(False)
    resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    resnets[0].dropout.p = 0.1
    done = fuse.fuse(unet)
    assert len(done.left) == 1 and unet.get_submodule(done.left[0]) is resnets[0]
    assert "forward" not in resnets[0].__dict__ and "forward" in resnets[1].__dict__


def test_a_network_without_a_known_block(capsys: pytest.CaptureFixture[str]) -> None:
    """Said, not passed over: none of its forwards is patched, and nothing is compiled."""
    from types import SimpleNamespace

    from dreamtune.training.speed import Speed, speed_up

    network = torch.nn.Sequential(torch.nn.Linear(2, 2)).requires_grad_(False)
    device = torch.device("cuda")  # where it would be fused
    base: Any = SimpleNamespace(network=network, device=device, fused=False, compiled=False)
    speed_up(base, Speed(captured=False, fused=True, compiled=False, refusals={}))
    said = "runs unfused: the kernels know no block of a Sequential"
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="`compile` knows no block of a Sequential: leave it out"):
        speed_up(base, Speed(captured=False, fused=False, compiled=True, refusals={}))


def test_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`fused` is on, but the kernels need a CUDA device"):
        Run(Config(device="cpu", fused="on", output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    gpu = torch.device("cuda")
    assert ops.why_not_fused(gpu) is None
    assert "checkpointing" in (ops.why_not_fused(gpu, True) or "")


@pytest.mark.parametrize("slots", [1, 2])
def test_joint_projections_are_the_single_ones(slots: int) -> None:
    """Outputs and gradients, with and without gradients; a mask goes the stock way."""
    import dreamtune

    unet = tiny_unet(torch.float64)
    adapter = dreamtune.inject(unet, "lora", slots=slots, _fast=True)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.1)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64)
    text = torch.randn(2, 5, 24, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    attentions = [m for m in unet.modules() if hasattr(m, "processor")]
    assert all(type(m.processor) is JointProjections for m in attentions)
    assert {len(m.processor.many.layers) for m in attentions} == {2, 3}

    def results(**options: Any) -> list[torch.Tensor]:
        y = unet(x, torch.tensor([3, 9]), text, **options).sample
        with torch.no_grad():
            adapter.route(torch.arange(2) if slots == 2 else None)
            again = unet(x, torch.tensor([3, 9]), text, **options).sample
            adapter.route(None)
        return [y, again, *torch.autograd.grad(y.square().sum(), list(adapter.parameters()))]

    joint, masked = results(), results(encoder_attention_mask=mask)
    for m in attentions:
        m.processor = m.processor.original
    for ours, theirs in ((joint, results()), (masked, results(encoder_attention_mask=mask))):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(joint[0], masked[0])
    torch.testing.assert_close(joint[0], joint[1], rtol=1e-12, atol=1e-12)


def test_eject_gives_the_processors_back() -> None:
    import dreamtune

    unet = tiny_unet()
    before = [m.processor for m in unet.modules() if hasattr(m, "processor")]
    dreamtune.inject(unet, "delora").eject()
    assert [m.processor for m in unet.modules() if hasattr(m, "processor")] == before


@pytest.fixture
def kernels_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused blocks' operators, by torch's own."""

    def group_norm(x: Any, w: Any, b: Any, groups: int, eps: float, silu: bool, add: Any) -> Any:
        y = F.group_norm(x if add is None else x + add[:, :, None, None], groups, w, b, eps)
        return F.silu(y) if silu else y, x

    def layer_norm(x: Any, w: Any, b: Any, eps: float, more: Any) -> Any:
        x = x if more is None else x + more
        return F.layer_norm(x, w.shape, w, b, eps), x

    monkeypatch.setattr(ops, "group_norm", group_norm)
    monkeypatch.setattr(ops, "layer_norm", layer_norm)
    monkeypatch.setattr(ops, "geglu", lambda x: F.gelu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0])
    monkeypatch.setattr(ops, "add_bias", lambda x, y, b: x + y + b[:, None, None])


BYPASSED = ["conv1", "conv_shortcut", "time_emb_proj", "proj_in", "proj_out", "ff.net.0.proj"]


@pytest.mark.parametrize(
    ("family", "target"),
    [
        *(("sd", target) for target in [*BYPASSED, "ff.net.2"]),
        *(("xl", target) for target in ["conv1", "ff.net.0.proj", "ff.net.2", "add_embedding.*"]),
    ],
)
def test_a_fused_block_leaves_no_change_out(
    family: str, target: str, kernels_of_torch: None
) -> None:
    """Fused first, then adapted, as in a run: a block must not take a weight past its change."""
    import dreamtune

    outputs = []
    make_unet, call = {"sd": (tiny_unet, unet_inputs), "xl": (tiny_xl_unet, xl_inputs)}[family]
    given: Any = call(2, torch.float64)
    args, kwargs = given if family == "xl" else (given, {})
    for fused in (False, True):
        unet = make_unet(torch.float64).requires_grad_(False)
        done = fuse.fuse(unet) if fused else None
        assert done is None or not done.left
        adapter = dreamtune.inject(unet, "lora", target_modules=[target], rank=2, _fast=True)
        outputs.append(unet(*args, **kwargs).sample)
        disturb(adapter)
        outputs.append(unet(*args, **kwargs).sample)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2
    torch.testing.assert_close(outputs[2:], outputs[:2], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "kind", ["conv2", "norm2", "nonlinearity", "proj_in", "norm3", "ff", "net.0"]
)
def test_a_fused_block_leaves_no_hook_out(kind: str, kernels_of_torch: None) -> None:
    """Of a module that it does not call."""
    outputs = []
    for fused, hooked in ((False, False), (False, True), (True, True)):
        unet = tiny_unet(torch.float64).requires_grad_(False)
        if fused:
            fuse.fuse(unet)
        found = [m for name, m in unet.named_modules() if hooked and name.endswith(f".{kind}")]
        for module in found:
            module.register_forward_hook(lambda m, given, out: out * 1.1)
        assert bool(found) is hooked
        outputs.append(unet(*unet_inputs(2, torch.float64)).sample)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    torch.testing.assert_close(outputs[2], outputs[1], rtol=0, atol=1e-10)


def test_compiled_blocks_are_the_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`compile_blocks`, traced as for a GPU but run by torch; samples are not compiled for."""
    plain_adapter, plain = make("delora", [0])
    adapter, step = make("delora", [0])
    original = torch.nn.Module.compile
    compiled: list[torch.nn.Module] = []

    def compile(module: torch.nn.Module, **options: Any) -> None:
        compiled.append(module)
        original(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    fuse.compile_blocks(adapter.model)
    assert {type(m).__name__ for m in compiled} == {"BasicTransformerBlock"}
    for k in range(2):
        plain(k, 1.0)
        step(k, 1.0)
    ours, theirs = adapter.state_dict(0), plain_adapter.state_dict(0)
    assert max((ours[n] - theirs[n]).abs().max().item() for n in ours) < 1e-9
