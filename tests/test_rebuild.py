"""The rebuild of the embedded base, two steps a stage on sprites drawn here: no network, no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sprite_pack
import torch
from safetensors.torch import load_file
from torch import nn

LIMIT = 16 * 2**20
TRAINED = ("autoencoder", "base", "clip", "dino")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after every stage but the download and the bars."""
    pytest.importorskip("lightly", reason="eval/embedded_base/requirements.txt is not installed")
    from embedded_base import rebuild

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rebuild")
    sprite_pack.write_sprites(folder / "sprites.npz", 8)
    flags = ["--work", str(folder), "--smoke", "--device", "cpu", "--stages"]
    rebuild.main([*flags, "tokenizer,autoencoder", "--seconds", "0"])
    assert state(folder, "autoencoder")["done"] == 0  # no time: stopped, with its state left
    rebuild.main([*flags, ",".join(("tokenizer", *TRAINED, "export"))])
    return folder


def state(work: Path, stage: str) -> dict:
    return json.loads((work / "state" / f"{stage}.json").read_text())


def test_every_stage_is_done_and_no_state_file_is_large(work: Path) -> None:
    assert all(state(work, stage)["done"] == 2 for stage in TRAINED)
    sizes = {f.name: f.stat().st_size for f in (work / "state").iterdir()}
    assert state(work, "base")["shards"] > 1
    assert all(size < LIMIT for size in sizes.values()), sizes


def test_a_finished_stage_is_gone_on_with_not_begun_anew(work: Path) -> None:
    from embedded_base import rebuild

    before = load_file(work / "state" / "autoencoder-0.safetensors")
    flags = ["--work", str(work), "--smoke", "--device", "cpu", "--stages", "autoencoder"]
    rebuild.main(flags)
    again = load_file(work / "state" / "autoencoder-0.safetensors")
    assert all(torch.equal(before[k], again[k]) for k in before)
    rebuild.main([*flags, "--plan", '{"autoencoder_steps": 3}'])
    further = load_file(work / "state" / "autoencoder-0.safetensors")
    assert state(work, "autoencoder")["done"] == 3
    moved = [k for k in before if not torch.equal(before[k], further[k])]
    assert moved and all((before[k] - further[k]).abs().max() < 0.01 for k in moved)


def test_the_exported_base_is_one_that_diffusers_loads(work: Path) -> None:
    from diffusers import StableDiffusionPipeline

    out = work / "embedded"
    assert all(f.stat().st_size < LIMIT for f in out.rglob("*") if f.is_file())
    pipe = StableDiffusionPipeline.from_pretrained(out / "model")
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    (image,) = pipe("a fox on the grass", num_inference_steps=1, generator=seed).images
    assert image.size == (128, 128)
    # the text encoder's weights arrived: they are the averaged ones of the state, in fp16
    shards = state(work, "base")["shards"]
    saved = {
        k: v
        for i in range(shards)
        for k, v in load_file(work / "state" / f"base-{i}.safetensors").items()
    }
    embedding = pipe.text_encoder.get_input_embeddings().weight.half()
    assert any(
        v.shape == embedding.shape and torch.equal(v, embedding)
        for k, v in saved.items()
        if k.startswith("average.")
    )


def test_the_exported_scorers_are_ones_that_we_load(work: Path) -> None:
    from embedded_base.scenes import Scenes
    from embedded_base.subjects import photos

    from dreamtune.data.views import from_tensor
    from dreamtune.metrics.scorers import Scorers

    scenes = Scenes(work / "sprites.npz")
    pictures, captions = photos(scenes, scenes.subjects["3d fox"], seed=0)
    assert all("sks fox" in caption for caption in captions)
    images = [from_tensor(p) for p in pictures]
    out = work / "embedded"
    scorers = Scorers.load({"dino": str(out / "dino"), "clip": f"local-dir:{out / 'clip'}"})
    scores = scorers.score(images[:5], captions[:5], scorers.references(images[5:]))
    assert all(-1 <= v <= 1 for v in (scores.means[k] for k in ("dino", "clip_i", "clip_t")))
    alone = scorers.score(images[:1], captions[:1], scorers.references(images[:1]))
    assert alone.means["dino"] == pytest.approx(1, abs=1e-5)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))


def test_a_stage_stops_in_time_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedded_base import training

    now = [0.0]
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    monkeypatch.setattr(training, "SHARD", 16)  # bytes: each tensor becomes its own file

    def run(steps: int = 6) -> tuple[training.Run, Line]:
        line = Line()

        def loss() -> torch.Tensor:
            now[0] += 1
            return (line.weight - 1).square().sum()

        modules = {"line": (line, 0.1)}
        return training.Run("line", modules, loss, steps=steps, folder=tmp_path), line

    first, line = run()
    assert first.train(seconds=3.5) is False
    assert first.done == 4
    second, again = run()
    assert second.done == 4 and torch.equal(again.weight, line.weight.half().float())
    assert len(list(tmp_path.glob("line-*.safetensors"))) > 1
    assert second.train(seconds=100) is True
    assert second.done == 6 and not torch.equal(again.weight, line.weight)
    third, _ = run()
    now[0] = 0.0
    assert third.train(seconds=100) is True and now[0] == 0.0  # nothing left to do
    with pytest.raises(FileNotFoundError, match="stage 'other' has left no state"):
        training.restore("other", {"line": Line()}, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path: Path) -> None:
    from embedded_base import training

    line = Line()
    modules = {"line": (line, 0.1)}
    run = training.Run("line", modules, lambda: line.weight.sum() / 0, steps=40, folder=tmp_path)
    with pytest.raises(FloatingPointError, match="line: loss nan at step 20"):
        run.train()
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from embedded_base import rebuild

    with pytest.raises(SystemExit):
        rebuild.main(["--work", "x", "--stages", "autoencoder,bse"])
    assert "unknown stages ['bse']; allowed: sprites, tokenizer," in capsys.readouterr().err
