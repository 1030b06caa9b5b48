"""Fuzz of all that is read: adapter files, a run's folder, flags, config files.

    python eval/reliability/files.py [--only load export transformers resume flags yaml]
        [--cases 1.0] [--seed 0]

Every case is a sound file with one damage, by a seeded generator. What comes of it is one of
  clean     a ValueError that names the file (or flag), or a result with a warning that does;
  harmless  the result of the sound file;
  crash     another exception, or a message that names nothing;
  silent    another result without a word;
  hang      more than 20 s;
and after a failed load the model must be as it was, bit for bit: if not, `changed`. The cases that
are none of the first two are listed, with their seed. CPU, about 20 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(ROOT / "tests" / "helpers")]

import damage  # noqa: E402
from random_models import build_clip, build_dino, build_pipeline, write_photos  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny import cases, disturb, tiny_unet, unet_inputs  # noqa: E402
from tiny_transformers import MAKE, tiny  # noqa: E402
from tiny_transformers import output as transformer_output  # noqa: E402

import dreamtune  # noqa: E402
from dreamtune import METHODS  # noqa: E402
from dreamtune.config import FIELDS, Config  # noqa: E402
from dreamtune.files.formats import EXPORTS  # noqa: E402
from dreamtune.files.peft import CONFIG  # noqa: E402
from dreamtune.files.peft import FORMAT as PEFT  # noqa: E402
from dreamtune.flags import FlagError, train_config  # noqa: E402
from dreamtune.training.train import train  # noqa: E402

LIMIT = 20  # seconds
OUTCOMES = ("clean", "harmless", "crash", "silent", "hang", "changed")


class Hang(BaseException):
    pass


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome(run: Callable[[], bool], names: tuple[str, ...]) -> tuple[str, str]:
    """run: whether the result is that of the sound file. What it printed and warned is a word if
    it has one of the names in it.
    """
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with limited(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                same = run()
        except Hang:
            return "hang", ""
        except ValueError as error:
            named = any(name in str(error) for name in names)
            return ("clean" if named else "crash"), f"{type(error).__name__}: {error}"
        except BaseException as error:
            return "crash", f"{type(error).__name__}: {error}"
    words = said.getvalue() + " ".join(str(w.message) for w in caught)
    if same:
        return "harmless", ""
    return ("clean", words) if any(name in words for name in names) else ("silent", words)


def state_of(unet: torch.nn.Module) -> str:
    """Of everything that a load may touch."""
    found = hashlib.sha256()
    for name, module in unet.named_modules():
        processor = type(getattr(module, "processor", None)).__name__
        hooks = len(module._forward_pre_hooks)
        found.update(f"{name} {type(module).__name__} {processor} {hooks}".encode())
    for name, p in unet.named_parameters():
        found.update(f"{name} {p.requires_grad} {p.dtype}".encode())
        found.update(p.detach().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def of_unet(unet: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return unet(*unet_inputs(1)).sample


class Adapters:
    """Sound files of every method and format, and what they give."""

    def __init__(self, work: Path) -> None:
        self.work, self.make, self.run = work, tiny_unet, of_unet
        self.write(self.jobs(), [name for name in EXPORTS if name != "merged"])

    def jobs(self) -> list[tuple[str, dict[str, Any]]]:
        others = {"rank": 2, "target_modules": ["to_k", "ff.net.2", "conv1", "proj_in", "conv_out"]}
        more = [("lora", others), ("delora", others), ("dora", {**others, "rank": 3})]
        return [*cases(), *more]

    def write(self, jobs: list[tuple[str, dict[str, Any]]], formats: list[str]) -> None:
        self.unet, self.files = self.make(), list[Path]()
        self.start = state_of(self.unet)
        for number, (method, options) in enumerate(jobs):
            adapter = dreamtune.inject(self.make(), method, **options)
            disturb(adapter)
            place = self.work / f"{number}-{method}"
            for name in formats:
                with contextlib.suppress(ValueError):  # not every format holds every method
                    self.files.append(dreamtune.export(adapter, place, name))
        self.loaded = {path: self.output(path) for path in self.files}
        self.exported = {path: self.changes(path) for path in self.files if self.has_lora(path)}

    def has_lora(self, path: Path) -> bool:
        return METHODS[path.parent.name.partition("-")[2]].low_rank

    def output(self, path: Path) -> torch.Tensor:
        adapter = dreamtune.load(self.unet, path)
        try:
            return self.run(self.unet)
        finally:
            adapter.eject()

    def changes(self, path: Path) -> dict[str, torch.Tensor]:
        out = dreamtune.export(path, self.work / "out", base=self.unet, overwrite=True)
        tensors = load_file(out)
        ends = ".lora_A.weight", ".lora_B.weight"
        return {
            k: tensors[k.replace(*ends)].flatten(1).double() @ x.flatten(1).double()
            for k, x in tensors.items()
            if k.endswith(ends[0])
        }

    def case(self, rng: random.Random, export: bool) -> tuple[str, str]:
        sound = rng.choice(list(self.exported if export else self.loaded))
        path = self.work / "damaged" / sound.name
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        beside = sound.with_name(CONFIG)
        how = rng.choice(damage.TENSORS)
        damaged = sound
        if sound.name == PEFT.file_name:  # its settings lie in a file of their own
            shutil.copy(beside, path.parent)
            shutil.copy(sound, path.parent)
            if rng.random() < 0.5:
                damaged, how = beside, rng.choice([damage.edit_json_file] * 3 + damage.ANY)
        (path.parent / damaged.name).write_bytes(how(damaged.read_bytes(), rng))

        def run() -> bool:
            if export:
                return damage.equal(self.changes(path), self.exported[sound], 1e-4)
            output, wanted = self.output(path), self.loaded[sound]
            return bool((output - wanted).norm() <= 1e-5 * wanted.norm())

        kind, words = outcome(run, (path.name, CONFIG))
        if state_of(self.unet) != self.start:
            self.unet, kind = self.make(), "changed"
        return kind, f"{how.__name__} of {sound.parent.name}/{damaged.name}: {words}"


class OfTransformer(Adapters):
    """LoRAs of all layers of one, which some formats have in one piece where it has several."""

    def __init__(self, work: Path, kind: str) -> None:
        self.work, self.make, self.run = work, lambda: tiny(kind), transformer_output
        everywhere = {"rank": 2, "target_modules": ["re:.*"]}
        self.write([("lora", everywhere)], ["diffusers", "kohya", "comfyui"])


class Resumed:
    """A run of two checkpoints; a copy of its folder goes on after a damage."""

    def __init__(self, work: Path) -> None:
        build_pipeline(work / "base", "tiny")
        build_dino(work / "dino", "tiny")
        build_clip(work / "clip", "tiny")
        self.work, self.sound = work, work / "sound"
        self.settings = {
            "pretrained_model_name_or_path": str(work / "base"),
            "instance_data_dir": str(write_photos(work / "photos", 3)),
            "instance_prompt": "a sks dog", "validation_prompt": ["a {} on a red chair", "a {}"],
            "resolution": 16, "num_inference_steps": 1, "validation_steps": 2,
            "options": {"rank": 2}, "dino": str(work / "dino"),
            "clip": f"local-dir:{work / 'clip'}", "device": "cpu",
        }  # fmt: skip
        train(Config(**self.settings, max_train_steps=4, output_dir=str(self.sound)))
        self.wanted = self.go_on(shutil.copytree(self.sound, work / "whole"))

    def go_on(self, folder: Path) -> Any:
        """Two further steps: tensors of the end and of the best, and all scores."""
        given = {"resume_from_checkpoint": "latest", "output_dir": str(folder)}
        result = train(Config(**given, max_train_steps=6))
        scores = [{k: v for k, v in r.items() if "seconds" not in k} for r in result.history]
        return load_file(folder / "adapter.safetensors"), load_file(result.adapter), scores

    def case(self, rng: random.Random) -> tuple[str, str]:
        folder = self.work / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.sound, folder)
        inside = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".html"]
        path = rng.choice(inside)
        what = rng.randrange(8)
        if what == 0:
            path.unlink()
        elif what == 1:
            like = [p for p in inside if p.name == path.name and p != path]
            shutil.copy(rng.choice(like or [p for p in inside if p != path]), path)
        elif what == 2:
            shutil.rmtree(rng.choice([p for p in folder.rglob("*") if p.is_dir()]))
        else:
            own: dict[str, list[damage.Bytes]] = {
                ".json": [damage.edit_json_file], ".jsonl": [damage.edit_lines],
                ".yaml": [damage.edit_yaml], ".safetensors": damage.TENSORS,
            }  # fmt: skip
            usual = own.get(path.suffix, damage.ANY)
            how = rng.choice(usual if rng.random() < 0.7 else damage.ANY)
            path.write_bytes(how(path.read_bytes(), rng))

        def run() -> bool:
            adapter, best, scores = self.go_on(folder)
            same = damage.equal(adapter, self.wanted[0]) and damage.equal(best, self.wanted[1])
            return same and scores == self.wanted[2]

        places = (path.name, path.parent.name, "checkpoint-", "config.yaml", "metrics.jsonl")
        kind, words = outcome(run, places)
        return kind, f"{path.relative_to(folder)}, damage {what}: {words[-300:]}"


def flags_case(rng: random.Random, work: Path) -> tuple[str, str]:
    values = [
        "", " ", "x", "-1", "0", "1e400", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "1e-400",
        "[]", "{}", "[1,", "!!float x", "{a: [", "é", "a" * 10_000, "\udcff", "true", "none", "1.5",
        "NaN", "0x10", "1_0", "&a [*a]", damage.DEEP[:20_000], "../..", "/dev/zero", "\t", "3",
    ]  # fmt: skip
    options = (
        "rank",
        "alpha",
        "lambda_init",
        "start",
        "blocks",
        "side",
        "sides",
        "rnk",
        "--",
        "-x",
    )
    name = rng.choice([*FIELDS, *options, "config", "no_center_crop"])
    words = [f"--{name}", rng.choice(values)]
    if rng.random() < 0.5:
        words += ["--method", rng.choice([*METHODS, "x", ""])]
    if rng.random() < 0.3:
        words = [f"--{name}={rng.choice(values)}"]

    def run() -> bool:
        try:
            train_config(words)
        except SystemExit as stop:
            raise ValueError(f"argparse {name} {stop.code}") from None
        except FlagError as error:
            raise ValueError(f"{name}: {error}") from None
        return True  # what is accepted has passed its field's rule

    kind, text = outcome(run, (name, *words, "text file", *(f"`{field}`" for field in FIELDS)))
    return kind, f"{' '.join(words)[:80]}: {text[:200]}"


def yaml_case(rng: random.Random, work: Path) -> tuple[str, str]:
    import yaml

    sound = yaml.safe_dump({k: v for k, v in Config().to_dict().items() if v is not None})
    path = work / "some.yaml"
    path.write_bytes(rng.choice([damage.edit_yaml] * 5 + damage.ANY)(sound.encode(), rng))

    def run() -> bool:
        train_config(["--config", str(path)])
        return True

    fields = tuple(f"`{n}" for n in (*FIELDS, "rank"))
    kind, text = outcome(run, ("some.yaml", *fields, "method", "unknown option"))
    return kind, f"{path.read_bytes()[:60]!r}: {text[:200]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = {
        "load": 2553,
        "export": 1702,
        "transformers": 1000,
        "resume": 418,
        "flags": 1455,
        "yaml": 400,
    }
    parser.add_argument("--only", nargs="+", choices=list(tables), default=list(tables))
    parser.add_argument("--cases", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        work = Path(folder)
        for name in a.only:
            case: Callable[[random.Random], tuple[str, str]]
            if name in ("load", "export"):
                adapters = Adapters(work / name)
                case = lambda rng, x=adapters, e=name == "export": x.case(rng, e)  # noqa: E731
            elif name == "transformers":
                several = [OfTransformer(work / kind, kind) for kind in MAKE]
                case = lambda rng, x=several: rng.choice(x).case(rng, rng.random() < 0.5)  # noqa: E731
            elif name == "resume":
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(io.StringIO()),
                ):
                    case = Resumed(work / name).case
            else:
                function = flags_case if name == "flags" else yaml_case
                case = lambda rng, f=function: f(rng, work)  # noqa: E731
            found, count = Counter[str](), max(1, round(tables[name] * a.cases))
            for number in range(count):
                kind, words = case(random.Random(f"{a.seed} {name} {number}"))
                found[kind] += 1
                if kind not in ("clean", "harmless"):
                    print(f"{name} {number}: {kind}: {words}", flush=True)
            rows.append((name, count, found))
    print("\n| tried | cases | " + " | ".join(OUTCOMES) + " |")
    print("|---" * (2 + len(OUTCOMES)) + "|")
    for name, count, found in rows:
        print(f"| {name} | {count} | " + " | ".join(str(found[o]) for o in OUTCOMES) + " |")


if __name__ == "__main__":
    main()
