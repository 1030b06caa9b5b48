"""What is known of an adapter file, as text for a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dreamtune.files.find import run_settings
from dreamtune.files.formats import EXPORTS, NATIVE
from dreamtune.files.info import Info
from dreamtune.files.names import flat
from dreamtune.files.tensors import hash_of_json
from dreamtune.injection.targets import TARGET_MODULES
from dreamtune.models.load import prefixes_for

BAR = 24  # characters of the longest bar
SHOWN = 200  # of a value
# Ends of the names of a UNet's layers, in diffusers and in the first checkpoints.
KINDS = (
    *TARGET_MODULES, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "in_layers.2", "out_layers.3", "skip_connection",
    "emb_layers.1", "downsamplers.0.conv", "upsamplers.0.conv", "op", "conv", "conv_in", "conv_out",
    "linear_1", "linear_2",
)  # fmt: skip


def page(info: Info, encoding: str = "utf-8") -> str:
    """The text for a terminal of this encoding; nothing in it can move a cursor."""
    rows = [
        ("format", f"{info.format}; read by {EXPORTS.get(info.format, 'dreamtune')}"),
        ("method", info.method),
        ("rank", _counted(info.ranks) or "not known without the base"),
        ("strength", _counted(info.strengths) + (info.doubt and f"; {info.doubt}")),
        ("layers", _layers(info.layers)),
        ("change", _bars(info, encoding)),
        ("changed", info.changed and f"since it was written: {info.changed}"),
        ("metadata", "\n".join(f"{k}: {_plain(v)}" for k, v in info.metadata.items())),
        ("base", _base(info)),
        ("load", _ways(info)),
    ]
    lines = [_clean(str(info.path))]
    for name, text in rows:
        for number, line in enumerate(text.splitlines() if text else []):
            lines.append(f"{'' if number else name:<10}{_clean(line)}".rstrip())
    return "\n".join(lines)


def _counted(counts: Mapping[Any, int]) -> str:
    """`16`, or `4 in 16 layers, 8 in 16 layers`."""
    if len(counts) < 2:
        return "".join(f"{value:g}" for value in counts)
    shown = sorted(counts.items())[:6]
    words = [f"{value:g} in {count} layers" for value, count in shown]
    return ", ".join(words) + (", ..." if len(counts) > len(shown) else "")


def _layers(paths: Iterable[str]) -> str:
    names = [flat(f".{path}") for path in paths]
    kinds = [next((k for k in KINDS if n.endswith(flat(f".{k}"))), "others") for n in names]
    there = [kind for kind in (*KINDS, "others") if kind in kinds]
    projections = [kind for kind in there if kind in TARGET_MODULES]
    attentions = sorted({word for name in names for word in re.findall(r"attn\d+", name)})
    words = ", ".join(projections) + (f" of {', '.join(attentions)}" if attentions else "")
    return f"{len(names)}: {', '.join(filter(None, [words, *there[len(projections) :]]))}"


def _bars(info: Info, encoding: str) -> str:
    if not info.sizes:
        return "its size takes the base's weights: --pretrained_model_name_or_path"
    try:
        "█".encode(encoding)
        sign = "█"
    except (UnicodeEncodeError, LookupError):
        sign = "#"
    most, width = max(info.sizes.values()), max(map(len, info.sizes))
    of_weights = ", and over that of the weights" if info.shares else ""
    lines = [f"norm of a block's change{of_weights}"]
    for block, size in info.sizes.items():
        share = f"{info.shares[block]:>8.2%}" if block in info.shares else ""
        bar = sign * (max(1, round(BAR * size / most)) if size else 0)
        lines.append(f"{block:<{width}}  {size:<9.4g}{share}  {bar}")
    return "\n".join(lines)


def _base(info: Info) -> str:
    words = [] if info.base is None else [_plain(info.base)]
    if info.prints:
        digest = hash_of_json(info.prints)[:12]
        words.append(f"fingerprint {digest} of {len(info.prints)} layers")
    else:
        words.append("no fingerprint: whether a base is the one of training is not known")
    if info.far is not None:
        words.append(
            f"the base here is another one: {info.far} of {len(info.prints)} layers differ"
            if info.far
            else "the base here is this one"
        )
    return "; ".join(words)


def _ways(info: Info) -> str:
    file = json.dumps(str(info.path), ensure_ascii=False)
    base = "" if run_settings(info.path) else " --pretrained_model_name_or_path BASE"
    ways = [f"dreamtune.load(pipe, {file})", f"dreamtune generate {file}{base} --prompt ..."]
    if info.format == NATIVE:
        ways.append(f"dreamtune export {file} FOLDER  # a LoRA file for other programs")
    if info.format == "diffusers":
        folder = json.dumps(str(info.path.parent), ensure_ascii=False)
        name = json.dumps(info.path.name, ensure_ascii=False)
        ways.append(f"pipe.load_lora_weights({folder}, weight_name={name})")
    if info.format == "peft":
        folder = json.dumps(str(info.path.parent), ensure_ascii=False)
        network = prefixes_for(info.layers).peft.rstrip(".")
        ways.append(f"peft.PeftModel.from_pretrained(pipe.{network}, {folder})")
    return "\n".join(ways)


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _clean(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _clean(text: str) -> str:
    """A header may hold anything: line ends, and codes that a terminal obeys."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
