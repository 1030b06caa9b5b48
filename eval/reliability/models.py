"""What comes of bases and scorers that are not what they seem: three kinds of damage, one table.

    python eval/reliability/models.py [--only tensors configs code] [--cases 600] [--seed 0]

tensors: each tensor of a small base and of two scorers left out in turn, in every layout that
folders have and in a single file; configs: values of their JSON files changed; code: folders that
ask for code, with "y" on the terminal. Every case is one of
  clean     a ValueError that names the file and what is wrong, or a note that does;
  right     the result of the sound one, or what the file says is what the model has;
  crash     another exception, or a message that names nothing;
  silent    another result without a word;
  hang      more than 20 s;
  code run  code of the folder ran.
All but the first two are listed, and the exit status is 1 if there are any. CPU, about 10 minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
sys.path.insert(0, str(ROOT / "eval" / "reliability"))

import damage  # noqa: E402
import planted  # noqa: E402
from conftest import write_pipeline  # noqa: E402
from files import Hang, limited  # noqa: E402
from left_out import LAYOUTS, each_left_out  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from scorer_folders import write_clip, write_dino  # noqa: E402
from single_file_layout import write_configs, write_single_file  # noqa: E402

from dreamtune.metrics import Clip, Dino  # noqa: E402
from dreamtune.models import single_file  # noqa: E402
from dreamtune.models.load import load_base  # noqa: E402
from dreamtune.models.sample import sample_tensor  # noqa: E402

OUTCOMES = CLEAN, RIGHT, CRASH, SILENT, HANG, CODE = (
    "clean", "right", "crash", "silent", "hang", "code run",
)  # fmt: skip
PART_WORDS = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder"}
PICTURE = Image.linear_gradient("L").resize((48, 40)).convert("RGB")


def use_base(path: Path) -> tuple[list[torch.Tensor], Any, str]:
    """What a base gives, the base, and what it says."""
    base = load_base(str(path))
    told = base.encode_prompts(["a dog", ""])["prompt_embeds"]
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    latents = base.encode_images(pixels).mean
    x, t = latents.expand(2, *latents.shape[1:]), torch.tensor([10, 900])
    t = t.clamp_max(base.scheduler.config.num_train_timesteps - 1)
    given = base.predict(x, t, {"prompt_embeds": told})
    target = base.process().target(x, torch.ones_like(x), t)
    with base.sampling("base") as pipe:
        image = sample_tensor(pipe, ["a dog"], [0], steps=3, guidance_scale=2.0, size=16)
    numbers = [told, latents, given, target, image, base.process().alpha_bar]
    return [n.detach().clone() for n in numbers], base, " ".join(base.notes)


def use_scorer(path: Path) -> tuple[list[torch.Tensor], Any, str]:
    scorer = Clip(str(path)) if (path / "open_clip_config.json").exists() else Dino(str(path))
    found = [scorer.images([PICTURE])]
    if isinstance(scorer, Clip):
        found.append(scorer.texts(["a dog"]))
    return found, scorer, json.dumps(scorer.protocol)


Use = Callable[[Path], tuple[list[torch.Tensor], Any, str]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.shape == y.shape and bool((x - y).abs().max() <= 1e-5) for x, y in zip(a, b))


def judge(
    use: Use,
    path: Path,
    sound: list[torch.Tensor] | None,
    names: tuple[str, ...],
    told: Callable[[Any, str], bool] = lambda loaded, words: False,
    marker: Path | None = None,
) -> tuple[str, str]:
    """names: those that an error must have; told: whether a word or the model itself says why the
    result is another.
    """
    try:
        with limited():
            found, loaded, words = use(path)
    except Hang:
        return HANG, ""
    except ValueError as error:
        kind = CLEAN if all(name in str(error) for name in names) else CRASH
        result = kind, f"{type(error).__name__}: {error}"
    except BaseException as error:
        result = CRASH, f"{type(error).__name__}: {error}"
    else:
        if sound is not None and same(found, sound):
            result = RIGHT, ""
        else:
            result = (CLEAN if told(loaded, words) else SILENT), words
    return (CODE, result[1]) if marker is not None and marker.exists() else result


def tensor_cases(work: Path, every: int) -> Iterator[tuple[str, str, tuple[str, str]]]:
    """(row, case, outcome)."""
    sound = write_pipeline(work / "base")
    for layout in LAYOUTS:
        base = Path(shutil.copytree(sound, work / layout.replace(" ", "-")))
        for part, key in each_left_out(base, layout, every):
            ends = key.removeprefix("text_model.")
            yield f"tensors, {layout}", f"{part} {key}", judge(use_base, base, None, (part, ends))
    single_file.CONFIGS = write_configs(work / "configs")
    file = work / "single.safetensors"
    write_single_file(file, work / "configs")
    tensors = load_file(file)
    parts = {"model.": "unet", "first_stage_model.": "vae", "cond_stage_model.": "text_encoder"}
    for key in list(tensors)[::every]:
        part = next(p for start, p in parts.items() if key.startswith(start))
        save_file({k: v for k, v in tensors.items() if k != key}, file)
        found = judge(load_only, file, None, ("lacks weights of the", PART_WORDS[part]))
        if key in found[1]:  # by its own name, as those that tell what the file is
            found = CLEAN, found[1]
        yield "tensors, single file", key, found
    for write, name in ((write_dino, "model"), (write_clip, "open_clip_model")):
        folder = write(work / name)
        tensors = load_file(folder / f"{name}.safetensors")
        for key in list(tensors)[::every]:
            rest = {k: v for k, v in tensors.items() if k != key}
            save_file(rest, folder / f"{name}.safetensors", metadata={"format": "pt"})
            # transformers names what it lacks, not what the file would call it
            wanted = (folder.name, "lacks weights" if name == "model" else key)
            yield "tensors, scorers", key, judge(use_scorer, folder, None, wanted)


def load_only(path: Path) -> tuple[list[torch.Tensor], Any, str]:
    base = load_base(str(path))
    return [], base, ""


def json_files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.json"))
    return [p for p in found if p.name not in ("vocab.json", "tokenizer.json")]


def config_of(loaded: Any, file: Path) -> dict[str, Any]:
    """What the model made of that file."""
    if isinstance(loaded, Dino):
        said = loaded.protocol
        about = {"image_mean": said["mean"], "image_std": said["std"]}
        about["resample"] = loaded.preprocess.resample.value
        return {**loaded.model.config.to_dict(), **said, **about}
    if isinstance(loaded, Clip):
        return loaded.protocol
    part = {"": loaded, "tokenizer": loaded.tokenizer, "scheduler": loaded.scheduler}.get(
        file.parent.name
    )
    part = part or getattr(loaded, file.parent.name, None)
    config = getattr(part, "config", None)
    if config is None:
        return dict(getattr(part, "init_kwargs", {}))
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def obeyed(before: Any, after: Any, loaded: Any, words: str, file: Path) -> bool:
    """Whether each value that was changed is what the model has, or is named in its notes."""
    if not isinstance(after, dict):
        return False
    used = config_of(loaded, file)
    for key in {*before, *after}:
        if key in before and key in after and before[key] == after[key]:
            continue
        value, has = after.get(key), used.get(key)
        as_lists = [list(v) if isinstance(v, tuple) else v for v in (value, has)]
        if (
            key in words
            or "are left out" in words
            or (key in after and key in used and as_lists[0] == as_lists[1])
        ):
            continue
        if key not in after and (has == before[key] or file.name == "preprocessor_config.json"):
            continue  # the default is the same, or the scorer's protocol says it
        if isinstance(value, dict):  # sections of open_clip's config; the model was built by them
            continue
        return False
    return True


def config_cases(work: Path, count: int, seed: int) -> Iterator[tuple[str, str, tuple[str, str]]]:
    places = {"base": write_pipeline(work / "base"), "dino": write_dino(work / "dino")}
    (work / "dino/preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3] * 3, "resample": 2,
                "size": {"height": 32, "width": 32}, "do_resize": True, "do_normalize": True,
            }
        )
    )  # fmt: skip
    places["clip"] = write_clip(work / "clip")
    uses: dict[str, Use] = {"base": use_base, "dino": use_scorer, "clip": use_scorer}
    sound = {name: uses[name](folder)[0] for name, folder in places.items()}
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(["base", "base", "base", "dino", "clip"])
        file = rng.choice(json_files(places[name]))
        data = file.read_bytes()
        how = damage.edit_json_file if rng.random() < 0.85 else rng.choice(damage.ANY)
        file.write_bytes(how(data, rng))
        before = json.loads(data)
        try:
            after = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            after = None
        told = lambda loaded, words, b=before, a=after, f=file: obeyed(b, a, loaded, words, f)  # noqa: E731
        found = judge(uses[name], places[name], sound[name], (), told)
        named = (file.name, file.parent.name, "--resolution")
        if found[0] == CLEAN and "Error" in found[1] and not any(n in found[1] for n in named):
            found = CRASH, found[1]
        changed = (
            {k: after.get(k) for k in {*before, *after} if before.get(k) != after.get(k)}
            if (isinstance(after, dict))
            else str(file.read_bytes()[:60])
        )
        yield "config values", f"{number} {name}/{file.name} {str(changed)[:200]}", found
        file.write_bytes(data)


def said(loaded: Any, words: str) -> bool:
    return bool(words) and not isinstance(loaded, (Clip, Dino))


def code_cases(work: Path) -> Iterator[tuple[str, str, tuple[str, str]]]:
    kinds: list[tuple[str, Any, Any, Use]] = [
        ("base", planted.base_plants(), write_pipeline, use_base),
        ("dino", planted.dino_plants(), write_dino, use_scorer),
        ("clip", planted.clip_plants(), write_clip, use_scorer),
    ]
    for kind, plants, write, use in kinds:
        sound = write(work / f"sound-{kind}")
        wanted = use(sound)[0]
        for number, (name, plant) in enumerate(plants.items()):
            folder = work / f"{kind}-{number}"
            shutil.copytree(sound, folder)
            marker = work / f"ran-{kind}-{number}"
            plant(folder, marker)
            os.chdir(folder)
            sys.stdin = io.StringIO("y\n" * 20)
            yield "planted code", f"{kind}: {name}", judge(use, folder, wanted, (), said, marker)
            os.chdir(work)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = ("tensors", "configs", "code")
    parser.add_argument("--only", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--every", type=int, default=1, help="take each n-th tensor")
    parser.add_argument("--cases", type=int, default=600, help="configs changed")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in a.only:
            work = Path(folder, name)
            work.mkdir()
            cases = {
                "tensors": lambda w: tensor_cases(w, a.every),
                "configs": lambda w: config_cases(w, a.cases, a.seed),
                "code": code_cases,
            }[name](work)
            for row, case, (kind, words) in cases:
                rows.setdefault(row, Counter())[kind] += 1
                if kind not in (CLEAN, RIGHT):
                    print(f"{row}: {kind}: {case}: {words[:300]}", file=sys.stderr, flush=True)
    print("| tried | cases | " + " | ".join(OUTCOMES) + " |")
    print("|---" * (2 + len(OUTCOMES)) + "|")
    for row, count in rows.items():
        print(f"| {row} | {count.total()} | " + " | ".join(str(count[o]) for o in OUTCOMES) + " |")
    return int(any(count[o] for count in rows.values() for o in OUTCOMES[2:]))


if __name__ == "__main__":
    sys.exit(main())
