"""Folders of PEFT with a method that is more than a plain LoRA, as ours of the same function.

Its tensors do not tell the shapes of all layers, and it has no fingerprint of the base: one that we
did not write is read onto a network.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pydantic import FiniteFloat
from torch import Tensor, nn

from dreamtune.fields import EvenRank, Rank, Terms, UnreadableFile, checker, from_file
from dreamtune.files.complete import lost
from dreamtune.files.fingerprint import fingerprint
from dreamtune.files.lora import about_of, warn_of_changes
from dreamtune.files.names import PEFT, ends_of
from dreamtune.files.native import SHAPES, check_tensors
from dreamtune.files.stated import refuse_start
from dreamtune.files.tensors import TensorFile
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.targets import layers_of, weight_of

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]

# With these set a layer is another function than ours.
MORE = (
    "bias", "fan_in_fan_out", "modules_to_save", "coft", "block_share", "apply_GS", "rank_pattern",
    "alpha_pattern", "lora_bias", "layer_replication", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
_ABOUT = checker({"shapes": SHAPES}, others=True)
NORMS_APART = 1e-2  # relative, of a column; a cast to bf16 moves a norm by 4e-3 at most


def dora(config: Config, layers: Mapping[str, Tensors]) -> dict[str, Any]:
    root = math.sqrt(config["r"]) if config.get("use_rslora") else 1.0
    return {"rank": config["r"], "alpha": config["lora_alpha"] * root}


def oft(config: Config, layers: Mapping[str, Tensors]) -> dict[str, Any]:
    blocks = {len(own["q"]) for own in layers.values()}
    if len(blocks) > 1:
        raise UnreadableFile(
            f"its layers have {', '.join(map(str, sorted(blocks)))} blocks: read is one number for"
            " all, as PEFT's `r` gives it"
        )
    sum_of_powers = bool(config.get("use_cayley_neumann"))
    found: dict[str, Any] = {"blocks": blocks.pop(), "exact": not sum_of_powers}
    if sum_of_powers:
        found["terms"] = config.get("num_cayley_neumann_terms", 5)
    else:  # PEFT's inverse is of the other sign than its sum of powers
        for own in layers.values():
            own["q"] = -own["q"]
    return found


def hra(config: Config, layers: Mapping[str, Tensors]) -> dict[str, Any]:
    for own in layers.values():
        own["u"] = own["u"].mT.contiguous()
    return {"rank": config["r"]}


def delora(config: Config, layers: Mapping[str, Tensors]) -> dict[str, Any]:
    return {"rank": config["r"], "start": "peft"}


Reader = Callable[[Config, Mapping[str, Tensors]], dict[str, Any]]
# Method -> rules for PEFT's settings, end of a key -> our tensor, options; "" is compared alone.
READERS: dict[str, tuple[dict[str, Any], dict[str, str], Reader]] = {
    "dora": (
        {"r": Rank, "lora_alpha": FiniteFloat, "use_rslora": bool | None},
        {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"},
        dora,
    ),
    "oft": (
        {"num_cayley_neumann_terms": Terms, "use_cayley_neumann": bool | None},
        {"oft_R.weight": "q"},
        oft,
    ),
    "hra": ({"r": EvenRank}, {"hra_u": "u"}, hra),
    "delora": (
        {"r": Rank},
        {
            "delora_A": "A", "delora_B": "B", "delora_lambda": "lambda_", "delora_w_norm": "",
        },
        delora,
    ),
}  # fmt: skip
ENDS = tuple(f".{end}" for _, ends, _ in READERS.values() for end in ends)


def method_of(config: Config | None) -> str | None:
    """Ours of the same function; None for a plain LoRA and for what is not read."""
    if config is None:
        return None
    kind = config.get("peft_type")
    if kind in ("LORA", None) and config.get("use_dora"):
        return "dora"
    found = str(kind).lower()
    return found if found in ("oft", "hra", "delora") else None


def read(file: TensorFile, config: Config, place: str, network: nn.Module | None) -> AdapterFile:
    """A file of PEFT's own form of a method. place: of the settings, for messages.

    Raises UnreadableFile for settings and tensors that are broken, or of another function.
    """
    method = method_of(config)
    assert method is not None
    about = from_file(_ABOUT, about_of(file), f"the `dreamtune` header of `{file.name}`")
    prints, shapes = about.get("fingerprint"), about.get("shapes", {})
    targets: dict[str, nn.Linear] = {}
    if network is not None:
        targets = {p: x for p, x in layers_of(network).items() if isinstance(x, nn.Linear)}
        shapes = {path: tuple(layer.weight.shape) for path, layer in targets.items()}
    elif prints is None or not shapes:
        raise ValueError(
            f"PEFT's tensors of `{method}` do not tell the shapes of the layers: pass the UNet as"
            " `base`, in the command as --pretrained_model_name_or_path"
        )
    rules, ends, options_of = READERS[method]
    if more := [k for k in MORE if config.get(k) and config[k] != "none"]:
        raise UnreadableFile(
            f"{place}: `{more[0]}` is set, so that `{method}` here is another function. Use PEFT"
        )
    if method == "dora":
        refuse_start(config, place)
    needed = [name for name in rules if name in ("r", "lora_alpha")]
    checked = from_file(checker(rules, needed=needed, others=True), dict(config), place)
    layers = _by_layer(file, ends, shapes, prints or ())
    norms = {path: own.pop("", None) for path, own in layers.items()}
    if prints is None:
        weights = {path: weight_of(targets[path]) for path in layers}
        prints = fingerprint(weights)
        _compare_norms(file.name, norms, weights)
        warnings.warn(
            f"`{file.name}` has no fingerprint of its base: this one is taken for it", stacklevel=4
        )
    warn_of_changes(file)
    options = options_of(checked, layers)
    found = AdapterFile(
        method=method,
        options=options,
        target_modules=ends_of(layers),
        some_layers=True,
        tensors={f"{p}.{n}": t.float() for p, own in layers.items() for n, t in own.items()},
        metadata=about.get("metadata", {}),
        shapes={path: (shapes[path][0], shapes[path][1]) for path in layers},
        fingerprint=prints,
        source=file.name,
    )
    check_tensors(found)
    return found


def _by_layer(
    file: TensorFile, ends: Mapping[str, str], targets: Collection[str], prints: Collection[str]
) -> dict[str, Tensors]:
    """Module path -> our name -> tensor, of each layer all. prints: layers that were written."""
    layers: dict[str, Tensors] = {}
    for key, tensor in file.tensors.items():
        end = next((e for e in ends if key.endswith(f".{e}")), None)
        path = key.removeprefix(PEFT).removesuffix(f".{end}")
        if end is None or not key.startswith(PEFT) or path not in targets:
            raise UnreadableFile(
                f"`{file.name}`: `{key[:200]}` matches no linear layer of the network. Use PEFT"
            )
        if not tensor.is_floating_point():
            raise UnreadableFile(f"`{file.name}`: `{key}` must be floats, got {tensor.dtype}")
        layers.setdefault(path, {})[ends[end]] = tensor
    needed = set(ends.values()) - {""}
    lacking = [path for path, own in layers.items() if not needed <= own.keys()]
    lacking += [path for path in prints or lost(layers, targets) if path not in layers]
    if lacking or not layers:
        raise UnreadableFile(
            f"`{file.name}`: {len(lacking)} layers lack keys, `{[*lacking, 'none'][0]}` first"
        )
    if any(own[name].dim() < 1 for own in layers.values() for name in own):
        raise UnreadableFile(f"`{file.name}` has numbers where tensors must be")
    return layers


def _compare_norms(
    name: str, norms: Mapping[str, Tensor | None], weights: Mapping[str, Tensor]
) -> None:
    """PEFT keeps the norms of the columns of a DeLoRA's base: they must be this one's."""
    for path, there in norms.items():
        if there is None:
            continue
        here = torch.linalg.vector_norm(weights[path].float(), dim=0).to(there.device)
        close = there.shape == here.shape and bool(
            ((there.float() - here).abs() <= NORMS_APART * here.clamp_min(1e-8)).all()
        )
        if not close:
            raise UnreadableFile(
                f"`{name}`: this base is not the one that the adapter was trained on: the columns"
                f" of `{path}` have other norms"
            )
