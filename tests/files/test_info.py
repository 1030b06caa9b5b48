"""`dreamtune info`: the numbers on the page are those of the file."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import flat, in_checkpoint, pairs, products, spelt, targets, write
from safetensors.torch import save_file
from tiny import disturb, tiny_unet
from tiny_transformers import tiny
from torch import Tensor

import dreamtune
from dreamtune.cli import main
from dreamtune.fields import UnreadableFile
from dreamtune.files.info import describe
from dreamtune.files.info_page import page
from dreamtune.files.tensors import hash_of_json, read_tensors

BLOCKS = (
    "down_blocks.0.attentions.0", "mid_block", "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
)  # fmt: skip


def norms(changes: dict[str, Tensor]) -> dict[str, float]:
    """Block -> Frobenius norm of all changes in it as one vector."""
    found = {}
    for block in BLOCKS:
        own = [c.flatten() for p, c in changes.items() if p.startswith(block)]
        if own:
            found[block] = float(torch.cat(own).norm())
    return found


def rows(text: str) -> dict[str, str]:
    """Name of a row -> its lines."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines()[1:]:
        name = line[:10].strip() or name
        found[name] = f"{found[name]}\n{line[10:]}" if name in found else line[10:]
    return found


def numbers(change: str) -> dict[str, float]:
    return {line.split()[0]: float(line.split()[1]) for line in change.splitlines()[1:]}


def close(got: dict[str, float], wanted: dict[str, float], rel: float = 1e-6) -> bool:
    return got.keys() == wanted.keys() and all(
        abs(got[k] - v) <= rel * abs(v) for k, v in wanted.items()
    )


def test_a_lora_with_a_stated_strength(tmp_path: Path) -> None:
    factors = pairs(lambda p: 2 if "attn2" in p else 4)
    stated = {"unet.r": 4, "unet.lora_alpha": 2, "unet.rank_pattern": {"attn2.*": 2}}
    path = write(tmp_path, spelt("diffusers", factors), stated, author="nobody")
    info = describe(tmp_path)
    scale = lambda p: 1.0 if "attn2" in p else 0.5  # noqa: E731
    wanted = norms(products(factors, scale))
    assert info.path == path and (info.format, info.method) == ("diffusers", "LoRA")
    assert (dict(info.ranks), dict(info.strengths)) == ({4: 16, 2: 16}, {0.5: 16, 1.0: 16})
    assert close(dict(info.sizes), wanted) and not info.shares and info.far is None
    text = rows(page(info))
    assert text["format"] == "diffusers; read by `pipe.load_lora_weights`"
    assert text["rank"] == "2 in 16 layers, 4 in 16 layers"
    assert text["strength"] == "0.5 in 16 layers, 1 in 16 layers"
    assert text["layers"] == "32: to_q, to_k, to_v, to_out.0 of attn1, attn2"
    assert close(numbers(text["change"]), wanted, 1e-3)
    assert "author: nobody" in text["metadata"]
    assert text["base"].startswith("no fingerprint")
    assert f'pipe.load_lora_weights("{tmp_path}", weight_name="{path.name}")' in text["load"]
    assert f'dreamtune.load(pipe, "{path}")' in text["load"]


def test_against_a_base(tmp_path: Path) -> None:
    unet = tiny_unet()
    factors = pairs(keep=lambda p: "attn2" in p)
    info = describe(write(tmp_path, spelt("diffusers", factors)), unet)
    weights = norms({p: layer.weight.detach() for p, layer in targets().items() if p in factors})
    wanted = {block: size / weights[block] for block, size in norms(products(factors)).items()}
    assert close(dict(info.shares), wanted, 1e-5)
    lines = rows(page(info))["change"].splitlines()
    assert lines[0] == "norm of a block's change, and over that of the weights"
    shares = {line.split()[0]: float(line.split()[2].rstrip("%")) / 100 for line in lines[1:]}
    assert close(shares, wanted, 1e-3)
    other = {**spelt("diffusers", factors)}
    other["unet.x.attn1.to_q.lora_A.weight"] = torch.ones(1, 2)
    other["unet.x.attn1.to_q.lora_B.weight"] = torch.ones(2, 1)
    with pytest.raises(UnreadableFile, match="1 keys match no layer of the network, `x"):
        describe(write(tmp_path, other), unet)


@pytest.mark.parametrize("spelling", ["kohya", "ComfyUI", "processors", "PEFT"])
def test_without_a_base_the_layers_have_their_names(spelling: str, tmp_path: Path) -> None:
    """Where only the network tells the module paths, too."""
    factors = pairs()
    path = write(tmp_path, spelt(spelling, factors))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = describe(path)
        with_base = describe(path, tiny_unet())
    wanted = norms(products(factors))
    assert close(dict(with_base.sizes), wanted) and set(with_base.layers) == set(factors)
    if spelling == "ComfyUI":
        names = ["input_blocks.1", "middle_block", "output_blocks.2", "output_blocks.3"]
        wanted = dict(zip(names, wanted.values()))
        assert set(info.layers) == {in_checkpoint(p) for p in factors}
    elif spelling == "kohya":
        assert set(info.layers) == {flat(p) for p in factors}
    assert close(dict(info.sizes), wanted)
    assert rows(page(info))["layers"] == "32: to_q, to_k, to_v, to_out.0 of attn1, attn2"
    open_ = "1; PEFT keeps the strength in `adapter_config.json`, which is not beside it"
    assert rows(page(info))["strength"] == (open_ if spelling == "PEFT" else "1")


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfyui", "peft"])
def test_of_a_transformer(format: str, tmp_path: Path) -> None:
    """Without its base, and beside another file; page and card are of its pipeline."""
    network: Any = tiny("ZImageTransformer2DModel")
    adapter = dreamtune.inject(network, "lora", rank=2)
    disturb(adapter)
    file, base, out = adapter.save(tmp_path / "ours"), tmp_path / "base", tmp_path / "out"
    network.save_pretrained(base)
    given = ["--format", format, "--pretrained_model_name_or_path", str(base)]
    assert main(["export", str(file), str(out), *given]) == 0
    save_file({"x": torch.ones(1)}, out / "other.safetensors")
    info = describe(out)
    together = format in ("kohya", "comfyui")  # query, key and value are one layer there
    assert (info.path.parent, info.format, len(info.layers)) == (out, format, 8 if together else 16)
    if format == "peft":
        for text in ((out / "README.md").read_text(), rows(page(info))["load"]):
            assert "PeftModel.from_pretrained(pipe.transformer, " in text


def test_lycoris(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tensors, changes = {}, {}
    for path, layer in targets().items():
        out, width, name = layer.out_features, layer.in_features, f"lora_unet_{flat(path)}"
        a, b, c, d = (torch.randn(shape, generator=g) for shape in
                      ((out, 2), (2, width), (out, 2), (2, width)))  # fmt: skip
        parts = {"w1_a": a, "w1_b": b, "w2_a": c, "w2_b": d}
        tensors |= {f"{name}.hada_{kind}": tensor for kind, tensor in parts.items()}
        tensors[f"{name}.alpha"] = torch.tensor(0.5)
        changes[path] = 0.25 * (a @ b) * (c @ d)
    info = describe(write(tmp_path, tensors))
    assert (info.method, dict(info.ranks), dict(info.strengths)) == ("LoHa", {4: 32}, {0.25: 32})
    assert close(dict(info.sizes), norms(changes), 1e-5)


def merged(unet: Any, adapter: Any) -> dict[str, Tensor]:
    before = {p: w.detach().clone().double() for p, w in adapter.weights().items()}
    adapter.merge()
    return {p: unet.get_submodule(p).weight.detach().double() - w for p, w in before.items()}


@pytest.mark.parametrize("method", ["lora", "delora", "ether"])
def test_ours(method: str, tmp_path: Path) -> None:
    unet = tiny_unet()
    adapter = dreamtune.inject(unet, method)
    disturb(adapter)
    metadata = {"base": "sd", "prompt": "a sks dog", "scores": {"dino": 0.5}}
    native = adapter.save(tmp_path, metadata=metadata)
    lora = dreamtune.export(adapter, tmp_path, "kohya", metadata=metadata)
    wanted = norms(merged(unet, adapter))
    base = tiny_unet()
    info = describe(native, base)
    assert info.format == "native" and info.method.startswith(f"{method}, ")
    assert close(dict(info.sizes), wanted, 1e-3) and info.far == 0
    assert close(dict(describe(lora).sizes), wanted, 1e-3)
    assert describe(lora).method == f"{method}, exported as LoRA"
    alone = describe(native)
    if method == "lora":
        assert close(dict(alone.sizes), wanted, 1e-3)
    else:
        text = rows(page(alone))
        assert not alone.sizes and text["rank"] == "not known without the base"
        assert "takes the base's weights: --pretrained_model_name_or_path" in text["change"]
    prints = read_tensors(native).about["fingerprint"]
    digest = hash_of_json(prints)[:12]
    text = rows(page(info))
    assert text["base"] == f"sd; fingerprint {digest} of 32 layers; the base here is this one"
    assert text["metadata"].splitlines() == [
        "base: sd", "prompt: a sks dog", 'scores: {"dino": 0.5}',
    ]  # fmt: skip
    assert f'dreamtune export "{native}" FOLDER' in text["load"]
    other = describe(native, tiny_unet(seed=1))
    assert other.far == 32 and "another one: 32 of 32 layers differ" in page(other)


def test_of_a_run(
    tmp_path: Path, tiny_pipeline_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its best, on its base where that is on this machine; nothing is fetched."""
    from dreamtune.models.load import load_network

    adapter = dreamtune.inject(load_network(tiny_pipeline_dir), "ether")
    adapter.save(tmp_path / "best")
    config = tmp_path / "config.yaml"
    for base, known in ((tiny_pipeline_dir, True), ("nobody/nothing", False), ("/gone", False)):
        config.write_text(f"pretrained_model_name_or_path: {base}\n")
        assert main(["info", str(tmp_path)]) == 0
        text = rows(capsys.readouterr().out)
        assert ("%" in text["change"]) == known == ("base here is this one" in text["base"])
        generate = f'dreamtune generate "{tmp_path / "best" / "adapter.safetensors"}" --prompt ...'
        assert generate in text["load"]


def test_bars(tmp_path: Path) -> None:
    """As long as the sizes, of characters that the console has."""
    factors = pairs()
    for path, (up, _) in factors.items():
        up.mul_({"d": 1.0, "m": 0.5, "u": 0.0}[path[0]])
    info = describe(write(tmp_path, spelt("diffusers", factors)))
    wanted = norms(products(factors))
    for encoding, sign in (("utf-8", "█"), ("cp1252", "#"), ("ascii", "#"), ("nonsense", "#")):
        lines = rows(page(info, encoding))["change"].splitlines()[1:]
        lengths = {line.split()[0]: line.count(sign) for line in lines}
        most = max(wanted.values())
        assert lengths == {block: round(24 * size / most) for block, size in wanted.items()}
        assert lengths["up_blocks.1.attentions.0"] == 0 < lengths["mid_block"] < 24


def test_a_console_without_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, spelt("diffusers", pairs()), title="é\x1b[2J\r\nformat    native")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["info", str(path)]) == 0
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "####" in text and r"title: \xe9\x1b[2J\r\nformat    native" in text
    assert len(re.findall("^format", text, re.M)) == 1


def test_what_is_not_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, {"x": torch.zeros(1)})
    assert main(["info", str(path)]) == 1
    assert "is in none of the formats native, diffusers" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "nothing")]) == 1
    assert "no adapter at" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dreamtune.cli import main\n"
        "try: main(['info', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--pretrained_model_name_or_path" in done.stdout
