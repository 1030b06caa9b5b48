"""Stacked runs: each leaves what it leaves alone, whatever happens to the others."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors.torch import load_file

from dreamtune.config import Config
from dreamtune.files.native import load_adapter_file
from dreamtune.training import run as run_module
from dreamtune.training import train as train_module
from dreamtune.training.run import Run
from dreamtune.training.train import Interrupted, train, train_stacked
from dreamtune.training.wave import Wave

pytestmark = pytest.mark.usefixtures("undrawn")

# Of a tensor's norm: float32 sums in another order.
TOLERANCE = 1e-4
UNSCORED = {"dino": "none", "clip": "none"}


@pytest.fixture
def common(
    tiny_v_pipeline_dir: Path, scorer_names: dict[str, str], tmp_path: Path
) -> dict[str, Any]:
    return {
        **scorer_names,
        "pretrained_model_name_or_path": str(tiny_v_pipeline_dir),
        "validation_prompt": ["a {} on a red chair", "a {}"],
        "max_train_steps": 6,
        "validation_steps": 3,
        "num_inference_steps": 2,
        "train_batch_size": 2,
        "sample_batch_size": 3,
        # AdamW's default makes steps of full size from gradients that are float32 rounding alone
        "adam_epsilon": 1e-6,
        "output_dir": str(tmp_path / "all"),
    }


@pytest.fixture
def subjects(photo_dir: Path, tmp_path: Path) -> Path:
    """Three subjects: two of other words, rates and numbers of photos, one told by its captions."""
    root = tmp_path / "subjects"
    for name in ("cat", "dog", "fox"):
        shutil.copytree(photo_dir, root / name)
    (root / "cat" / "2.png").unlink()
    (root / "cat" / "1.txt").unlink()
    (root / "cat" / "prompt.txt").write_text("a sks cat\na cat\n")
    (root / "dog" / "prompt.txt").write_text("a photo of zwx dog\n")
    own = {"identifier": "zwx", "learning_rate": 0.02, "seed": 5}
    (root / "dog" / "config.yaml").write_text(yaml.safe_dump(own))
    for i in range(3):
        (root / "fox" / f"{i}.txt").write_text("a sks fox")
    (root / "notes.txt").write_text("not a subject")
    return root


def photos_of(photo_dir: Path) -> dict[str, Any]:
    return {"instance_data_dir": str(photo_dir), "instance_prompt": "a sks dog"}


def close(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    if a.name.startswith("pytorch_lora"):  # a product may be split in many ways
        x, y = products(x), products(y)
    return x.keys() == y.keys() and all(
        (x[k] - y[k]).norm() <= TOLERANCE * y[k].norm() + 1e-12 for k in x
    )


def products(factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ups = {k: v for k, v in factors.items() if ".lora_B." in k}
    assert ups
    return {k: up @ factors[k.replace(".lora_B.", ".lora_A.")] for k, up in ups.items()}


def without_times(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if not k.endswith("seconds")} for x in lines]


def assert_same_run(ours: Path, alone: Path) -> None:
    """Every file: names, settings, tensors, scores, images."""
    names = [
        sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file())
        for f in (ours, alone)
    ]
    assert names[0] == names[1]
    saved = [(f / "config.yaml").read_text().replace(str(f), "HERE") for f in (ours, alone)]
    assert saved[0] == saved[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            assert close(ours / name, alone / name), name
        elif name.endswith("run_state.json"):
            a, b = (json.loads((f / name).read_text()) for f in (ours, alone))
            assert a.pop("files").keys() == b.pop("files").keys()
            for hashed in ("metrics", "sha256"):  # of numbers that are close, and of seconds
                assert len(a.pop(hashed)) == len(b.pop(hashed)) == 64
            assert a == b
        elif name.endswith(".png"):
            a, b = (Image.open(f / name).convert("RGB") for f in (ours, alone))
            assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 1, name
    for mine, other in zip(without_times(ours), without_times(alone), strict=True):
        assert mine == pytest.approx(other, abs=2e-3)
    for f in (ours, alone):
        assert "</html>" in (f / "report.html").read_text()


# A rate of its own, the weights in its change, no LoRA file; `test_step.py` stacks all methods.
@pytest.mark.parametrize("method", ["delora", "ether+", "oft"])
def test_subjects_leave_what_they_leave_alone(
    common: dict[str, Any], subjects: Path, tmp_path: Path, method: str
) -> None:
    """With prior preservation, clipping, a schedule and different rates."""
    options = {
        **common, "method": method, "with_prior_preservation": True, "num_class_images": 2,
        "max_grad_norm": 0.05, "lr_scheduler": "cosine", "gradient_accumulation_steps": 2,
    }  # fmt: skip
    result = train_stacked(Config(**options, subjects=str(subjects)))
    assert list(result.results) == ["cat", "dog", "fox"] and not result.failed
    words = {
        "cat": {"instance_prompt": "a sks cat", "class_prompt": "a cat"},
        "dog": {
            "instance_prompt": "a photo of zwx dog", "identifier": "zwx", "learning_rate": 0.02,
            "seed": 5,
        },
        "fox": {},
    }  # fmt: skip
    for name, own in words.items():
        folder = {"instance_data_dir": str(subjects / name), "output_dir": str(tmp_path / name)}
        alone = train(Config(**{**options, **own, **folder}))
        ours = result.results[name]
        assert_same_run(ours.run_dir, alone.run_dir)
        assert (ours.best_step, ours.reason) == (alone.best_step, alone.reason)
        assert (ours.lora is None) == (alone.lora is None)
    # equal because all trained, each its own way
    start, end = (
        [load_file(tmp_path / "all" / n / f"checkpoint-{k}" / "adapter.safetensors") for n in words]
        for k in (3, 6)
    )
    trained = [k for k in start[0] if not torch.equal(start[0][k], end[0][k])]
    assert any(not torch.allclose(start[0][k], end[0][k]) for k in trained)
    assert any(not torch.allclose(end[0][k], end[1][k]) for k in trained)


def test_sweep_in_waves(common: dict[str, Any], photo_dir: Path, tmp_path: Path) -> None:
    """Five runs in waves of two; another method and another option get waves of their own."""
    common |= photos_of(photo_dir)
    sizes: list[int] = []
    original = Wave.__init__

    def init(self: Wave, base: Any, runs: dict[str, Run], *rest: Any, **more: Any) -> None:
        sizes.append(len(runs))
        original(self, base, runs, *rest, **more)

    sweep = ["learning_rate=1e-3,1e-2", "seed=0,1,2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wave, "__init__", init)
        result = train_stacked(Config(**common, sweep=sweep, slots="4"))
        assert sizes == [4, 2] and len(result.results) == 6
        sizes.clear()
        other = {**common, **UNSCORED, "output_dir": str(tmp_path / "other"), "max_train_steps": 1}
        train_stacked(Config(**other, sweep=["method=lora,ether", "seed=0,1"]))
        other["output_dir"] = str(tmp_path / "third")
        train_stacked(Config(**other, sweep=["rank=2,3", "seed=0,1"]))
        assert sizes == [2, 2, 2, 2]
    label = "learning_rate=1e-2,seed=2"
    own = {"learning_rate": 1e-2, "seed": 2, "output_dir": str(tmp_path / "alone")}
    assert_same_run(result.results[label].run_dir, train(Config(**{**common, **own})).run_dir)


@pytest.mark.parametrize(
    ("method", "sweep"), [("delora", "lambda_init=2,4,8"), ("lora", "alpha=4,16,32")]
)
def test_options_of_equal_shape_share_a_wave(
    common: dict[str, Any],
    photo_dir: Path,
    tmp_path: Path,
    method: str,
    sweep: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common |= {**photos_of(photo_dir), "method": method}
    result = train_stacked(Config(**common, sweep=[sweep]))
    name, values = sweep.split("=")
    assert "Training 3 of 3 runs at once" in capsys.readouterr().out
    for value in values.split(","):
        own = {"options": {name: int(value)}, "output_dir": str(tmp_path / value)}
        alone = train(Config(**{**common, **own}))
        ours = result.results[f"{name}={value}"]
        assert_same_run(ours.run_dir, alone.run_dir)
        heads = [load_adapter_file(r.adapter).options for r in (ours, alone)]
        assert heads[0] == heads[1] and heads[0][name] == float(value)


def test_a_rate_that_equals_a_method_s_own(
    common: dict[str, Any], photo_dir: Path, tmp_path: Path, undrawn: pytest.MonkeyPatch
) -> None:
    """DeLoRA's lambda learns at 1e-3: a slot of that rate groups its parameters otherwise. With
    the charts of its pages."""
    undrawn.undo()
    common |= photos_of(photo_dir)
    result = train_stacked(Config(**common, sweep=["learning_rate=1e-2,1e-3"]))
    own = {"learning_rate": 1e-3, "output_dir": str(tmp_path / "alone")}
    alone = train(Config(**{**common, **own}))
    assert_same_run(result.results["learning_rate=1e-3"].run_dir, alone.run_dir)
    for page in (alone.run_dir / "report.html", tmp_path / "all" / "summary.html"):
        assert "<svg" in page.read_text()


def test_a_finished_run_leaves_and_the_rest_is_packed(
    common: dict[str, Any], photo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common |= {**photos_of(photo_dir), "validation_steps": 1, "early_stop": 9}
    packed: list[list[str]] = []
    original = Wave.pack
    ends = {0: 2, 1: 4, 2: 6}
    monkeypatch.setattr(Run, "done", lambda self, k: k >= ends[self.config.seed])

    def pack(self: Wave, labels: list[str]) -> None:
        packed.append(list(labels))
        original(self, labels)

    monkeypatch.setattr(Wave, "pack", pack)
    result = train_stacked(Config(**common, sweep=["seed=0,1,2"]))
    assert packed == [["seed=0", "seed=1", "seed=2"], ["seed=1", "seed=2"], ["seed=2"], []]
    for seed, end in ends.items():
        ours = result.results[f"seed={seed}"]
        assert ours.history[-1]["step"] == end
        own = {"seed": seed, "output_dir": str(tmp_path / f"alone-{seed}")}
        assert_same_run(ours.run_dir, train(Config(**{**common, **own})).run_dir)


def test_early_stop_alone(common: dict[str, Any], photo_dir: Path) -> None:
    """No change, so no scoring is better than the first: the second in a row is the last."""
    quick = {**common, **photos_of(photo_dir), "validation_steps": 1, "max_train_steps": 60}
    result = train(Config(**quick, early_stop=2, learning_rate=1e-12))
    best = result.best_step
    assert [r["step"] for r in result.history][-1] == best + 2 < 60
    assert (result.run_dir / f"checkpoint-{best + 2}").is_dir()
    latest = {"output_dir": str(result.run_dir), "resume_from_checkpoint": "latest"}
    assert train(Config(**latest)).history == result.history  # nothing left to do
    with pytest.raises(ValueError, match="`early_stop` goes by the scores"):
        Config(**{**quick, "dino": "none", "clip": "none"}, early_stop=2)


def test_a_run_with_nan_fails_alone(
    common: dict[str, Any], photo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common |= {**photos_of(photo_dir), "max_train_steps": 20, "validation_steps": 10}
    monkeypatch.setattr(run_module, "BAD_STEPS_IN_A_ROW", 3)
    original = Wave.advance

    def advance(self: Wave, k: int) -> None:
        if k == 2 and self.many:  # the photos of the second slot
            self.step.cache.mean[self.step.pools[0][1]] = float("nan")
        original(self, k)

    monkeypatch.setattr(Wave, "advance", advance)
    result = train_stacked(Config(**common, sweep=["seed=0,1,2"]))
    assert list(result.results) == ["seed=0", "seed=2"]
    assert "gave no finite loss" in result.failed["seed=1"]
    for seed in (0, 2):
        own = {"seed": seed, "output_dir": str(tmp_path / f"alone-{seed}")}
        alone = train(Config(**{**common, **own}))
        assert_same_run(result.results[f"seed={seed}"].run_dir, alone.run_dir)


def test_images_that_are_not_finite_fail_alone(common: dict[str, Any], photo_dir: Path) -> None:
    common |= photos_of(photo_dir)
    original = Wave.advance

    def advance(self: Wave, k: int) -> None:
        original(self, k)
        if k == 1:
            with torch.no_grad():
                next(iter(self.adapter.parameters()))[:, 0] = float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wave, "advance", advance)
        result = train_stacked(Config(**common, sweep=["seed=0,1"]))
    assert list(result.results) == ["seed=1"]
    assert "pixels that are not finite" in result.failed["seed=0"]
    assert [r["step"] for r in result.results["seed=1"].history] == [0, 3, 6]


@pytest.mark.parametrize("k", [0, 3])
def test_of_step_0_no_adapter_is_blamed(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise ValueError("image 0 has pixels that are not finite")

    monkeypatch.setattr("dreamtune.training.wave.sample_slots", fail)
    wave, run = Wave.__new__(Wave), SimpleNamespace(evaluator=None)
    wave.k, wave.failed, wave.base, wave.adapter = k, {}, None, None
    wave.slots = {"a": SimpleNamespace(index=0)}
    wave.pictures = SimpleNamespace(sample=fail)
    assert wave.sample({"a": run}) == {}
    base = "step 0 is the base without an adapter, so none diverged: "
    assert wave.failed == {"a": f"{'' if k else base}image 0 has pixels that are not finite"}


def test_interrupted_runs_go_on_alone_or_together(
    common: dict[str, Any], photo_dir: Path, tmp_path: Path
) -> None:
    common |= {**photos_of(photo_dir), "slots": "2", "checkpoints_total_limit": 1}
    sweep = ["seed=0,1,2"]
    whole = train_stacked(Config(**common, sweep=sweep))
    original = Wave.advance

    def advance(self: Wave, k: int) -> None:
        if k == 4:
            raise KeyboardInterrupt
        original(self, k)

    broken = {**common, "output_dir": str(tmp_path / "broken")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wave, "advance", advance)
        with pytest.raises(Interrupted, match="after step 4; .* --resume_from_checkpoint latest"):
            train_stacked(Config(**broken, sweep=sweep))
    one = tmp_path / "broken" / "seed=1"
    assert (one / "checkpoint-4").is_dir()
    shutil.copytree(tmp_path / "broken", tmp_path / "copy")
    train(Config(output_dir=str(one), resume_from_checkpoint="latest"))
    assert_same_run(one, whole.results["seed=1"].run_dir)
    again = {**common, "output_dir": str(tmp_path / "copy"), "resume_from_checkpoint": "latest"}
    result = train_stacked(Config(**again, sweep=sweep))
    assert list(result.results) == ["seed=0", "seed=1", "seed=2"]
    for label, ours in result.results.items():
        assert_same_run(ours.run_dir, whole.results[label].run_dir)
    with pytest.raises(ValueError, match="stacked runs go on with"):
        train_stacked(Config(**{**again, "resume_from_checkpoint": str(one)}, sweep=sweep))


def test_cli(
    common: dict[str, Any], subjects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dreamtune.cli import main

    lists = ("validation_prompt",)
    flags = [f"--{k}={v}" for k, v in {**common, **UNSCORED}.items() if k not in lists]
    flags += ["--subjects", str(subjects), "--sweep", "seed=0,1", "--sweep", "lambda_init=2,4"]
    assert main(["train", *flags, "--max_train_steps", "1", "--slots", "8"]) == 0
    names = {p.name for p in (tmp_path / "all").iterdir() if p.is_dir()}
    assert len(names) == 12 and "cat,seed=0,lambda_init=2" in names
    out = capsys.readouterr().out
    assert "Training 8 of 12 runs at once" in out and "prompt.txt" not in out
    assert "fox,seed=1,lambda_init=4" in out.splitlines()[-2]


def test_refusals_come_before_any_model(
    common: dict[str, Any], subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_module, "load_base", never)
    photos = photos_of(subjects / "fox")
    for changes, message in (
        ({"sweep": ["seed"]}, "must be NAME=VALUE,VALUE,..., got 'seed'"),
        ({"sweep": ["seed=1,1"]}, "has a value twice"),
        ({"sweep": ["seed=1", "seed=2"]}, "names `seed` twice"),
        ({"sweep": ["learning_rat=1"]}, "cannot be swept. Did you mean `learning_rate`"),
        ({"sweep": ["resolution=16,32"]}, "`resolution` cannot be swept.*lambda_init"),
        ({"sweep": ["method=lora,delora", "alpha=1,2"]}, "`alpha` cannot be swept"),
        ({"sweep": ["seed=0,x"]}, "`seed` must be"),
        ({"sweep": ["learning_rate=1,-1"]}, "`learning_rate` must be above 0"),
        ({"subjects": str(tmp_path / "none")}, "is not a folder"),
        ({"subjects": str(subjects / "fox")}, "holds no folder"),
        ({"subjects": str(subjects), **photos}, "are both set"),
        ({"slots": "0"}, "`slots` must be auto or at least 1, got '0'"),
    ):
        own = photos if "sweep" in changes else {}
        with pytest.raises(ValueError, match=message):
            train_stacked(Config(**{**common, **own, **changes}))
    with pytest.raises(ValueError, match="use `train_stacked`"):
        train(Config(**common, subjects=str(subjects)))
    (subjects / "cat" / "prompt.txt").write_text("a cat")
    with pytest.raises(ValueError, match="`cat`: the identifier `sks` is not in the prompt"):
        train_stacked(Config(**common, subjects=str(subjects)))
    (subjects / "cat" / "prompt.txt").write_text("a\nb\nc")
    with pytest.raises(ValueError, match="must have one line.*it has 3"):
        train_stacked(Config(**common, subjects=str(subjects)))
    (subjects / "dog" / "config.yaml").write_text("rsolution: 3")
    (subjects / "cat" / "prompt.txt").unlink()
    with pytest.raises(ValueError, match="`rsolution` in .* cannot be a subject's own"):
        train_stacked(Config(**common, subjects=str(subjects)))


def test_the_largest_wave_that_fits(
    common: dict[str, Any], photo_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With made-up memory: sampling 8, one slot 30, two 35, so 0.9 * 100 - 8 - 30 leaves ten."""
    from dreamtune.training import fit
    from dreamtune.training.train import get_ready

    common |= photos_of(photo_dir)
    sweep = [f"seed={','.join(map(str, range(16)))}"]
    with ExitStack() as stack:
        _, runs, base = get_ready(Config(**common, sweep=sweep), stack)
    needs, weights = iter([8.0, 30.0, 35.0]), base.network.state_dict()
    before = {k: v.clone() for k, v in weights.items()}

    def peak(base: Any, work: Any) -> float:
        work()
        return next(needs)

    monkeypatch.setattr(fit, "peak", peak)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 100))
    assert fit.largest_wave(base, list(runs.values())) == 11
    after = base.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert [fit.wave_size(50, 60, 61, 9), fit.wave_size(50, 10, 10, 9)] == [1, 9]
