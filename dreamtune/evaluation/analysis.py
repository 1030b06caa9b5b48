"""What an adapter did to the weights: how far they moved, their hyperspherical energy, and how much
of its bound it has used. (ETHER, arXiv 2405.20271, section 5.3; DeLoRA, arXiv 2503.18225, fig. 3.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.evaluation.curves import curve
from dreamtune.files.export import network_of_run
from dreamtune.files.find import BEST, adapter_file, run_of
from dreamtune.files.fingerprint import check_base, fingerprint
from dreamtune.files.formats import read_adapter
from dreamtune.files.layers import adapter_of_layer, weights_of
from dreamtune.files.names import block_of
from dreamtune.files.tensors import read_keys
from dreamtune.files.whole import check_writable, whole
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.models.load import load_network

FILE = "analysis.json"
KINDS = {
    "distance": "Relative weight distance",
    "energy": "Hyperspherical energy, changed over base",
    "share": "Share of the bound used",
}
START, END = "<!-- analysis -->", "<!-- end of analysis -->"


def hyperspherical_energy(weight: Tensor) -> float:
    """The mean, over all pairs of the rows of W (out, in) and their negatives, of one over the
    distance of the unit vectors (OFT, arXiv 2306.07280, equation 1, a mean instead of a sum). Rows
    of zeros are left out; a distance counts as at least 1e-4. Lower is more spread out.
    """
    rows = weight.double()
    lengths = rows.norm(dim=1, keepdim=True)
    rows = (rows / lengths.clamp_min(1e-300))[lengths.squeeze(1) > 0]
    n = len(rows)
    if n == 0:
        return math.nan
    cosine = rows @ rows.mT
    upper = torch.triu_indices(n, n, 1)
    c = cosine[upper[0], upper[1]].clamp(-1, 1)
    near, far = ((2 - 2 * sign * c).sqrt().clamp_min(1e-4) for sign in (1, -1))
    # a pair of rows stands for four pairs; a row and its negative are 2 apart
    total = 2 * float((1 / near + 1 / far).sum()) + n / 2
    return total / (n * (2 * n - 1))


def relative_distance(changed: Tensor, weight: Tensor) -> Tensor:
    """‖W' - W‖ / ‖W‖ in Frobenius norms, (..., S). W' is (..., S, out, in), W (..., out, in)."""
    moved = torch.linalg.matrix_norm(changed - weight.unsqueeze(-3))
    return moved / torch.linalg.matrix_norm(weight).unsqueeze(-1)


@torch.no_grad()
def analyse_file(file: AdapterFile, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Module path -> `distance`, see `relative_distance`; `energy`, of W' over that of W;
    `share` of its bound, None for a method without one. weights: of the base, (out, in).
    """
    found = {}
    for path in file.shapes:
        weight = weights[path].float()
        adapter = adapter_of_layer(file, path, weight)
        merged = adapter.merged(weight)
        share = adapter.share_of_bound(weight)
        found[path] = {
            "distance": float(relative_distance(merged, weight)[0]),
            "energy": hyperspherical_energy(merged[0]) / hyperspherical_energy(weight),
            "share": None if share is None else float(share[0]),
        }
    return found


def means(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean of each kind over the layers that have it."""
    found = {}
    for kind in KINDS:
        values = [layer[kind] for layer in layers.values() if layer[kind] is not None]
        found[kind] = fmean(values) if values else None
    return found


def analyse(
    source: str | Path,
    base: str | Path | nn.Module | None = None,
    output: str | Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Of an adapter's file, or of a run's folder: all checkpoints and the best, which is the one
    that loading and exporting take.

    Args:
        base: what `dreamtune.export` takes; of a run its own by default.
        output: where the JSON goes; by default analysis.json of the run, else it is only returned.
            The report of a run gains its plots, and a table of the best.
        tell: called with a line for each file that is done.

    Returns: `method`, `files`: for each `name`, `step` (None outside a run), `best` (whether it is
    the run's best), `layers`, `blocks` and `mean` of `analyse_file`'s values.

    Raises ValueError: no adapter there, no base or another one, a file that cannot be written.
    """
    folder = Path(source)
    run = folder if folder.is_dir() and run_of(folder / "x") == folder.resolve() else None
    files = files_of_run(run) if run else [(None, False, adapter_file(source))]
    target = Path(output) if output is not None else run / FILE if run else None
    if target is not None:
        check_writable(target.parent)
    entries, method, network = [], "", None
    for step, best, path in files:
        if network is None:
            network = (
                load_network(base)
                if base is not None
                else network_of_run(path, "the change is measured against the base weights")
            )
        file = read_adapter(path, network)
        method = file.exported_from or file.method
        weights = weights_of(file, network)
        if warning := check_base(file, fingerprint(weights), force=False):
            tell(f"{path.name}: {warning}")
        layers = analyse_file(file, weights)
        blocks: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys(block_of(layer) for layer in layers):
            blocks[name] = means({k: v for k, v in layers.items() if block_of(k) == name})
        entry = {"name": path.name, "step": step, "best": best, "mean": means(layers)}
        entries.append({**entry, "blocks": blocks, "layers": layers})
        tell(line(entry))
    result = {"method": method, "files": entries}
    if target is not None:
        with whole(target) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if run is not None and (run / "report.html").is_file():
        put_into(run / "report.html", plots(entries))
    return result


def files_of_run(run: Path) -> list[tuple[int | None, bool, Path]]:
    """(step, whether it is the best, adapter) of each checkpoint and of best/, by step: a best that
    has a checkpoint too is in both, and stands once."""
    found: dict[int, tuple[bool, Path]] = {}
    for folder in run.glob("checkpoint-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdigit():
            found[int(number)] = False, adapter_file(folder)
    if (run / BEST).is_dir():
        best = adapter_file(run / BEST)
        step = read_keys(best).about.get("metadata", {}).get("step")
        if isinstance(step, int):
            found[step] = True, best
    return [(step, *found[step]) for step in sorted(found)] or [(None, False, adapter_file(run))]


def line(entry: Mapping[str, Any]) -> str:
    mean = entry["mean"]
    where = entry["name"] if entry["step"] is None else f"step {entry['step']}"
    where += ", the best" if entry["best"] and entry["step"] is not None else ""
    share = "" if mean["share"] is None else f", {mean['share']:.0%} of its bound used"
    return (
        f"{where}: weights moved by {mean['distance']:.2%} of their size, hyperspherical energy "
        f"{mean['energy']:.4f} of the base's{share}"
    )


def plots(entries: Sequence[Mapping[str, Any]]) -> str:
    """A section of the report: each kind over the steps, and a table by block of the best, or of
    the last where there is none."""
    place = next((i for i, entry in enumerate(entries) if entry["best"]), len(entries) - 1)
    shown = entries[place]
    rows = "".join(
        f'<tr><th scope="row"><code>{name}</code></th>'
        + "".join(f"<td>{'–' if v[k] is None else f'{v[k]:.4f}'}</td>" for k in KINDS)
        + "</tr>"
        for name, v in shown["blocks"].items()
    )
    charts = ""
    if len(entries) > 1:
        steps = [entry["step"] for entry in entries]
        for kind, title in KINDS.items():
            values = [entry["mean"][kind] for entry in entries]
            charts += curve(title, steps, values, place, number_format=".4f")
    heads = "".join(f'<th scope="col">{title}</th>' for title in KINDS.values())
    when = "" if shown["step"] is None else f" at step {shown['step']}"
    when += ", the best" if shown["best"] and when else ""
    return (
        '<section aria-labelledby="analysis"><h2 id="analysis">What happened to the weights</h2>'
        f'<div class="charts">{charts}</div><div class="scroll"><table><thead><tr>'
        f'<th scope="col">Block{when}</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</section>"
    )


def put_into(report: Path, section: str) -> None:
    """Writes the section into a report, in the place of an earlier one."""
    text = report.read_text(encoding="utf-8")
    before, found, rest = text.partition(START)
    if found:
        rest = rest.partition(END)[2]
    else:
        before, closing, rest = text.partition("<footer")
        rest = closing + rest
    with whole(report) as partial:
        partial.write_text(f"{before}{START}{section}{END}{rest}", encoding="utf-8")
