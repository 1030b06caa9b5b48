"""The scripts that evaluate beside the benchmark: what early stopping costs, read from histories; a
LoRA by PEFT alone, scored as ours are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreamtune import embedded
from dreamtune.cli import main
from dreamtune.config import Config
from dreamtune.evaluation.results import read_results
from dreamtune.training.records import append_metrics

sys.path.append(str(Path(__file__).parents[1] / "eval"))

import early_stopping  # noqa: E402
import peft_lora  # noqa: E402

SUBJECT = embedded.subjects("dev")[0]


def record(step: int, gained: float, kept: float) -> dict[str, float]:
    """One that covers that share of DINO's way, 0.2 to 0.8, and of CLIP-I's, 0.5 to 0.9, and keeps
    that share of the prompt gap, 0.1."""
    return {
        "step": step,
        "dino": 0.2 + 0.6 * gained,
        "dino_photos": 0.8,
        "clip_i": 0.5 + 0.4 * gained,
        "clip_i_photos": 0.9,
        "clip_t": 0.2 + 0.1 * kept,
        "clip_t_shuffled": 0.2,
    }


UP_AND_DOWN = [
    record(0, 0.0, 1.0),
    record(10, 0.5, 1.0),  # 0.5
    record(20, 0.4, 1.0),
    record(30, 0.3, 1.0),
    record(40, 0.8, 0.9),  # 0.72, the best
    record(50, 0.9, 0.5),  # 0.45, and too little of the prompt
]


@pytest.mark.parametrize(
    ("patience", "steps", "lost", "dino_lost"),
    [
        (1, 20 / 50, 0.72 - 0.5, 0.18),  # step 20 is worse than 10
        (2, 30 / 50, 0.72 - 0.5, 0.18),
        (3, 1.0, 0.0, 0.0),  # step 40 is better before three were worse
        (6, 1.0, 0.0, 0.0),
    ],
)
def test_where_a_run_would_have_stopped(
    patience: int, steps: float, lost: float, dino_lost: float
) -> None:
    found = early_stopping.stopped(UP_AND_DOWN, patience)
    assert found == pytest.approx((steps, lost, dino_lost), abs=1e-9)


def test_a_method_that_never_holds_the_base_keeps_the_last() -> None:
    """Nothing gained: step 0 stays the best, one scoring later the patience is over; ETHER has no
    file of step 0, keeps its last step, and so is never stale."""
    history = [record(0, 0.0, 1.0), record(10, -0.1, 1.0), record(20, -0.2, 1.0)]
    assert early_stopping.stopped(history, 1) == pytest.approx((0.5, 0.0, 0.0))
    assert early_stopping.stopped(history, 1, identity_at_start=False) == (1.0, 0.0, 0.0)


def test_runs_without_ratings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be told: No scorers: the last step\."):
        early_stopping.stopped([{"step": 0}, {"step": 10}], 1)
    none = [{**record(step, 0.0, 1.0), "dino_photos": 0.1, "clip_i_photos": 0.1} for step in (0, 9)]
    with pytest.raises(ValueError, match=r"cannot be told: No scorer counts"):
        early_stopping.stopped(none, 1)


def test_the_table_of_early_stopping() -> None:
    rows = [
        early_stopping.Stopped("lora", subject, 0, 1, steps, lost, 0.1)
        for subject, steps, lost in (("a", 0.25, 0.0), ("b", 0.75, 0.06))
    ]
    *_, line = early_stopping.table(rows).splitlines()
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:3] == ["lora", "1", "2"] and cells[5] == "1"
    assert [cells[i].split(" ")[0] for i in (3, 4, 6)] == ["0.500", "0.030", "0.100"]
    assert cells[3] == "0.500 (0.000 to 1.000)"  # widened for two subjects, a share all the same


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--early_stop", "2"], "--early_stop is set for each run"),
        (["--seed=3"], "--seed=3 is set for each run"),
        (["--dino", "none"], "`dino` or `clip` is none"),
        (["--config", "stop.yaml"], "`early_stop` is set in a file of settings"),
    ],
)
def test_flags_that_early_stopping_sets_itself(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stop.yaml").write_text("early_stop: 3\n")
    with pytest.raises(ValueError, match=message):
        early_stopping.main(["--work", "new", "--methods", "lora", *flags])
    assert not Path("new").exists()


def test_early_stopping_trains_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second start only reads; other flags, and a run that failed, are refused. The trainer is
    one that writes the history above."""
    asked: list[Config] = []

    def train_stacked(config: Config) -> SimpleNamespace:
        asked.append(config)
        for subject in Path(str(config.subjects)).iterdir():
            run = Path(str(config.output_dir)) / subject.name
            run.mkdir(parents=True)
            for one in UP_AND_DOWN:
                append_metrics(run, one)
        return SimpleNamespace(failed={"fox": "no"} if config.seed == 3 else {})

    monkeypatch.setattr(early_stopping, "train_stacked", train_stacked)
    flags = ["--work", str(tmp_path), "--methods", "lora", "dora", "--max_train_steps", "50"]
    assert early_stopping.main(flags) == 0
    rows = json.loads((tmp_path / "early_stopping.json").read_text())
    assert [(config.method, config.seed) for config in asked] == [("lora", 0), ("dora", 0)]
    assert {row["subject"] for row in rows} == {s.id for s in embedded.subjects("dev")}
    first, second, third, *_ = [row for row in rows if row["subject"] == SUBJECT.id]
    assert (first["steps"], second["steps"], third["steps"]) == (0.4, 0.6, 1.0)
    assert first["lost"] == pytest.approx(0.22) and first["dino_lost"] == pytest.approx(0.18)
    capsys.readouterr()
    assert early_stopping.main(flags) == 0 and len(asked) == 2
    assert "| dora | 2 | 5 | 0.600 " in capsys.readouterr().out
    with pytest.raises(ValueError, match="was trained by .* asked for is .*'--learning_rate'"):
        early_stopping.main([*flags, "--learning_rate", "1e-3"])
    with pytest.raises(ValueError, match="`lora`, seed 3: {'fox': 'no'}"):
        early_stopping.main([*flags, "--seeds", "3"])
    assert not (tmp_path / "runs" / "lora" / "seed-3" / "done.json").exists()


def test_a_lora_by_peft_alone_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, prompt = tmp_path / "out", "a sks fox"
    asked = ["--base", str(embedded.MODEL), "--photos", str(SUBJECT.folder), "--prompt", prompt]
    asked += ["--output", str(out), "--steps", "2", "--rank", "2"]
    assert peft_lora.main(asked) == 0
    tensors = load_file(out / peft_lora.FILE)
    ups = [
        tensor for key, tensor in tensors.items() if key.endswith(("lora_B.weight", ".up.weight"))
    ]
    assert ups and all(tensor.shape[1] == 2 and bool(tensor.any()) for tensor in ups)
    with pytest.raises(ValueError, match=f"`.*{peft_lora.FILE}` is there: name another --output"):
        peft_lora.main(asked)
    rule = tmp_path / "rule.yaml"
    rule.write_text(
        "like: dreamtune\nmetrics: [dino, clip_t]\nprompts: ['a {} in the snow']\n"
        "images_per_prompt: 1\nunrelated: []\nsampling: {steps: 1}\n"
    )
    score = ["score", str(out), "--photos", str(SUBJECT.folder), "--instance_prompt", prompt]
    score += ["--pretrained_model_name_or_path", str(embedded.MODEL), "--protocol", str(rule)]
    assert main([*score, "--output_dir", str(tmp_path / "scores")]) == 0
    found = read_results(tmp_path / "scores")
    assert (len(found.images), len(found.base)) == (1, 1)
    assert found.images[0].sha256 != found.base[0].sha256  # the LoRA is in
    assert -1 < found.scores()["dino"].mean < 1 and "DINO" in capsys.readouterr().out


def test_a_photo_of_a_turned_camera_is_upright(tmp_path: Path) -> None:
    """Orientation 6 of EXIF: what is stored as the left half is the upper one."""
    image = Image.new("RGB", (16, 16), "white")
    image.paste((0, 0, 0), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "0.png", exif=exif)
    seen: list[Image.Image] = []

    def preprocess(picture: Image.Image) -> torch.Tensor:
        seen.append(picture)
        return torch.zeros(1, 3, 16, 16)

    vae: Any = SimpleNamespace(
        dtype=torch.float32,
        config=SimpleNamespace(scaling_factor=2.0),
        encode=lambda pixels: SimpleNamespaceOf(latents=torch.ones(1, 4, 2, 2)),
    )
    pipe = SimpleNamespace(
        vae=vae, device="cpu", image_processor=SimpleNamespace(preprocess=preprocess)
    )
    assert torch.equal(peft_lora.latents_of(pipe, tmp_path, 16), torch.full((1, 4, 2, 2), 2.0))
    assert seen[0].getpixel((15, 0)) == (0, 0, 0) and seen[0].getpixel((0, 15)) == (255,) * 3


class SimpleNamespaceOf(dict[str, Any]):
    """What a VAE of diffusers gives: `in` and attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--base", "nowhere", "`nowhere` is no folder of a pipeline"),
        ("--photos", "nowhere", "`nowhere` is no folder of photos"),
        ("--steps", "0", "must be 1 or more, got 0, 16"),
    ],
)
def test_refusals_of_peft_lora(flag: str, value: str, message: str, tmp_path: Path) -> None:
    asked = {"--base": str(embedded.MODEL), "--photos": str(SUBJECT.folder), "--prompt": "a sks x"}
    asked |= {"--output": str(tmp_path / "new"), flag: value}
    with pytest.raises(ValueError, match=message):
        peft_lora.main([word for pair in asked.items() for word in pair])
    assert not (tmp_path / "new").exists()
