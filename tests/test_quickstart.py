"""The main job in small, on the base that ships: trained here, loaded by a process without us."""

from __future__ import annotations

from pathlib import Path

import torch
from forked import without_dreamtune

from dreamtune import embedded

ALONE = """
import sys, torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
base, lora, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(lora)
pipe.set_progress_bar_config(disable=True)
seeds = [torch.Generator().manual_seed(i) for i in range(2)]
images = pipe(["a sks fox on the grass"] * 2, num_inference_steps=4, guidance_scale=4.0,
    guidance_rescale=0.3, generator=seeds, output_type="pt").images
assert "dreamtune" not in sys.modules
torch.save(images, out)
"""


def test_a_process_without_dreamtune_gets_the_trained_images(tmp_path: Path) -> None:
    """Same seeds, float32: at most 1e-3 of the range apart, where training moved far more."""
    from dreamtune.config import Config
    from dreamtune.training.run import Run
    from dreamtune.training.train import base_of
    from dreamtune.training.wave import Wave

    settings = {"max_train_steps": 6, "validation_steps": 0, "num_inference_steps": 1}
    config = Config(**settings, device="cpu", output_dir=str(tmp_path / "run"))
    run = Run(config)
    run.open(base_of(run.given))
    wave = Wave(run.base, {"fox": run})
    for k in range(6):
        wave.advance(k)

    def images() -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        with run.base.sampling("base") as pipe:
            pipe.set_progress_bar_config(disable=True)
            return pipe(
                ["a sks fox on the grass"] * 2, num_inference_steps=4, guidance_scale=4.0,
                guidance_rescale=0.3, generator=seeds, output_type="pt",
            ).images  # fmt: skip

    trained = images()
    run.save_files(wave.slots["fox"], tmp_path / "run" / "best", {"step": 6})
    wave.unload()
    base = images()
    wave.close()
    out = tmp_path / "images.pt"
    alone = [embedded.MODEL, tmp_path / "run" / "best", out]
    without_dreamtune(ALONE, alone, tmp_path / "log.txt")
    theirs = torch.load(out)
    assert float((theirs - trained).abs().max()) <= 1e-3
    assert float((theirs - base).abs().max()) > 0.1


def test_the_embedded_scorers_are_the_default(tmp_path: Path) -> None:
    """With no flag but sizes: every file of a run, scores at step 0, a subject of the package."""
    from dreamtune.config import Config
    from dreamtune.training.train import train

    quick = {"max_train_steps": 2, "num_inference_steps": 1, "validation_steps": 0}
    result = train(Config(**quick, device="cpu", output_dir=str(tmp_path / "run")))
    assert [r["step"] for r in result.history] == [0, 2]
    assert all(0 < r[k] < 1 for r in result.history for k in ("dino", "clip_i", "dino_photos"))
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert f"instance_data_dir: embedded:{embedded.subject().id}" in text
    assert "dino: embedded" in text and "clip: embedded" in text and "method: delora" in text
    assert (tmp_path / "run" / "report.html").is_file()
