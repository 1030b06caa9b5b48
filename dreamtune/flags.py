"""The flags of `dreamtune train`: built from the config's fields and the methods' signatures,
without importing torch.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from typing import Any

from dreamtune.config import FIELDS, HINTS, Config, plain_default, rules
from dreamtune.configfile import from_mapping, parse_yaml, read_yaml, signatures
from dreamtune.fields import choices, nearest, parts, validated

# Flags of diffusers' train_dreambooth_lora.py that have no counterpart here, and what to do
# instead.
OTHERS = {
    "train_text_encoder": "the text encoder stays frozen; drop the flag",
    "cache_latents": "latents are always cached; drop the flag",
    "pre_compute_text_embeddings": "prompt embeddings are always cached; drop the flag",
    "num_train_epochs": "use --max_train_steps",
    "validation_epochs": "use --validation_steps",
    "lora_alpha": "use --alpha, an option of --method lora",
    "use_dora": "use --method (`dreamtune methods` lists them)",
    "lora_layers": "use --target_modules",
    "lora_dropout": "adapters have no dropout; drop the flag",
    "use_8bit_adam": "the optimizer holds only the adapter, a few MB; drop the flag",
    "optimizer": "the optimizer is AdamW; drop the flag",
    "scale_lr": "set --learning_rate itself",
    "lr_num_cycles": "use --lr_scheduler cosine (one half cycle) or constant",
    "lr_power": "use --lr_scheduler linear or cosine",
    "dataloader_num_workers": "latents are cached, nothing is loaded while training; drop the flag",
    "enable_xformers_memory_efficient_attention": "torch's own attention is used; drop the flag",
    "allow_tf32": "use --mixed_precision bf16, the default on a GPU that has it",
    "prior_generation_precision": "class images are made in --mixed_precision",
    "local_rank": "set the LOCAL_RANK variable, or --device cuda:N",
    "logging_dir": "logs go to <output_dir>/logs; use --output_dir",
    "push_to_hub": "upload the run's folder with `hf upload`",
    "hub_token": "upload the run's folder with `hf upload`",
    "hub_model_id": "upload the run's folder with `hf upload`",
    "pretrained_vae_model_name_or_path": "the autoencoder is the base's own, in float32 "
    "where fp16 overflows; drop the flag",
    "text_encoder_lr": "the text encoder stays frozen; drop the flag",
    "do_edm_style_training": "a base is trained with its own noise; drop the flag",
    "output_kohya_format": "use `dreamtune export --format kohya` afterwards",
    "tokenizer_name": "the tokenizer comes with --pretrained_model_name_or_path",
    "tokenizer_max_length": "the length is the text encoder's own; drop the flag",
    "text_encoder_use_attention_mask": "Stable Diffusion uses none; drop the flag",
    "validation_images": "validation images are made from --validation_prompt",
    "class_labels_conditioning": "Stable Diffusion has no class labels; drop the flag",
    "image_interpolation_mode": "photos are resized with Lanczos; drop the flag",
    "train_data_dir": "use --instance_data_dir",
    "network_dim": "use --rank",
    "network_alpha": "use --alpha",
}


class FlagError(ValueError):
    """A flag that cannot be used; the message says which and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its whole usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise FlagError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, extra = self.parse_known_args(args, namespace)
        if extra:
            name = extra[0].lstrip("-").partition("=")[0]
            flags = [s[2:] for a in self._actions for s in a.option_strings if s[:2] == "--"]
            raise FlagError(f"unknown argument {extra[0]}.{nearest(name, flags)}")
        return known


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """`[default: ...]`, but for a default of None, which the help itself explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.nargs == 0  # no value, or a switch
        if nothing or not action.option_strings:
            return action.help
        return f"{action.help} [default: %(default)s]"


def shown_default(name: str) -> str:
    value, shown = plain_default(name), FIELDS[name].metadata["shown"]
    if shown:
        return str(shown)
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(value) if isinstance(value, list) else str(value)


def train_parser() -> Parser:
    parser = Parser(
        prog="dreamtune train",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # only what was given
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Teach a Stable Diffusion model one subject from a few photos. Without any "
        "flag: the embedded base\nand the subject that ships with it. Flags are spelled as in "
        "diffusers' DreamBooth script; defaults are ours.",
        epilog="options of the methods, each a flag (--rank 8):\n"
        + "\n".join(
            f"  {method:<14}" + (" ".join(f"--{k} {v}" for k, (_, v) in options.items()) or "none")
            for method, options in signatures().items()
        ),
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file of the same names; flags override it [default: none]",
    )
    groups: dict[str, Any] = {}
    for name, f in FIELDS.items():
        if name == "options":
            continue
        title, hint = f.metadata["group"], HINTS[name]
        group = groups.setdefault(title, parser.add_argument_group(title))
        text = f"{f.metadata['help']} [default: {shown_default(name)}]".replace("%", "%%")
        if hint is bool:
            group.add_argument(f"--{name}", action="store_true", help=text)
            off, hidden = f"--no_{name}", argparse.SUPPRESS
            group.add_argument(off, dest=name, action="store_false", help=hidden)
        elif any(typing.get_origin(part) is list for part in parts(hint)):
            group.add_argument(f"--{name}", nargs="+", action="extend", metavar="X", help=text)
        else:
            words = choices(hint)
            meta = "{" + ",".join(words) + "}" if words else "X"
            group.add_argument(f"--{name}", metavar=meta, help=text)
    return parser


def train_config(argv: Sequence[str]) -> Config:
    """The config that the flags (and the YAML files they name) ask for. ValueError for anything not
    understood.
    """
    methods = signatures()
    known, extra = train_parser().parse_known_args(argv)
    given = vars(known)
    values: dict[str, Any] = {}
    for path in given.pop("config"):
        values |= read_yaml(path)
    values |= given
    every, options = {k for o in methods.values() for k in o}, {}
    problems = []
    while extra:
        flag = extra.pop(0)
        name, joined, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not joined and flag.startswith("--") and extra and not extra[0].startswith("--"):
            joined, value = "=", extra.pop(0)
        if not flag.startswith("--"):
            problems.append(f"`{flag}` belongs to no flag. A value with spaces needs quotes.")
        elif name in FIELDS:
            problems.append(f"flags are spelled with underscores: --{name}.")
        elif name in OTHERS:
            problems.append(f"--{name} is a flag of another trainer: {OTHERS[name]}.")
        elif name not in every:
            known_names = [*FIELDS, *every, "config"]
            problems.append(f"unknown flag --{name}.{nearest(name, known_names)}")
        elif not joined:
            problems.append(f"--{name} needs a value.")
        else:
            try:
                options[name] = parse_yaml(value, f"--{name}")
            except ValueError as error:
                problems.append(str(error))
    if problems:
        try:
            validated(rules(), {k: v for k, v in given.items() if k in FIELDS})
        except ValueError as error:
            problems.append(str(error))
        raise FlagError("\n".join(problems))
    return from_mapping({**values, **options}, methods)
