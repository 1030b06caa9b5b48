"""The contract of the formats, over the table: each is written, found, read, converted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import disturb, tiny_unet
from torch import Tensor, nn

import dreamtune
from dreamtune import METHODS
from dreamtune.cli import main
from dreamtune.files import formats as formats_module
from dreamtune.files.find import adapter_file
from dreamtune.files.formats import (
    EXPORTS,
    Change,
    ExportFormat,
    LayerFactors,
    export_format,
    formats,
    read_adapter,
)
from dreamtune.files.layers import factors_of_adapter
from dreamtune.files.tensors import TensorFile, read_tensors, write_new
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.inject import InjectedAdapter
from dreamtune.models.prefixes import Prefixes
from dreamtune.models.stable_diffusion import StableDiffusion

LORAS = ("diffusers", "kohya", "comfyui")
READ_BACK = [name for name in EXPORTS if name != "merged"]
each_lora = pytest.mark.parametrize("format", LORAS)
each_export = pytest.mark.parametrize("format", READ_BACK)
LOW_RANK = [n for n, m in METHODS.items() if m.low_rank]


def trained(unet: nn.Module, method: str = "lora") -> InjectedAdapter:
    adapter = dreamtune.inject(unet, method)
    disturb(adapter)
    return adapter


def changes(factors: LayerFactors) -> dict[str, Tensor]:
    return {
        path: up.detach().double() @ down.detach().double() for path, (up, down) in factors.items()
    }


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for path, change in wanted.items():
        torch.testing.assert_close(got[path], change, rtol=0, atol=atol)


def changes_in(path: Path, unet: nn.Module) -> dict[str, Tensor]:
    loaded = dreamtune.load(unet, path)
    found = changes(factors_of_adapter(loaded))
    loaded.eject()
    return found


@pytest.mark.parametrize(
    "method,format",
    [*((n, f) for n in LOW_RANK for f in LORAS), ("ether", "peft"), ("ether", "native")],
)
def test_one_format_alone_reads_what_each_writes(method: str, format: str, tmp_path: Path) -> None:
    unet = tiny_unet()
    adapter = trained(unet, method)
    wanted = changes(factors_of_adapter(adapter))
    path = dreamtune.export(adapter, tmp_path, format, metadata={"prompt": "a sks dog"})
    adapter.eject()
    file = read_tensors(path)
    assert [n for n, f in formats().items() if f.reads(file, StableDiffusion.prefixes)] == [format]
    read = read_adapter(path, unet)
    lora = format != "native"
    assert (read.method, read.exported_from) == (("lora", method) if lora else (method, None))
    assert read.metadata == {"prompt": "a sks dog"} and len(read.shapes) == len(wanted)
    assert_same(changes_in(path, unet), wanted)


def test_native_is_read_by_native_alone(tmp_path: Path) -> None:
    file = read_tensors(trained(tiny_unet(), "ether").save(tmp_path))
    assert [n for n, f in formats().items() if f.reads(file, StableDiffusion.prefixes)] == [
        "native"
    ]


@pytest.mark.parametrize("there", READ_BACK)
@each_export
def test_each_becomes_each(format: str, there: str, tmp_path: Path) -> None:
    """An exported ETHER stays bound to its base through other formats, and needs no native file."""
    unet = tiny_unet()
    adapter = trained(unet, "ether")
    wanted = changes(factors_of_adapter(adapter))
    first = dreamtune.export(adapter, tmp_path / "a", format)
    adapter.eject()
    second = dreamtune.export(first, tmp_path / "b", there, base=unet)
    assert_same(changes_in(second, unet), wanted)
    with safe_open(second, "pt") as file:
        about = json.loads(file.metadata()["dreamtune"])
    assert about.get("exported_from", about.get("method")) == "ether"
    other = tiny_unet(seed=1)
    with pytest.raises(ValueError, match="32 of 32 layers differ.*`ether` contains the base"):
        dreamtune.export(first, tmp_path / "c", there, base=other)
    with pytest.raises(ValueError, match="32 of 32 layers differ.*`ether` contains the base"):
        dreamtune.load(other, second)


def test_a_file_that_shortens_names_needs_the_network(tmp_path: Path) -> None:
    path = dreamtune.export(trained(tiny_unet()), tmp_path, "kohya")
    with pytest.raises(ValueError, match="only the network tells them: pass it as `base`"):
        dreamtune.export(path, tmp_path / "b")


@each_export
def test_the_file_of_a_folder(format: str, tmp_path: Path) -> None:
    adapter = trained(tiny_unet())
    path = dreamtune.export(adapter, tmp_path, format)
    assert adapter_file(tmp_path) == path
    native = adapter.save(tmp_path / "adapter.safetensors")
    assert adapter_file(tmp_path) == native


def test_several_files_are_not_guessed_among(tmp_path: Path) -> None:
    adapter = trained(tiny_unet())
    for name in ("cat", "dog"):
        dreamtune.export(adapter, tmp_path, "kohya", name=name)
    with pytest.raises(
        ValueError, match="several adapters: give one of cat_kohya.safetensors, dog"
    ):
        adapter_file(tmp_path)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])  # ComfyUI has one for all
def test_prefixes_are_the_familys(format: str, tmp_path: Path) -> None:
    """Another network's file: written under its prefix, read under it, by no UNet."""
    unet, prefixes = tiny_unet(), Prefixes("prior.", "lora_prior_")
    adapter = trained(unet)
    factors = factors_of_adapter(adapter)
    adapter.eject()
    path = tmp_path / "x.safetensors"
    target = export_format(format)
    change = Change(
        adapter.file(), lambda: factors, torch.float32, {"metadata": {}}, prefixes, network=unet
    )
    target.write(path, change, overwrite=False)
    assert all(k.startswith(("prior.", "lora_prior_")) for k in read_tensors(path).tensors)
    read = read_adapter(path, unet, prefixes)
    wanted = {p: read.tensors[f"{p}.B"].double() @ read.tensors[f"{p}.A"].double() for p in factors}
    assert_same(wanted, changes(factors), 1e-6)
    with pytest.raises(ValueError, match="is in none of the formats native, diffusers, kohya"):
        dreamtune.load(unet, path)


@each_lora
def test_refusals(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS["lora"], "low_rank", False)
    with pytest.raises(
        ValueError, match="`lora` is not a low-rank change.*or train one of .*delora"
    ):
        dreamtune.export(trained(tiny_unet()), tmp_path, format)
    assert not list(tmp_path.iterdir())


def test_help_names_every_format_without_torch() -> None:
    code = (
        "import sys; from dreamtune.cli import main\n"
        "try: main(['export', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert all(f"{name} ({reader})" in text for name, reader in EXPORTS.items())


class Whole(ExportFormat):
    """The change itself, one tensor a layer."""

    file_name = "{name}_whole.safetensors"

    def check(self, change: Change) -> str:
        return "the change itself"

    def usage(self, path: Path, change: Any) -> str:
        return f"load({path.name!r})"

    def write(self, path: Path, change: Change, overwrite: bool) -> None:
        tensors = {f"whole.{p}": (u @ d).to(change.dtype) for p, (u, d) in change.factors.items()}
        write_new(path, tensors, change.about, overwrite)

    def reads(self, file: TensorFile, prefixes: Prefixes) -> bool:
        return any(key.startswith("whole.") for key in file.tensors)

    def read(self, file: TensorFile, network: nn.Module | None, prefixes: Prefixes) -> AdapterFile:
        found = {k.removeprefix("whole."): t for k, t in file.tensors.items()}
        rank = max(min(t.shape) for t in found.values())
        tensors: dict[str, Any] = {}
        for path, change in found.items():
            up, down = torch.zeros(change.shape[0], rank), torch.zeros(rank, change.shape[1])
            narrow = min(change.shape)
            side = change.shape[1] == narrow
            up[:, :narrow] = change if side else torch.eye(narrow)
            down[:narrow] = torch.eye(narrow) if side else change
            tensors[f"{path}.A"], tensors[f"{path}.B"] = down, up
        shapes = {p: (t.shape[0], t.shape[1]) for p, t in found.items()}
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        return AdapterFile("lora", {"rank": rank}, targets, tensors, {}, shapes)


def test_a_format_is_a_module_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("dreamtune.files.toy")
    module.FORMAT = Whole()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dreamtune.files.toy", module)
    monkeypatch.setitem(formats_module.EXPORTS, "toy", "a test")
    unet = tiny_unet()
    adapter = trained(unet)
    wanted = changes(factors_of_adapter(adapter))
    native = adapter.save(tmp_path)
    adapter.eject()
    out = tmp_path / "out"
    assert main(["export", str(native), str(out), "--format", "toy"]) == 0
    assert adapter_file(out) == out / "adapter_whole.safetensors"
    assert_same(changes_in(out, unet), wanted)
    kohya = dreamtune.export(out, tmp_path / "k", "kohya")
    assert_same(changes_in(kohya, unet), wanted)
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "toy (a test)" in " ".join(capsys.readouterr().out.split())


def test_a_folder_means_the_one_adapter_in_it_whatever_its_name(tmp_path: Path) -> None:
    """As kohya's scripts leave it; weights of a model beside it are none."""
    lora = dreamtune.export(trained(tiny_unet()), tmp_path, "kohya")
    other = lora.rename(tmp_path / "last-000004.safetensors")
    save_file({"conv_in.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert adapter_file(tmp_path) == other
    shutil.copy(other, tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match="several adapters: give one of last-000004.safetensors, "):
        adapter_file(tmp_path)
    named = shutil.copy(other, tmp_path / "dog_kohya.safetensors")
    assert adapter_file(tmp_path) == named
    for path in (other, named, tmp_path / "last.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="no adapter at .* and no LoRA under another name"):
        adapter_file(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"0" * 20)
    assert adapter_file(tmp_path).name == "cut.safetensors"  # whose reader says what is wrong
