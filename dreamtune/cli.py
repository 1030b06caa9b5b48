"""`dreamtune`: its commands. Heavy imports wait until one needs them."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreamtune.explained import sentence
from dreamtune.training.output import Output, say, settle

if TYPE_CHECKING:
    from dreamtune.flags import Parser

COMMANDS = {
    "train": "teach a base model one subject from a few photos",
    "generate": "make images with a trained adapter",
    "score": "score an adapter, a run or a folder of images by a named protocol",
    "compare": "say whether two results of `dreamtune score` differ",
    "export": "write an adapter for other programs",
    "analyse": "say how far an adapter moved the weights, and how much of its bound it used",
    "info": "say what an adapter or LoRA file is",
    "methods": "list the adapter methods and their options",
    "serve": "serve many adapters of one base over HTTP, in batches",
    "cache": "say what the cache of scored pictures' features holds, or clear it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 1 or 2 for an error that is explained; after a signal 128 and its number,
    so 130 after Ctrl-C.
    """
    # The interpreter's last collection goes over all that torch and a pipeline hold: a second.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console may lack the letters of a prompt
            with contextlib.suppress(OSError, ValueError):  # of one that is gone
                stream.reconfigure(errors="backslashreplace")
    try:
        return run_command(list(sys.argv[1:] if argv is None else argv))
    finally:
        settle()


def run_command(arguments: list[str]) -> int:
    from dreamtune.fields import nearest

    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        say(
            "usage: dreamtune COMMAND ...\n\n"
            + "\n".join(f"  {n:<10}{t}" for n, t in COMMANDS.items())
            + "\n\n`dreamtune COMMAND --help` says more. Without any flag `dreamtune train` runs "
            "on the embedded base."
        )
        return 0
    if command == "--version":
        from dreamtune.version import __version__

        say(__version__)
        return 0
    if command not in COMMANDS:
        complain(
            f"dreamtune: unknown command `{command}`.{nearest(command, COMMANDS)} "
            f"There are {', '.join(COMMANDS)}."
        )
        return 2
    try:
        return {
            "train": train,
            "generate": generate,
            "score": score,
            "compare": compare,
            "export": export,
            "info": info,
            "analyse": analyse,
            "methods": methods,
            "serve": serve,
            "cache": cache,
        }[command](arguments[1:])
    except KeyboardInterrupt as error:
        complain(f"\n{error}" if str(error) else "\nStopped.")
        return 128 + int(getattr(error, "signal", signal.SIGINT))
    except Exception as error:
        text = sentence(error)
        if text is None or os.environ.get("DREAMTUNE_TRACEBACK"):
            raise
        complain(" ".join([f"dreamtune {command}: {text}", *getattr(error, "__notes__", [])]))
        return 1


def complain(text: str) -> None:
    Output("stderr").write(f"{text}\n")


def train(argv: Sequence[str]) -> int:
    from dreamtune.flags import train_config

    config = train_config(argv)
    quieten()
    if config.subjects or config.sweep:
        from dreamtune.training.train import train_stacked

        return 1 if train_stacked(config).failed else 0
    from dreamtune.training.train import train as run

    run(config)
    return 0


def quieten() -> None:
    """Libraries' bars and advice out of the way of our own messages."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def methods(argv: Sequence[str]) -> int:
    from dreamtune.flags import Parser

    Parser(prog="dreamtune methods", description=COMMANDS["methods"]).parse_args(argv)
    from dreamtune.adapters import METHODS, resolve_options

    for name, method in METHODS.items():
        options = " ".join(f"--{k} {v}" for k, v in resolve_options(method, {}).items())
        say(f"{name:<14} learning rate {method.learning_rate:<8g} {options or 'no options'}")
        say(f"{'':<14} {method.paper}")
        if method.note:
            say(f"{'':<14} {method.note}")
    return 0


def parser_of(command: str) -> Parser:
    from dreamtune.flags import HelpFormatter, Parser

    return Parser(
        prog=f"dreamtune {command}",
        description=COMMANDS[command],
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )


def generate(argv: Sequence[str]) -> int:
    parser = parser_of("generate")
    parser.add_argument(
        "adapter", help="adapter or LoRA file, folder of a run (its best is taken), or hub id"
    )
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    parser.add_argument(
        "--pretrained_model_name_or_path", help="the base [default: the one of the run]"
    )
    parser.add_argument("--num_images", type=int, default=4, help="images a prompt")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="strength of the adapter; 0 is the base"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; the next ones count up"
    )
    parser.add_argument("--resolution", type=int, help="side in pixels [default: the run's]")
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        help="sampling steps [default: the run's, else that of `train`]",
    )
    parser.add_argument(
        "--guidance_scale", type=float, help="[default: the run's, else that of `train`]"
    )
    parser.add_argument(
        "--output_dir", default="generated", help="folder of the images; never overwritten"
    )
    a = parser.parse_args(argv)
    quieten()
    from dreamtune.pipeline.generate import generate as run

    paths = run(
        a.adapter,
        a.prompt,
        base=a.pretrained_model_name_or_path,
        num_images=a.num_images,
        scale=a.scale,
        seed=a.seed,
        resolution=a.resolution,
        steps=a.num_inference_steps,
        guidance_scale=a.guidance_scale,
        output_dir=Path(a.output_dir),
    )
    say("\n".join(str(p) for p in paths))
    return 0


def score(argv: Sequence[str]) -> int:
    quieten()
    from dreamtune.pipeline.score_command import command

    say(command(argv, COMMANDS["score"]))
    return 0


def serve(argv: Sequence[str]) -> int:
    quieten()
    from dreamtune.serving.command import command

    command(argv, COMMANDS["serve"])
    return 0


def compare(argv: Sequence[str]) -> int:
    parser = parser_of("compare")
    parser.add_argument("a", help="folder that `dreamtune score` wrote, or its results.json")
    parser.add_argument("b", help="another; differences are B - A, paired by image")
    a = parser.parse_args(argv)
    from dreamtune.evaluation.compare import compare as run
    from dreamtune.evaluation.results import read_results

    say(run(read_results(a.a), read_results(a.b)).text(a.a, a.b))
    return 0


def cache(argv: Sequence[str]) -> int:
    parser = parser_of("cache")
    parser.add_argument("--clear", action="store_true", help="remove all of it")
    parser.epilog = (
        "`dreamtune score` keeps the features of pictures (no picture, no name) by what their "
        "files hold, so that a second scoring encodes nothing. DREAMTUNE_CACHE names another "
        "folder, or is off; DREAMTUNE_CACHE_MB is the cap in MiB, above which what was not used "
        "for longest goes."
    )
    a = parser.parse_args(argv)
    from dreamtune.metrics import feature_cache

    folder = feature_cache.place()
    if folder is None:
        say(f"There is no cache: {feature_cache.PLACE} is {feature_cache.OFF}.")
        return 0
    if a.clear:
        say(f"Removed {feature_cache.trim(folder, 0) / 2**20:.1f} MiB from {folder}")
    held = feature_cache.all_files(folder)
    size, most = sum(size for _, size, _ in held) / 2**20, feature_cache.limit() >> 20
    say(f"{folder}: {len(held)} files, {size:.1f} MiB of at most {most}")
    return 0


def export(argv: Sequence[str]) -> int:
    from dreamtune.files.formats import EXPORTS

    parser = parser_of("export")
    parser.add_argument(
        "adapter", help="adapter or LoRA file, folder of a run (its best is taken), or hub id"
    )
    parser.add_argument("output_dir", help="folder for what is written")
    parser.add_argument(
        "--format",
        default="diffusers",
        choices=tuple(EXPORTS),
        help="what the file is for: " + "; ".join(f"{k} ({v})" for k, v in EXPORTS.items()),
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        help="the base, where it is needed: the method contains its weights, or the format does"
        " [default: the one of the run]",
    )
    parser.add_argument("--name", help="of the file [default: the run's, or the adapter's own]")
    parser.add_argument("--dtype", default="fp32", help="of the file's tensors: fp32, fp16 or bf16")
    parser.add_argument(
        "--max_rank",
        type=int,
        help="cut the change of each layer to this rank, and say how much of it is kept",
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", help="of a file of merged weights, such as 2GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    parser.add_argument(
        "--no_card", action="store_true", help="write no README.md, which never replaces another"
    )
    a = parser.parse_args(argv)
    quieten()
    from dreamtune.files.export import export as run

    path = run(
        a.adapter,
        a.output_dir,
        format=a.format,
        base=a.pretrained_model_name_or_path,
        dtype=a.dtype,
        name=a.name,
        max_rank=a.max_rank,
        max_shard_size=a.max_shard_size,
        overwrite=a.overwrite,
        card=not a.no_card,
        tell=complain,  # beside the path, which a script reads
    )
    say(str(path))
    return 0


def analyse(argv: Sequence[str]) -> int:
    parser = parser_of("analyse")
    parser.add_argument(
        "adapter", help="an adapter's file or hub id, or the folder of a run: all checkpoints"
    )
    parser.add_argument(
        "--pretrained_model_name_or_path", help="the base [default: the one of the run]"
    )
    parser.add_argument(
        "--output", help="file for the numbers as JSON [default: analysis.json of the run]"
    )
    a = parser.parse_args(argv)
    quieten()
    from dreamtune.evaluation.analysis import analyse as run

    run(a.adapter, base=a.pretrained_model_name_or_path, output=a.output, tell=say)
    return 0


def info(argv: Sequence[str]) -> int:
    parser = parser_of("info")
    parser.add_argument(
        "adapter", help="adapter or LoRA file, folder of a run (its best is taken), or hub id"
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        help="a base to compare with; the size of a method's change that contains the base's"
        " weights takes it [default: the one of the run, if it is on this machine]",
    )
    a = parser.parse_args(argv)
    quieten()
    from dreamtune.files.info import describe
    from dreamtune.files.info_page import page

    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    say(page(describe(a.adapter, a.pretrained_model_name_or_path), encoding))
    return 0


if __name__ == "__main__":
    sys.exit(main())
