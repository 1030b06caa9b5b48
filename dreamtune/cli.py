"""`dreamtune`: train, generate, export, methods. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "train": "teach a base model one subject from a few photos",
    "generate": "make images with a trained adapter",
    "export": "write an adapter as a LoRA file",
    "methods": "list the adapter methods and their options",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 or 2 for an error that is explained, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(
            "usage: dreamtune COMMAND ...\n\n"
            + "\n".join(f"  {n:<10}{t}" for n, t in COMMANDS.items())
            + "\n\n`dreamtune COMMAND --help` says more. Without any flag `dreamtune train` runs "
            "on the embedded base."
        )
        return 0
    if command == "--version":
        from dreamtune.version import __version__

        print(__version__)
        return 0
    from dreamtune.fields import nearest

    if command not in COMMANDS:
        print(
            f"dreamtune: unknown command `{command}`.{nearest(command, COMMANDS)} "
            f"There are {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    try:
        return {"train": train, "generate": generate, "export": export, "methods": methods}[
            command
        ](arguments[1:])
    except ValueError as error:
        if os.environ.get("DREAMTUNE_TRACEBACK"):
            raise
        print(f"dreamtune {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\n{error}" if str(error) else "\nStopped.", file=sys.stderr)
        return 130


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
        print(f"{name:<10} learning rate {method.learning_rate:<8g} {options or 'no options'}")
        print(f"{'':<10} {method.paper}")
        if method.note:
            print(f"{'':<10} {method.note}")
    return 0


def generate(argv: Sequence[str]) -> int:
    from dreamtune.flags import HelpFormatter, Parser

    parser = Parser(
        prog="dreamtune generate",
        description=COMMANDS["generate"],
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "adapter", help="adapter or LoRA file, or the folder of a run (its best is taken)"
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
        "--num_inference_steps", type=int, help="sampling steps [default: the run's, else 25]"
    )
    parser.add_argument(
        "--guidance_scale", type=float, help="[default: the run's, else 4 up to 256 px, else 7.5]"
    )
    parser.add_argument(
        "--output_dir", default="generated", help="folder of the images; never overwritten"
    )
    a = parser.parse_args(argv)
    quieten()
    from dreamtune.pipeline.generate import generate as run

    paths = run(
        Path(a.adapter),
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
    print("\n".join(str(p) for p in paths))
    return 0


def export(argv: Sequence[str]) -> int:
    from dreamtune.files.formats import EXPORTS
    from dreamtune.flags import HelpFormatter, Parser

    parser = Parser(
        prog="dreamtune export",
        description=COMMANDS["export"],
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "adapter", help="adapter.safetensors, or the folder of a run (its best is taken)"
    )
    parser.add_argument("output_dir", help="folder for the file")
    parser.add_argument(
        "--format",
        default="diffusers",
        choices=tuple(EXPORTS),
        help="what the file is for: " + "; ".join(f"{k} ({v})" for k, v in EXPORTS.items()),
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        help="the base, where the method contains its weights [default: the one of the run]",
    )
    parser.add_argument("--dtype", default="fp32", help="of the file's tensors: fp32, fp16 or bf16")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    a = parser.parse_args(argv)
    quieten()
    from dreamtune.files.export import export as run

    print(
        run(
            a.adapter,
            a.output_dir,
            format=a.format,
            base=a.pretrained_model_name_or_path,
            dtype=a.dtype,
            overwrite=a.overwrite,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
