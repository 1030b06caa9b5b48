"""Every base family trained, stacked, gone on with, and exported to its stock pipeline."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CASES, FAMILIES, plain_losses
from forked import without_dreamtune
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import disturb

import dreamtune
from dreamtune.adapters import resolve_options
from dreamtune.config import Config
from dreamtune.files.export import export
from dreamtune.injection import parts
from dreamtune.models.load import family_with, load_base
from dreamtune.models.sample import sample_tensor
from dreamtune.pipeline.generate import generate
from dreamtune.pipeline.load import network_of
from dreamtune.training.run import Run
from dreamtune.training.slots import build_step
from dreamtune.training.step import draw
from dreamtune.training.train import base_of, train, train_stacked
from dreamtune.training.wave import Wave

pytestmark = pytest.mark.usefixtures("undrawn")

# height, width and corner of `photo_dir`'s, brought to 16 pixels, and the size
SIZES = [[20, 24, 0, 1, 16, 16], [20, 25, 0, 2, 16, 16], [20, 26, 0, 2, 16, 16]]
OF_A_CLASS = [16, 16, 0, 0, 16, 16]
PROMPTS = ["a sks dog on the grass", "a sks dog"]
ALONE = """
import json, sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
base, out, guidance, *files = sys.argv[1:]
found = []
for file in files:
    pipe = DiffusionPipeline.from_pretrained(base)
    folder, _, name = file.rpartition("/")
    pipe.load_lora_weights(folder, weight_name=name)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    found.append(pipe(prompt=["a sks dog on the grass", "a sks dog"], num_inference_steps=3,
        **json.loads(guidance), height=16, width=16, generator=seeds, output_type="pt").images)
assert "dreamtune" not in sys.modules
torch.save(found, out)
"""


class Folders(dict[tuple[str, str], Path]):
    """Of a family and a prediction, written where it is asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, key: tuple[str, str]) -> Path:
        self[key] = FAMILIES[key[0]].write(self.root / "-".join(key), key[1])
        return self[key]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("families"))


@pytest.fixture
def folder(family: str, folders: Folders) -> Path:
    """Of its first prediction."""
    return folders[family, FAMILIES[family].predictions[0]]


def config(folder: Path, photos: Path, out: Path, **more: Any) -> Config:
    given = {
        "pretrained_model_name_or_path": str(folder), "instance_data_dir": str(photos),
        "instance_prompt": "a sks dog", "validation_prompt": ["a {} on a chair", "a {}"],
        "max_train_steps": 4, "validation_steps": 2, "num_inference_steps": 2,
        "output_dir": str(out), "dino": "none", "clip": "none", "options": {"rank": 2},
        "resolution": 16,
    }  # fmt: skip
    return Config(**{**given, **more})


def opened(settings: Config) -> tuple[Run, Wave]:
    run = Run(settings)
    run.open(base_of(run.given))
    return run, Wave(run.base, {"dog": run})


@pytest.mark.parametrize(("family", "prediction"), CASES)
def test_the_loss_is_the_plain_formulas(
    family: str,
    prediction: str,
    folders: Folders,
    photo_dir: Path,
    tmp_path: Path,
) -> None:
    """For the same draws, with the adapter on, photos and class images."""
    from diffusers import DiffusionPipeline

    kind, classes = tmp_path / "class", []
    kind.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        classes.append(Image.fromarray(pixels))
        classes[-1].save(kind / f"{i}.png")
    prior = {"with_prior_preservation": True, "class_data_dir": str(kind), "num_class_images": 2}
    folder = folders[family, prediction]
    run, wave = opened(
        config(
            folder, photo_dir, tmp_path / "run", train_batch_size=3, prior_loss_weight=0.3, **prior
        )
    )
    step = wave.step
    disturb(wave.adapter)
    step.generators[0].manual_seed(5)
    drawn = draw(step.cache, step.pools, step.generators, 3, step.process)
    with torch.no_grad():
        ours = step.losses(drawn)

    shown, sizes, captions = [], [], []
    for entry in drawn.entry.tolist():
        if entry < 3:
            photo = Image.open(photo_dir / f"{entry}.png")
            height, width, top, left, _, side = SIZES[entry]
            photo = photo.resize((round(width * side / height), side), Image.Resampling.LANCZOS)
            shown.append(photo.crop((left, top, left + side, top + side)))
            sizes.append(SIZES[entry])
            captions.append("a sks dog in the snow" if entry == 1 else "a sks dog")
        else:
            shown.append(classes[entry - 3])
            sizes.append(OF_A_CLASS)
            captions.append("a dog")
    pixels = torch.stack([torch.tensor(np.asarray(x)) for x in shown]).permute(0, 3, 1, 2)
    stock = DiffusionPipeline.from_pretrained(folder)
    theirs = plain_losses(
        FAMILIES[family], stock, run.base.network, pixels / 127.5 - 1, captions, sizes, drawn
    )
    wanted = theirs[:3].mean() + 0.3 * theirs[3:].mean()
    torch.testing.assert_close(ours, wanted[None], rtol=1e-4, atol=1e-5)
    wave.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_pipeline_draws_what_the_trainer_drew(
    family: str, folder: Path, photo_dir: Path, tmp_path: Path
) -> None:
    """Same seeds, float32, another process: at most 1e-3 of the range apart, in all formats."""
    rate = {"learning_rate": 0.3, "options": {"rank": 2}}
    run, wave = opened(config(folder, photo_dir, tmp_path / "run", method="lora", **rate))
    assert run.base.parts["text_encoder"] is None  # it is gone while the network trains
    for k in range(4):
        wave.advance(k)

    def images() -> torch.Tensor:
        arguments = run.base.sampling_arguments(PROMPTS)
        with run.base.sampling("base", prompts=False) as pipe:
            how = {"steps": 3, "guidance_scale": 5.0, "size": 16}
            return sample_tensor(pipe, PROMPTS, [0, 1], arguments=arguments, **how)

    trained = images()
    best = tmp_path / "run" / "best"
    run.save_files(wave.slots["dog"], best, {"step": 4})
    formats = FAMILIES[family].formats
    exported = [export(best, tmp_path / "k", name, base=run.base.network) for name in formats]
    wave.close()
    untouched, out = images(), tmp_path / "images.pt"
    files = [best / "pytorch_lora_weights.safetensors", *exported]
    guidance = json.dumps(FAMILIES[family].call(2))
    without_dreamtune(ALONE, [folder, out, guidance, *files], tmp_path / "log.txt")
    for theirs in torch.load(out):
        assert float((theirs - trained).abs().max()) <= 1e-3
        assert float((theirs - untouched).abs().max()) > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_trains(family: str, folder: Path, photo_dir: Path, tmp_path: Path) -> None:
    """Two steps move what is trained, in every projection; the base is itself afterwards."""
    run, wave = opened(config(folder, photo_dir, tmp_path / "run"))
    wave.unload()
    before = {name: x.clone() for name, x in run.base.network.state_dict().items()}
    for method, kind in dreamtune.METHODS.items():
        options = resolve_options(kind, {})
        settings = replace(run.config, method=method, options=options, learning_rate=1e-2)
        adapter, step = build_step(run.base, [settings], [run.cache], [run.pools])
        assert len(adapter.weights()) == FAMILIES[family].adapted
        start = {name: x.clone() for name, x in adapter.state_dict().items()}
        for k in range(2):
            step(k, 1.0)
        assert step.skipped.item() == 0 and step.loss.isfinite().all(), method
        moved = [n for n, x in adapter.state_dict().items() if not torch.equal(x, start[n])]
        assert moved, method
        adapter.eject()
    after = run.base.network.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    wave.close()


def test_xls_autoencoder_decodes_in_float32_where_fp16_overflows(
    folders: Folders,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pictures of a base in fp16, whose autoencoder has numbers beyond 65504 on the way."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [caplog.handler])
    folder = Path(shutil.copytree(folders["xl", "epsilon"], tmp_path / "base"))
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"] *= 6e4
    save_file(tensors, file, {"format": "pt"})
    base = load_base(str(folder), dtype=torch.float16)
    with base.sampling("base", prompts=False) as pipe, warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        how = {"steps": 1, "guidance_scale": 5.0, "size": 16}
        arguments = base.sampling_arguments(["a dog"])
        found = sample_tensor(pipe, ["a dog"], [0], arguments=arguments, **how)
        assert found.isfinite().all() and pipe.vae.dtype == torch.float16
        assert not [r for r in caplog.records if r.name.startswith("diffusers")]
        codes = torch.randn(1, 4, 8, 8).half()
        assert not pipe.vae.decode(codes).sample.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_encoded_as_by_the_pipeline(family: str, folder: Path) -> None:
    """Bit for bit, with the text encoders as they were and read once more."""
    from diffusers import DiffusionPipeline

    prompts, base = ["a sks dog", "a sks dog in the snow"], load_base(str(folder))
    first = base.call_arguments(prompts)
    base.let_encoders_go()
    found, stock = base.call_arguments(prompts), DiffusionPipeline.from_pretrained(folder)
    encoding, nothing = FAMILIES[family].encoding, FAMILIES[family].nothing
    with torch.no_grad():
        both = {"do_classifier_free_guidance": True} if nothing is None else {}
        told = stock.encode_prompt(list(prompts), **encoding, **both)
        if nothing is not None:
            count = len(base.told) // 2  # type: ignore[attr-defined]
            told = *told[:count], *stock.encode_prompt([nothing] * 2, **encoding)[:count]
    told = [told[i] for i in FAMILIES[family].told] or told
    for name, x in zip(base.told, told, strict=True):  # type: ignore[attr-defined]
        x = torch.ones_like(found[name]) if x is None else x  # a mask that leaves nothing out
        assert len(found[name]) == len(x) == 2
        for rows in zip(first[name], found[name], x, strict=True):
            assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[2]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder(family: str, folder: Path, tmp_path: Path) -> None:
    """With all text encoders and tokenizers; it is a base itself."""
    from diffusers import DiffusionPipeline

    base = load_base(str(folder))
    adapter = dreamtune.inject(base.network, "lora", rank=2)
    disturb(adapter, size=0.5)

    def image(pipe: Any) -> torch.Tensor:
        return sample_tensor(pipe, ["a dog"], [0], steps=2, guidance_scale=5.0, size=16)

    wanted = image(base.pipeline())
    path = export(adapter, tmp_path, "merged", base=base.pipeline())
    for again in (DiffusionPipeline.from_pretrained(path), load_base(str(path)).pipeline()):
        assert float((image(again) - wanted).abs().max()) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_losses_are_the_eager_ones(
    family: str, folder: Path, photo_dir: Path, tmp_path: Path
) -> None:
    """In float32, over steps with pictures between them; what is not captured says so."""
    losses, modes = {}, ["off", "on"]
    more = {"max_train_steps": 6, "validation_steps": 3, "mixed_precision": "no"}
    bare = Path(
        shutil.copytree(photo_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    )

    def run(mode: str, photos: Path = bare) -> Config:
        return config(folder, photos, tmp_path / mode, capture=mode, **more)

    if family == "z_image":
        with pytest.raises(ValueError, match="is told on the host how long a prompt is"):
            train(replace(run("on", photo_dir), output_dir=str(tmp_path / "captions")))
    if why := load_base(str(folder)).uncaptured:
        with pytest.raises(ValueError, match=why):
            train(run("on"))
        modes = ["off", "auto"]
    for mode in modes:
        result = train(run(mode))
        losses[mode] = [entry["loss"] for entry in result.history if entry["step"]]
        assert len(generate(result.run_dir, ["a sks dog"], output_dir=tmp_path / f"{mode}-out"))
    eager, other = losses.values()
    assert len(eager) == 2 and np.isfinite(eager).all()
    assert other == pytest.approx(eager, rel=1e-4)


def same(a: Path, b: Path, tolerance: float) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(
        bool((x[k] - y[k]).norm() <= tolerance * y[k].norm()) for k in x
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_from_photos_to_pictures(
    family: str,
    folder: Path,
    photo_dir: Path,
    scorer_names: dict[str, str],
    tmp_path: Path,
) -> None:
    """Scores and class images of its own; gone on with; stacked; loaded by the plugin."""
    more: dict[str, Any] = {"num_class_images": 2, "with_prior_preservation": True}
    more |= {"max_train_steps": 2, "validation_steps": 0, "num_inference_steps": 1}
    more |= {"class_data_dir": str(tmp_path / "class"), "adam_epsilon": 1e-6}
    more["learning_rate"] = 1e-3
    whole = train(config(folder, photo_dir, tmp_path / "whole", **more, **scorer_names))
    assert [r["step"] for r in whole.history] == [0, 2]
    assert all(-1 <= r["dino"] <= 1 for r in whole.history)
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    page = (whole.run_dir / "report.html").read_text()
    assert "from diffusers import DiffusionPipeline" in page

    first = train(config(folder, photo_dir, tmp_path / "part", **{**more, "max_train_steps": 1}))
    go_on = {"resume_from_checkpoint": "latest", "output_dir": str(first.run_dir)}
    train(Config(**go_on, max_train_steps=2))
    for name in ("adapter.safetensors", "checkpoint-2/optimizer.safetensors"):
        assert same(first.run_dir / name, whole.run_dir / name, 0.0), name

    del more["learning_rate"]
    both = config(folder, photo_dir, tmp_path / "both", **more, sweep=["learning_rate=1e-3,1e-2"])
    stacked = train_stacked(both).results["learning_rate=1e-3"]
    ends = [x.run_dir / "adapter.safetensors" for x in (stacked, whole)]
    assert same(*ends, 1e-4)

    (path,) = generate(whole.run_dir, ["a sks dog"], num_images=1, output_dir=tmp_path / "out")
    assert Image.open(path).size == (16, 16)


def test_a_run_of_before_there_were_parts(
    folders: dict[tuple[str, str], Path],
    photo_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its adapter is used as it is; it cannot go on, and its tensors are left as they were."""
    folder, before = folders["klein", "flow"], tmp_path / "before"
    more = {"max_train_steps": 1, "validation_steps": 0, "method": "delora"}
    with monkeypatch.context() as patch:
        patch.setattr(parts, "FUSED", {})
        old = train(config(folder, photo_dir, before, **more))
        layer = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
        assert load_file(old.adapter)[f"{layer}.B"].shape == (144, 2)
    kept = {p: p.read_bytes() for p in before.rglob("*.safetensors")}
    assert len(kept) > 3
    go_on = {"resume_from_checkpoint": "latest", "output_dir": str(before)}
    with pytest.raises(ValueError, match=rf"`{layer}` was one weight; here it is `q` 16, `k` 16"):
        train(Config(**go_on, max_train_steps=2))
    assert [p.name for p, content in kept.items() if p.read_bytes() != content] == []
    (path,) = generate(before, ["a sks dog"], num_images=1, output_dir=tmp_path / "out")
    assert Image.open(path).size == (16, 16)
    new = train(config(folder, photo_dir, tmp_path / "new", **more))
    assert load_file(new.adapter)[f"{layer}.mlp.B"].shape == (96, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_plugin(family: str, folder: Path, tmp_path: Path) -> None:
    """Strengths, a mix and routes by prompts, of a stock pipeline with its text encoders."""
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    network = network_of(pipe)
    targets = family_with(network).target_modules  # type: ignore[union-attr]
    pipe.set_progress_bar_config(disable=True)
    files = {}
    for seed, name in enumerate(("dog", "cat")):
        adapter = dreamtune.inject(network, "delora", rank=2, seed=seed, target_modules=targets)
        disturb(adapter, seed, size=0.5)
        files[name] = adapter.save(tmp_path / f"{name}.safetensors")
        adapter.eject()

    def images(prompts: list[str]) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(7) for _ in prompts]
        how = {"num_inference_steps": 2, "height": 16, "width": 16}
        how |= FAMILIES[family].call(len(prompts))
        return pipe(prompt=prompts, generator=seeds, output_type="pt", **how).images  # type: ignore[no-any-return]

    base = images(["a sks dog"])
    for name, file in files.items():
        dreamtune.load(pipe, file, name)
    alone = {}
    for name in files:
        dreamtune.set_adapters(pipe, {name: 1.0})
        alone[name] = images(["a sks dog"])
        assert float((alone[name] - base).abs().max()) > 1e-3
    dreamtune.set_adapters(pipe, {"dog": 0.0})
    assert float((images(["a sks dog"]) - base).abs().max()) < 1e-6
    dreamtune.set_adapters(pipe, {"dog": 0.5, "cat": 0.5})
    mixed = images(["a sks dog"])
    assert all(float((mixed - x).abs().max()) > 1e-3 for x in (base, *alone.values()))
    with dreamtune.route(pipe, ["dog", None, "cat"]):
        rows = images(["a sks dog"] * 3)
    for row, want in zip(rows, (alone["dog"], base, alone["cat"]), strict=True):
        assert float((row - want[0]).abs().max()) < 1e-4
