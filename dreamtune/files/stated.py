"""The strength that a LoRA file states for its layers, in its header or in the file beside it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import FiniteFloat

from dreamtune.fields import Rank, UnreadableFile, checker, from_file, from_json

HEADER = "lora_adapter_metadata"  # the string in a safetensors header where diffusers keeps it
_PATTERNS: Any = {
    "rank_pattern": dict[str, Rank] | None,
    "alpha_pattern": dict[str, FiniteFloat] | None,
}
_LORA = checker(
    {"r": Rank, "lora_alpha": FiniteFloat, "use_rslora": bool | None, **_PATTERNS},
    needed=("r", "lora_alpha"),
    others=True,
)
_LYCORIS = checker(
    {"r": Rank, "alpha": FiniteFloat, **_PATTERNS}, needed=("r", "alpha"), others=True
)
# A method of PEFT -> the rules for its settings.
METHODS = {"LORA": _LORA, "LOHA": _LYCORIS, "LOKR": _LYCORIS}

# Settings with which a layer does more than `W + scale * up @ down`.
MORE = (
    "use_dora", "lora_bias", "bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Of training, and of finding the layers: they change nothing of what the file says.
SILENT = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights",
    "use_effective_conv2d", "decompose_both", "decompose_factor",
)  # fmt: skip
# Starts that leave the base as it was; the others take a part out of its weights.
STARTS = ("gaussian", "eva", "orthogonal", "mica")

# A pattern is somebody's regular expression: one that may run for ages is not run.
_NESTED = re.compile(r"\)[*+{]")
_WIDE = re.compile(r"(?:\.|\]|\\[^\Wd])(?:[*+]|\{)")
WILDCARDS, ALL_WILDCARDS = 3, 200


@dataclass(frozen=True)
class Stated:
    """Settings as PEFT's config has them.

    Attributes:
        place: where they stand, for messages.
        method: a key of METHODS.
        ranks, alphas: patterns of module paths, and what holds there; the first that matches
            counts.
        root: `scale` is alpha / sqrt(r), not alpha / r (rsLoRA, arXiv 2312.03732).
    """

    place: str = field(compare=False)
    method: str
    r: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...] = ()
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()
    root: bool = False

    def rank(self, path: str) -> int:
        return next((r for pattern, r in self.ranks if pattern.match(path)), self.r)

    def scale(self, path: str) -> float:
        alpha = next((a for pattern, a in self.alphas if pattern.match(path)), self.alpha)
        return alpha / (math.sqrt(self.rank(path)) if self.root else self.rank(path))


def from_header(header: Mapping[str, str], prefix: str, name: str) -> Stated | None:
    """What diffusers wrote into a safetensors header, for the network whose keys begin with
    `prefix`, or for all of the file; None where there is nothing for it.
    """
    if HEADER not in header:
        return None
    place = f"`{HEADER}` in the header of `{name}`"
    values = from_json(header[HEADER], place)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise UnreadableFile(f"{place} must hold names with values, got {type(values).__name__}")
    own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    if not own:  # without prefix, or only for another network
        own = {k: v for k, v in values.items() if "." not in k}
    return stated(own, place) if own else None


def stated(values: Mapping[str, Any], place: str) -> Stated:
    """Raises UnreadableFile for settings that are broken, and for those with which the file is
    more than a low-rank change.
    """
    method = values.get("peft_type") or "LORA"
    if not isinstance(method, str) or method not in METHODS:
        raise UnreadableFile(
            f"{place}: the method is {str(method)[:100]!r}, read are {', '.join(METHODS)}"
        )
    _refuse_more(values, place)
    checked = from_file(METHODS[method], dict(values), place)
    known = {"r", "lora_alpha", "alpha", "use_rslora", "init_lora_weights", *_PATTERNS}
    unknown = [k for k, v in values.items() if v and k not in known.union(MORE, SILENT)]
    if unknown:
        warnings.warn(
            f"{place}: not known here and not applied: {', '.join(k[:100] for k in unknown[:5])}",
            stacklevel=2,
        )
    ranks, alphas = (checked.get(name) or {} for name in _PATTERNS)
    _refuse_slow([*ranks, *alphas], place)
    return Stated(
        place,
        method,
        checked["r"],
        checked["lora_alpha" if method == "LORA" else "alpha"],
        tuple((_compiled(key, place), r) for key, r in ranks.items()),
        tuple((_compiled(key, place), alpha) for key, alpha in alphas.items()),
        bool(checked.get("use_rslora")),
    )


def _compiled(key: str, place: str) -> re.Pattern[str]:
    """As PEFT matches: whole module paths, or their ends from a dot on."""
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise UnreadableFile(f"{place}: the pattern `{key[:100]}`: {error}") from error


def _refuse_more(values: Mapping[str, Any], place: str) -> None:
    more = [k for k in MORE if values.get(k) and values[k] != "none"]
    if more:
        kind = "DoRA: " if more[0] == "use_dora" else ""
        raise UnreadableFile(
            f"{place}: {kind}`{more[0]}` is set, so that the file is more than a low-rank change."
            " Use `pipe.load_lora_weights`, or PEFT"
        )
    refuse_start(values, place)


def refuse_start(values: Mapping[str, Any], place: str) -> None:
    """Raises UnreadableFile for a start that the base's weights lack since."""
    start = values.get("init_lora_weights")
    if not isinstance(start, bool | None) and start not in STARTS:
        raise UnreadableFile(
            f"{place}: it started as {str(start)[:100]!r}, which takes a part out of the base's"
            " weights. Save it as a plain LoRA (PEFT: `path_initial_model_for_weight_conversion`)"
        )


def _refuse_slow(patterns: list[str], place: str) -> None:
    wide = [len(_WIDE.findall(key)) for key in patterns]
    slow = [k for k, n in zip(patterns, wide) if n > WILDCARDS or _NESTED.search(k)]
    if slow or sum(wide) > ALL_WILDCARDS:
        key = (slow or patterns)[0]
        raise UnreadableFile(
            f"{place}: the pattern `{key[:100]}` may take ages to match: write the layers' names"
        )
