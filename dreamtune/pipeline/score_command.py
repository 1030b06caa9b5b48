"""`dreamtune score` on the command line: its flags, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from dreamtune.evaluation.layout import LAYOUT, read_photos
from dreamtune.evaluation.protocol_file import find_protocol
from dreamtune.evaluation.protocols import PROTOCOLS
from dreamtune.evaluation.results import Results
from dreamtune.evaluation.selfcheck import selfcheck, text_of
from dreamtune.flags import HelpFormatter, Parser
from dreamtune.metrics import METRICS
from dreamtune.pipeline.score import EXTRACTORS, load_scorers, score
from dreamtune.training.output import say


def command(argv: Sequence[str], description: str) -> str:
    """The command line; what it prints last."""
    parser = Parser(
        prog="dreamtune score",
        description=f"{description[0].upper()}{description[1:]}.",
        epilog="layout of the folders:\n" + LAYOUT + "\n\nprotocols:\n"
        + "\n".join(f"  {name:<17}{p.about}" for name, p in PROTOCOLS.items()),
        allow_abbrev=False,
        formatter_class=_Formatter,
    )  # fmt: skip
    add = parser.add_argument
    add("source", help="folder of images or of a pipeline, run, adapter file or hub id")
    add("--photos", help="photos by subject, or of the one subject [default: the run's]")
    add("--protocol", default="dreamtune", help="a preset below, or a YAML or JSON file")
    add("--output_dir", help="a new folder [default: scores/<name>]")
    add("--pretrained_model_name_or_path", help="the base [default: the one of the run]")
    add("--instance_prompt", help="as the adapter was trained [default: the run's, prompt.txt]")
    add("--identifier", help="the rare word in the prompts [default: the run's, else sks]")
    add("--base_images", help="the base's images, laid out alike, for a folder of images")
    add("--gallery", help="subjects to find one's own among [default: --photos]")
    add("--sam", help="folder of a SAM, for the masks of pictures that have none [default: none]")
    add(
        "--selfcheck",
        action="store_true",
        help="the source is DreamBooth's photos by subject: print their scores among themselves "
        "beside the published ones, to see that weights and preprocessing are right",
    )
    for name in EXTRACTORS:
        add(f"--{name}", help=f"weights of {name} [default: the protocol's, if on this machine]")
    a = vars(parser.parse_args(argv))
    weights = {name: value for name in EXTRACTORS if (value := a.pop(name)) is not None}
    if a.pop("selfcheck"):
        return checked(a.pop("source"), a.pop("protocol"), weights, a)
    base = a.pop("pretrained_model_name_or_path")
    results = score(a.pop("source"), **a, base=base, weights=weights, tell=say)
    return summary(results)


def checked(
    folder: str, protocol: str, weights: Mapping[str, str], unused: Mapping[str, Any]
) -> str:
    """Of `--selfcheck`. unused: other flags, which would be ignored."""
    if given := [name for name, value in unused.items() if value is not None]:
        raise ValueError(f"`{given[0]}` has no meaning with --selfcheck: leave it out.")
    chosen, photos = find_protocol(protocol), read_photos(folder)[0]
    checks = selfcheck(photos, load_scorers(chosen, weights, False), chosen)
    return text_of(checks, photos, chosen)


class _Formatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Layout and list of protocols as they stand."""


def summary(results: Results) -> str:
    lines = []
    for key, e in results.scores().items():
        if key in METRICS:
            interval = "" if e.low is None else f"  95% {e.low:.3f} to {e.high:.3f}"
            lines.append(f"{METRICS[key].title:<32} {e.mean:.3f}{interval}  n = {e.n}")
    return "\n".join([*lines, *(f"Warning: {text}" for text in results.warnings)])
