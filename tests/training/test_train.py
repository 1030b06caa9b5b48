"""The trainer end to end on tiny models: files, resume, interruption, refusals."""

from __future__ import annotations

import html
import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ended, start
from safetensors.torch import load_file

from dreamtune import inject, load
from dreamtune.config import Config
from dreamtune.evaluation.selection import choose_best
from dreamtune.evaluation.validation import Evaluator, read_grid
from dreamtune.files.layers import factors_of_adapter
from dreamtune.models.load import load_network
from dreamtune.models.stable_diffusion import StableDiffusion
from dreamtune.training import run as run_module
from dreamtune.training import run_folder
from dreamtune.training import train as train_module
from dreamtune.training.run import Run
from dreamtune.training.train import Interrupted, base_of, train
from dreamtune.training.wave import Wave


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_end_to_end_with_scores(
    settings: dict[str, Any], scorer_names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(Config(**{**settings, **scorer_names, "report_to": "none"}))
    out, run_dir = capsys.readouterr().out, result.run_dir
    assert "3 photos, 1 other file skipped (.DS_Store)" in out
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [0, 3, 6]
    assert all(-1 <= r[k] <= 1 for r in lines for k in ("dino", "clip_i", "clip_t"))
    assert lines[0]["loss"] is None and lines[1]["loss"] > 0 and lines[1]["skipped_steps"] == 0
    assert result.best_step == choose_best(lines).step == result.scores["step"]
    assert result.adapter == run_dir / "best" / "adapter.safetensors"
    assert result.lora is not None and result.lora.is_file()
    names = {p.name for p in run_dir.iterdir()}
    files = {
        "adapter.safetensors",
        "pytorch_lora_weights.safetensors",
        "report.html",
        "config.yaml",
    }
    assert names == files | {"metrics.jsonl", "samples", "best", "checkpoint-3", "checkpoint-6"}
    assert "sks dog" in (run_dir / "report.html").read_text()
    assert len(read_grid(run_dir / "samples" / "000003.png", 2, 16)) == 2


def opened(config: Config) -> Run:
    run = Run(config)
    run.open(base_of(run.given))
    return run


@pytest.mark.parametrize("method", ["delora", "ether"])
def test_step_0_is_the_base(
    settings: dict[str, Any], scorer_names: dict[str, str], method: str
) -> None:
    """Also for ETHER, whose adapter is elsewhere at its start."""
    options = {"method": method, "options": {}}
    run = opened(Config(**{**settings, **scorer_names, **options}))
    wave = Wave(run.base, {"dog": run})
    wave.score(0)
    before = run.evaluator.saved(0)
    started, _ = run.evaluator(1)
    wave.unload()
    base, _ = run.evaluator(2)
    wave.close()
    assert before is not None
    assert [i.tobytes() for i in before] == [i.tobytes() for i in base]
    same_start = [i.tobytes() for i in started] == [i.tobytes() for i in base]
    assert same_start == (method == "delora")


def test_dropout_of_the_base_is_off(
    settings: dict[str, Any], tiny_v_pipeline_dir: Path, tmp_path: Path
) -> None:
    """It would draw from the global generator, and train on another network than is sampled."""
    base = shutil.copytree(tiny_v_pipeline_dir, tmp_path / "base")
    file = base / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dropout": 0.5}))

    def adapter(base: Path, seed: int) -> Path:
        torch.manual_seed(seed)
        own = {"pretrained_model_name_or_path": str(base), "validation_steps": 6}
        folder = {"output_dir": str(tmp_path / f"{base.name}-{seed}")}
        return train(Config(**{**settings, **own, **folder})).run_dir / "adapter.safetensors"

    one = opened(Config(**{**settings, "pretrained_model_name_or_path": str(base)}))
    assert {m.p for m in one.base.unet.modules() if type(m) is torch.nn.Dropout} == {0.0, 0.5}
    one.close()
    first, second, without = adapter(base, 1), adapter(base, 2), adapter(tiny_v_pipeline_dir, 1)
    assert same(first, second) and same(first, without)


def test_gradient_checkpointing_computes_the_blocks_again(settings: dict[str, Any]) -> None:
    """Of a base in eval mode."""
    from diffusers.models.attention import BasicTransformerBlock

    calls = {}
    for on in (False, True):
        run = opened(Config(**{**settings, "gradient_checkpointing": on}))
        wave = Wave(run.base, {"dog": run})
        seen: list[int] = []
        for m in run.base.unet.modules():
            if type(m) is BasicTransformerBlock:
                m.register_forward_pre_hook(lambda *given, seen=seen: seen.append(1))
        wave.advance(0)
        calls[on] = len(seen)
        wave.close()
    assert calls[True] == 2 * calls[False] > 0


@pytest.mark.parametrize("method, best", [("delora", 0), ("ether", 4)])
def test_best_when_nothing_improved(
    settings: dict[str, Any], scorer_names: dict[str, str], method: str, best: int
) -> None:
    """The base, if the adapter's start is the base; else the last step, not a start that nobody
    scored."""
    run = opened(Config(**{**settings, **scorer_names, "method": method, "options": {}}))
    levels = {"clip_t": 0.3, "clip_t_shuffled": 0.1, "dino_photos": 0.9, "clip_i_photos": 0.9}
    for step in (0, 2, 4):
        worse = 0.5 - step / 100
        run.history.append({"step": step, "dino": worse, "clip_i": worse, **levels})
        run.rank()
    run.close()
    assert run.best_step == best
    assert ("last step" in run.choice.reason) == (method == "ether")


@pytest.mark.parametrize("method, best", [("delora", 0), ("ether", 6)])
def test_the_page_shows_what_best_holds(
    settings: dict[str, Any], scorer_names: dict[str, str], method: str, best: int
) -> None:
    """Where nothing was gained a method that starts elsewhere keeps its last step, everywhere."""
    judge = Evaluator.judge

    def worse(self: Evaluator, step: int, images: list[Any]) -> dict[str, Any]:
        lower = {"dino": 0.5 - step / 100, "clip_i": 0.5 - step / 100}
        return {**judge(self, step, images), **lower, "dino_photos": 0.9, "clip_i_photos": 0.9}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "judge", worse)
        result = train(Config(**{**settings, **scorer_names, "method": method, "options": {}}))
    page = (result.run_dir / "report.html").read_text()
    assert result.best_step == result.scores["step"] == best
    assert f"<dt>Best step</dt><dd>{best}<" in page
    assert re.findall(r'scope="row">(\d+) best<', page) == [str(best)]
    assert f'<p class="label">Step {best}</p>' in page
    assert f"<figcaption>{best} best</figcaption>" in page
    assert html.escape(result.reason) in page


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("method", ["delora", "ether+"])
def test_three_and_three_resumed_equal_six(
    settings: dict[str, Any], scorer_names: dict[str, str], tmp_path: Path, method: str
) -> None:
    """Bit for bit: parameters, optimizer, metrics; with a schedule, the prior and accumulation."""
    options = {} if method == "ether+" else {"rank": 2}
    common = {
        **settings, **scorer_names, "method": method, "options": options, "lr_scheduler": "cosine",
        "lr_warmup_steps": 2, "with_prior_preservation": True, "num_class_images": 3,
        "gradient_accumulation_steps": 2, "class_data_dir": str(tmp_path / "class"),
    }  # fmt: skip
    whole = train(Config(**common))
    broken = {**common, "output_dir": str(tmp_path / "second")}
    original, calls = Wave.advance, []

    def advance(self: Wave, k: int) -> None:
        calls.append(k)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self, k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wave, "advance", advance)
        with pytest.raises(Interrupted, match="after step 4 of 6; .* --resume_from_checkpoint lat"):
            train(Config(**broken))
    assert (tmp_path / "second" / "checkpoint-4").is_dir()
    # what was scored after the checkpoint of step 3 must go
    second = train(Config(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-3")))
    for name in (
        "adapter.safetensors",
        "checkpoint-6/optimizer.safetensors",
        "best/adapter.safetensors",
    ):
        assert same(whole.run_dir / name, second.run_dir / name), name
    drop = ("seconds", "scoring_seconds")
    histories = [
        [{k: v for k, v in r.items() if k not in drop} for r in x.history] for x in (whole, second)
    ]
    assert histories[0] == histories[1]


def test_photos_and_prompts_are_encoded_once(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The photos in one call; the training prompts in one, the scored prompts in another."""
    calls: list[str] = []
    for name in ("encode_images", "encode_prompts", "call_arguments"):
        original = getattr(StableDiffusion, name)

        def counted(
            self: StableDiffusion, x: Any, name: str = name, original: Any = original
        ) -> Any:
            calls.append(name)
            return original(self, x)

        monkeypatch.setattr(StableDiffusion, name, counted)
    train(Config(**settings))
    assert sorted(calls) == ["call_arguments", "encode_images", "encode_prompts"]


def test_layers_beyond_attention(settings: dict[str, Any], tmp_path: Path) -> None:
    """Linear layers and convolutions, with ranks of their own: trained, resumed, loaded."""
    targets: dict[str, Any] = {"to_q": {}, "ff.net.2": {"rank": 1}, "*.conv1": {"rank": 3}}
    settings |= {"target_modules": targets, "num_inference_steps": 1}
    first = train(Config(**{**settings, "max_train_steps": 3}))
    network = load_network(settings["pretrained_model_name_or_path"])
    changes = []
    assert first.lora is not None
    for path in (first.adapter, first.lora):
        adapter = load(network, path)
        found = factors_of_adapter(adapter).items()
        changes.append({name: up.double() @ down.double() for name, (up, down) in found})
        adapter.eject()
    assert changes[0].keys() == changes[1].keys()
    for name, change in changes[0].items():
        torch.testing.assert_close(changes[1][name], change, rtol=0, atol=1e-6)
    latest = {"resume_from_checkpoint": "latest", "output_dir": str(first.run_dir)}
    with pytest.raises(ValueError, match="`target_modules` was"):  # another entry would decide
        train(Config(**latest, target_modules=dict(reversed(targets.items()))))
    resumed = train(Config(**latest, max_train_steps=6))
    alone = train(Config(**{**settings, "output_dir": str(tmp_path / "alone")}))
    name = "checkpoint-6/adapter.safetensors"
    assert same(resumed.run_dir / name, alone.run_dir / name)
    adapter = load(network, alone.run_dir / "checkpoint-6")
    ranks = {n: g.adapter.A.shape[-2] for g in adapter.groups for n in g.names}
    assert {(n.rpartition("_blocks.")[2][-5:], r) for n, r in ranks.items()} == {
        (".to_q", 2), ("net.2", 1), ("conv1", 3),
    }  # fmt: skip
    start = inject(load_network(settings["pretrained_model_name_or_path"]), target_modules=targets)
    saved = tensors(alone.run_dir / name)
    assert start.state_dict().keys() == saved.keys()
    moved = [n for n in ranks if not torch.equal(saved[f"{n}.B"], saved[f"{n}.B0"])]
    assert len(moved) == len(ranks)
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, saved[key])


def test_refused_targets(settings: dict[str, Any]) -> None:
    for targets, message in (
        ({"to_q": {"rnk": 1}}, "`target_modules`, `to_q`: `delora` has no option `rnk`"),
        (["re:("], "is no expression"),
        (["to_x"], "no layer matches `to_x`"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Config(**{**settings, "target_modules": targets}))


def test_resume_refusals(settings: dict[str, Any], photo_dir: Path, tmp_path: Path) -> None:
    run_dir = train(Config(**{**settings, "max_train_steps": 3})).run_dir
    latest = {"resume_from_checkpoint": "latest", "output_dir": str(run_dir)}
    with pytest.raises(ValueError, match=r"`options` was .*'rank': 2.*; `seed` was 0, is 9"):
        train(Config(**latest, seed=9, options={"rank": 3}))
    with pytest.raises(ValueError, match="holds another run .*; nothing is overwritten"):
        train(Config(**settings))
    with pytest.raises(ValueError, match="needs --output_dir"):
        train(Config(resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="is not a checkpoint-N folder"):
        train(Config(resume_from_checkpoint=str(run_dir)))
    longer = train(Config(**latest, max_train_steps=5))
    assert [r["step"] for r in longer.history] == [0, 3, 5]
    image = next(photo_dir.glob("*.png"))
    data = image.read_bytes()
    try:
        image.write_bytes(next(p for p in photo_dir.glob("*.png") if p != image).read_bytes())
        with pytest.raises(ValueError, match="are not those that"):
            train(Config(**latest, max_train_steps=7))
    finally:
        image.write_bytes(data)


def test_kill_leaves_the_previous_checkpoint_whole(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The write of the second checkpoint dies half way: the first is whole, and is resumed from."""
    original, calls = run_folder.write_tensors, []

    def dying(path: Path, *rest: Any) -> None:
        assert path.name == "optimizer.safetensors"
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            os._exit(9)
        original(path, *rest)

    def work() -> None:
        monkeypatch.setattr(run_folder, "write_tensors", dying)
        train(Config(**settings, checkpointing_steps=2))

    log = tmp_path / "log.txt"
    assert ended(start(work, log)) == 9, log.read_text()
    run_dir = Path(settings["output_dir"])
    assert [p.name for p in run_folder.checkpoints(run_dir)] == ["checkpoint-2"]
    result = train(Config(resume_from_checkpoint="latest", output_dir=str(run_dir)))
    assert [r["step"] for r in result.history] == [0, 3, 6]
    assert not list(run_dir.glob(".checkpoint*"))


def test_ctrl_c_saves_and_says_how_to_go_on(settings: dict[str, Any], tmp_path: Path) -> None:
    flags = [f"--{k}={v}" for k, v in settings.items() if isinstance(v, (str, int))]
    flags += ["--rank", "2", "--max_train_steps", "100000", "--validation_steps", "50000"]
    flags += ["--validation_prompt", "a {}"]
    script = Path(__file__).parents[2] / "train_dreambooth.py"

    def work() -> None:
        sys.argv = [str(script), *flags]
        runpy.run_path(str(script), run_name="__main__")

    process = start(work, tmp_path / "log.txt")
    deadline = time.time() + 90
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(process, signal.SIGINT)
    status, error = ended(process), (tmp_path / "log.txt").read_text()
    assert status == 130, error
    assert "Stopped after step" in error and "--resume_from_checkpoint latest" in error
    (saved,) = run_folder.checkpoints(tmp_path / "run")
    assert run_folder.read_state(saved)["step"] == int(saved.name.split("-")[1]) > 0


def test_checkpoint_limit_and_default_run_names(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = {**settings, "output_dir": None, "name": "dog", "checkpointing_steps": 1}
    first = train(Config(**quick, checkpoints_total_limit=3))
    steps = [p.name for p in run_folder.checkpoints(first.run_dir)]
    assert steps == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    second = train(Config(**{**quick, "max_train_steps": 1}))
    assert (str(first.run_dir), str(second.run_dir)) == ("runs/dog", "runs/dog-2")


def test_class_images_are_kept_and_reused(settings: dict[str, Any], tmp_path: Path) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class")}
    quick = {**settings, **prior, "max_train_steps": 1, "num_class_images": 3}
    train(Config(**quick, sample_batch_size=2))
    files = sorted((tmp_path / "class").glob("*.png"))
    assert len(files) == 3
    kept = [f.read_bytes() for f in files]
    files[1].unlink()
    train(Config(**{**quick, "output_dir": str(tmp_path / "again")}, sample_batch_size=1))
    # the missing one came back as it was, whatever the batch; the others were not touched
    assert [f.read_bytes() for f in files] == kept
    saved = (tmp_path / "again" / "config.yaml").read_text()
    assert "class_prompt: a dog" in saved
    with pytest.raises(ValueError, match="were made otherwise: prompt 'a dog', now 'a cat'"):
        train(Config(**{**quick, "output_dir": str(tmp_path / "x"), "class_prompt": "a cat"}))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_base_keeps_float32_adapters(
    settings: dict[str, Any], precision: str
) -> None:
    result = train(Config(**settings, mixed_precision=precision))
    assert {t.dtype for t in tensors(result.adapter).values()} == {torch.float32}
    moved = tensors(result.run_dir / "adapter.safetensors")
    start = tensors(result.run_dir / "checkpoint-3" / "adapter.safetensors")
    assert any(not torch.equal(moved[k], start[k]) for k in moved)


def test_kl_autoencoder_noise_prediction_and_checkpointing(
    settings: dict[str, Any], tiny_pipeline_dir: Path
) -> None:
    changes = {"pretrained_model_name_or_path": str(tiny_pipeline_dir), "snr_gamma": 5.0}
    plain = train(Config(**{**settings, **changes}))
    memory = {"gradient_checkpointing": True, "output_dir": settings["output_dir"] + "2"}
    saved = train(Config(**{**settings, **changes, **memory}))
    a, b = (tensors(r.run_dir / "adapter.safetensors") for r in (plain, saved))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    assert "sampler: dpm++" in (plain.run_dir / "config.yaml").read_text()


def test_training_learns(settings: dict[str, Any]) -> None:
    """The mean loss of the last steps is below that of the first on the same photos."""
    long = {**settings, "max_train_steps": 60, "validation_steps": 20, "learning_rate": 3e-2}
    history = train(Config(**{**long, "num_inference_steps": 1, "options": {"rank": 8}})).history
    assert history[-1]["loss"] < 0.9 * history[1]["loss"]


def test_divergence_is_an_error(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "BAD_STEPS_IN_A_ROW", 3)
    original = Wave.advance

    def advance(self: Wave, k: int) -> None:
        self.step.cache.mean.fill_(float("nan"))
        original(self, k)

    monkeypatch.setattr(Wave, "advance", advance)
    with pytest.raises(ValueError, match="the last 6 steps up to 6 gave no finite loss"):
        train(Config(**{**settings, "validation_steps": 0}))


def test_a_run_most_of_whose_steps_are_skipped_fails(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few in a row, many in all; it says how many, and half of them is not yet too many."""
    original = Wave.advance

    def advance(self: Wave, k: int) -> None:
        sound = self.step.cache.mean.clone()
        if k in skipped:
            self.step.cache.mean.fill_(float("nan"))
        original(self, k)
        self.step.cache.mean.copy_(sound)

    monkeypatch.setattr(Wave, "advance", advance)
    skipped = {0, 2}
    with pytest.raises(
        ValueError, match="2 of the 3 steps up to 3 gave no finite loss or gradient"
    ):
        train(Config(**settings))
    skipped = {1, 4}
    again = {"output_dir": settings["output_dir"] + "2"}
    assert [r["skipped_steps"] for r in train(Config(**{**settings, **again})).history] == [0, 1, 2]


def test_a_run_goes_on_from_any_folder_and_in_another_place(
    settings: dict[str, Any], photo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started with relative paths, moved with its class images."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    shutil.copytree(photo_dir, here / "photos")
    base = shutil.copytree(settings["pretrained_model_name_or_path"], here / "models" / "sd")
    monkeypatch.chdir(here)
    relative = {
        "pretrained_model_name_or_path": "models/sd", "instance_data_dir": "photos",
        "output_dir": "runs/dog", "with_prior_preservation": True, "num_class_images": 1,
    }  # fmt: skip
    train(Config(**{**settings, **relative, "max_train_steps": 3}))
    text = (here / "runs" / "dog" / "config.yaml").read_text()
    assert text.startswith("# ") and f"pretrained_model_name_or_path: {base}\n" in text
    monkeypatch.chdir(there)
    moved = shutil.move(here / "runs" / "dog", there / "dog")
    made = (moved / "class" / "class-00000.png").stat().st_mtime_ns
    result = train(Config(resume_from_checkpoint="latest", output_dir="dog", max_train_steps=4))
    assert [r["step"] for r in result.history] == [0, 3, 4]
    assert not (here / "runs" / "dog").exists()
    assert (moved / "class" / "class-00000.png").stat().st_mtime_ns == made
    assert f"class_data_dir: {moved}/class\n" in (moved / "config.yaml").read_text()


def test_the_subjects_words_are_said_before_training(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"instance_prompt": "a sks apple", "class_prompt": "an apple"}
    run = opened(Config(**settings | own))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        "Subject `sks apple` (identifier `sks`, class `apple`): 3 photos, 1 other file skipped"
    )
    assert said[1] == (
        "First validation prompt: `a sks apple on a red chair`; without the identifier: "
        "`an apple on a red chair`"
    )
    assert not run.history


def test_refusals_come_before_any_model(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_module, "load_base", never)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.jpg").write_bytes(b"no picture")
    for changes, message in (
        ({"instance_data_dir": str(bad)}, "cannot read the image .*x.jpg"),
        ({"instance_prompt": None}, "`instance_prompt` is missing"),
        ({"identifier": "zwx"}, "the identifier `zwx` is not in the prompt `a sks dog`"),
        ({"options": {"rnk": 4}}, "`delora` has no option `rnk`. Did you mean `rank`"),
        ({"device": "cuda:99x"}, "`device` must be cpu, cuda or cuda:N"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Config(**{**settings, **changes}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process trains one subject"):
        train(Config(**settings))


def test_tensorboard(settings: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    result = train(Config(**settings, report_to="tensorboard"))
    assert list((result.run_dir / "logs").rglob("events.out.tfevents.*"))


def test_generate(settings: dict[str, Any], tmp_path: Path) -> None:
    from dreamtune.cli import main

    result = train(Config(**settings))
    out = str(tmp_path / "out")
    flags = ["--prompt", "a sks dog", "a dog", "--num_images", "2", "--output_dir", out]
    assert main(["generate", str(result.run_dir), *flags]) == 0
    assert main(["generate", str(result.adapter), *flags]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 8
    assert main(["export", str(result.run_dir), str(tmp_path / "k"), "--format", "kohya"]) == 0
    assert len(list((tmp_path / "k").glob("*.safetensors"))) == 1


def test_a_run_without_a_checkpoint_is_not_overwritten(settings: dict[str, Any]) -> None:
    folder = Path(settings["output_dir"])
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0")  # stopped while it got ready
    lock = run_folder.take(str(folder), "x")
    lock.release()
    assert lock.folder == folder and folder.is_dir()
    (folder / "metrics.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"another run \(metrics.jsonl\).*Remove it, or name"):
        run_folder.take(str(folder), "x")
