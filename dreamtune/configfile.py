"""Configs from YAML files, flags and earlier runs."""

from __future__ import annotations

import importlib.metadata
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from dreamtune.config import FIELDS, Config, plain_default

METHODS_GROUP = "dreamtune.methods"
# Changing these between a run and its continuation leaves the numbers of the run as they were.
FREE_ON_RESUME = frozenset(
    [
        "output_dir",
        "name",
        "resume_from_checkpoint",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "report_to",
        "sample_batch_size",
        "class_data_dir",
        "device",
        "capture",
        "compile",
        "fused",
        "early_stop",
    ]
)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """' Did you mean `x`?' or ''."""
    found = get_close_matches(word, list(known), 2, 0.55)
    return f" Did you mean {' or '.join(f'`{n}`' for n in found)}?" if found else ""


def entry_points() -> dict[str, EntryPoint]:
    """name -> entry point of the methods that other packages offer: their group is
    `dreamtune.methods`, each is named like its method, its value is `module:Class`.

    Raises ValueError for one without a class, or a second of one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=METHODS_GROUP):
        if not point.attr:
            raise wrong(point, "it must name `module:Class`")
        if found.get(point.name, point).value != point.value:
            raise wrong(point, f"`{found[point.name].value}` has that name too")
        found[point.name] = point
    return found


def wrong(point: EntryPoint, why: str) -> ValueError:
    """What is wrong with an entry point, and whose it is."""
    owner = f" of `{point.dist.name}`" if point.dist is not None else ""
    return ValueError(
        f"the entry point `{point.name} = {point.value}`{owner} in {METHODS_GROUP} gives no "
        f"method: {why}. Mend that package, or uninstall it."
    )


def from_mapping(
    values: Mapping[str, Any], method_options: Mapping[str, Mapping[str, Any]]
) -> Config:
    """A config from YAML or flags. Keys that are options of the method go to `options`.

    method_options: method -> option -> default, as `options_of_methods` gives it.
    """
    values = dict(values)
    options = dict(values.pop("options", {}))
    method = values.get("method", FIELDS["method"].default)
    for key in [k for k in values if k not in FIELDS]:
        known = {**FIELDS, **dict.fromkeys(method_options.get(method, ()))}
        if key in method_options.get(method, ()):
            options[key] = values.pop(key)
            continue
        owners = [m for m, o in method_options.items() if key in o]
        if owners and method in method_options:
            raise ValueError(f"`{key}` is an option of {', '.join(owners)}, not of {method}.")
        raise ValueError(f"unknown option `{key}`.{nearest(key, known)}")
    return Config(**values, options=options)


def read_yaml(path: str | Path) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no config file `{path}`.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"`{path}` is not YAML: {error}") from None
    if not isinstance(loaded or {}, dict):
        raise ValueError(f"`{path}` must hold `name: value` lines, got {type(loaded).__name__}.")
    return loaded or {}


def continued(config: Config, saved_file: Path) -> Config:
    """The config of a resumed run: what is left at its default comes from the run; what differs
    must be free to.

    Raises ValueError that names every field that would change the run.
    """
    if not saved_file.is_file():
        raise ValueError(
            f"there is no `{saved_file}`: {saved_file.parent} is not the folder of a run."
        )
    saved = read_yaml(saved_file)
    default = {name: plain_default(name) for name in FIELDS}
    merged, clashes = {}, []
    for key in FIELDS:
        now = getattr(config, key)
        old = saved.get(key, default[key])
        merged[key] = old if now == default[key] and key != "resume_from_checkpoint" else now
        if key == "options":
            merged[key] = {**old, **now}
        free = key in FREE_ON_RESUME or (
            key == "max_train_steps" and str(saved.get("lr_scheduler")).startswith("constant")
        )
        if merged[key] != old and not free:
            clashes.append(f"`{key}` was {old!r}, is {now!r}")
    if clashes:
        raise ValueError(
            f"the run in {saved_file.parent} was started otherwise: {'; '.join(clashes)}. "
            "Leave them out to continue it, or start a new run with another --output_dir."
        )
    return Config(**merged)
