"""The flags of `dreamtune train`: built from the config's fields and the methods' signatures,
without importing torch.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
import typing
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from dreamtune.config import FIELDS, HINTS, Config, plain_default
from dreamtune.configfile import entry_points, from_mapping, nearest, read_yaml, wrong

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
    "tokenizer_name": "the tokenizer comes with --pretrained_model_name_or_path",
    "tokenizer_max_length": "the length is the text encoder's own; drop the flag",
    "text_encoder_use_attention_mask": "Stable Diffusion 1.x and 2.x use none; drop the flag",
    "validation_images": "validation images are made from --validation_prompt",
    "class_labels_conditioning": "Stable Diffusion 1.x and 2.x have no class labels; drop the flag",
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


def options_of_methods() -> dict[str, dict[str, Any]]:
    """method -> option -> default, of every method that `find_method` knows.

    Signatures are parsed, not imported: importing a method costs a second of torch, which `--help`
    must not take. What this process has registered by itself is asked directly.
    """
    found = packaged_methods()
    for name, options in outside_methods().items():
        if name in found:
            raise wrong(entry_points()[name], "dreamtune has a method of that name")
        found[name] = options
    adapters = sys.modules.get("dreamtune.adapters")
    if adapters is None:
        return found
    here = adapters.registered()
    return found | {name: adapters.resolve_options(m, {}) for name, m in here.items()}


def packaged_methods() -> dict[str, dict[str, Any]]:
    """The methods of the package, from adapters/*.py."""
    found = {}
    for path in sorted((Path(__file__).parent / "adapters").glob("*.py")):
        for node in classes(path).values():
            name = name_of(node)
            if isinstance(name, str):
                found[name] = keyword_defaults(node)
    return found


def outside_methods() -> dict[str, dict[str, Any]]:
    """The methods of other packages, from the source of their entry points. Raises ValueError that
    names an entry point that gives no method.
    """
    return {name: keyword_defaults(class_of(point)) for name, point in entry_points().items()}


def class_of(point: EntryPoint) -> ast.ClassDef:
    """The class that an entry point names, from the file of its module."""
    top, *inner = point.module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # of a top-level name: it imports nothing
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise wrong(point, f"there is no package `{top}`")
    roots = [Path(p) for p in spec.submodule_search_locations or ()]
    candidates = [Path(spec.origin)] if spec.origin and not inner else []
    for root in roots if inner else ():
        place = root.joinpath(*inner)
        candidates += [place.with_name(f"{place.name}.py"), place / "__init__.py"]
    path = next((p for p in candidates if p.suffix == ".py" and p.is_file()), None)
    if path is None:
        raise wrong(point, f"`{point.module}` has no source file")
    node = classes(path).get(point.attr)
    if node is None:
        raise wrong(point, f"`{path.name}` defines no class `{point.attr}`")
    if name_of(node) != point.name:
        raise wrong(point, f"the `name` of `{point.attr}` is {name_of(node)!r}")
    return node


def classes(path: Path) -> dict[str, ast.ClassDef]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def name_of(node: ast.ClassDef) -> Any:
    return next((constant(s.value) for s in node.body if assigns_name(s)), None)


def assigns_name(statement: ast.stmt) -> typing.TypeGuard[ast.Assign | ast.AnnAssign]:
    if isinstance(statement, ast.Assign):
        targets: list[ast.expr] = statement.targets
    else:
        targets = (
            [statement.target] if isinstance(statement, ast.AnnAssign) and statement.value else []
        )
    return any(isinstance(t, ast.Name) and t.id == "name" for t in targets)


def constant(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def keyword_defaults(node: ast.ClassDef) -> dict[str, Any]:
    functions = [s for s in node.body if isinstance(s, ast.FunctionDef)]
    init = next((f for f in functions if f.name == "__init__"), None)
    if init is None:
        return {}
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return {a.arg: constant(d) for a, d in pairs if a.arg not in ("slots", "generator")}


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
        add_help=True,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Teach a Stable Diffusion model one subject from a few photos. Without any "
        "flag: the embedded "
        "base\nand the subject that ships with it. Flags are spelled as in diffusers' DreamBooth "
        "script; defaults "
        "are ours.",
        epilog="options of the methods, each a flag (--rank 8):\n"
        + "\n".join(
            f"  {method:<12}" + (" ".join(f"--{k} {v}" for k, v in options.items()) or "none")
            for method, options in options_of_methods().items()
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
        group = groups.setdefault(
            f.metadata["group"], parser.add_argument_group(f.metadata["group"])
        )
        text = f"{f.metadata['help']} [default: {shown_default(name)}]".replace("%", "%%")
        hint = HINTS[name]
        if hint is bool:
            group.add_argument(f"--{name}", action="store_true", default=None, help=text)
            group.add_argument(
                f"--no_{name}",
                dest=name,
                action="store_false",
                default=None,
                help=argparse.SUPPRESS,
            )
        elif typing.get_origin(hint) is list:
            group.add_argument(
                f"--{name}", nargs="+", action="extend", default=None, metavar="X", help=text
            )
        else:
            meta = "{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else "X"
            group.add_argument(f"--{name}", default=None, metavar=meta, help=text)
    return parser


def train_config(argv: Sequence[str]) -> Config:
    """The config that the flags (and the YAML files they name) ask for. ValueError for anything not
    understood.
    """
    import yaml

    methods = options_of_methods()
    parser = train_parser()
    known, extra = parser.parse_known_args(argv)
    values: dict[str, Any] = {}
    for path in known.config:
        values |= read_yaml(path)
    values |= {k: v for k, v in vars(known).items() if k != "config" and v is not None}
    every = {k for o in methods.values() for k in o}
    while extra:
        flag = extra.pop(0)
        if not flag.startswith("--"):
            raise FlagError(f"`{flag}` belongs to no flag. A value with spaces needs quotes.")
        name, joined, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if name in FIELDS:
            raise FlagError(f"flags are spelled with underscores: --{name}.")
        if name in OTHERS:
            raise FlagError(f"--{name} is a flag of another trainer: {OTHERS[name]}.")
        if name not in every:
            raise FlagError(f"unknown flag --{name}.{nearest(name, [*FIELDS, *every, 'config'])}")
        if not joined:
            if not extra or extra[0].startswith("--"):
                raise FlagError(f"--{name} needs a value.")
            value = extra.pop(0)
        values.setdefault("options", {})[name] = yaml.safe_load(value)
    method = values.get("method", FIELDS["method"].default)
    if method not in methods:
        raise FlagError(
            f"unknown method `{method}`.{nearest(method, methods)} There are {', '.join(methods)}."
        )
    return from_mapping({**values, **values.pop("options", {})}, methods)
