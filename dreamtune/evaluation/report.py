"""The page a person looks at: one self-contained report.html, no scripts, nothing fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from dreamtune.configfile import kind_and_place
from dreamtune.evaluation.curves import curve
from dreamtune.evaluation.inline import UNSCALED, img, write_html
from dreamtune.evaluation.overfit import last_overfitting
from dreamtune.evaluation.selection import RULE, Choice, Rating
from dreamtune.metrics.table import Metric, scored

PHOTO_SIDE, IMAGE_SIDE = 256, 448  # longest side in pixels of what is put into the page

SHARES = ("Subject gained", "Prompt kept", "Product")
FILES = {
    "pytorch_lora_weights.safetensors": "LoRA for diffusers",
    "adapter.safetensors": "the adapter as dreamtune keeps it, for more training or other formats",
    "metrics.jsonl": "the scores of every scoring",
    "config.yaml": "all settings, to run it again",
}


def write_report(
    run_dir: str | Path,
    *,
    title: str,
    photos: Sequence[Image.Image],
    prompts: Sequence[str],
    base_images: Sequence[Image.Image],
    adapted_images: Sequence[Image.Image],
    history: Sequence[Mapping[str, Any]],
    choice: Choice,
    settings: Mapping[str, Any],
    base: str,
    example_prompt: str,
    sample_settings: Mapping[str, Any] | None = None,
    progress: Sequence[tuple[int, Image.Image]] = (),
    protocol: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `run_dir/report.html` and returns its path.

    Args:
        photos: the subject's photos.
        prompts, base_images, adapted_images: of equal length; both images of a row were made from
            that prompt with the same seed. Rows with the same prompt are shown together.
        history: the records of metrics.jsonl.
        choice: `choose_best` of them: what the page shows is what best/ holds.
        settings: every resolved setting, shown as they are; of a path only its end.
        base: what `from_pretrained` takes, or "embedded".
        example_prompt: with the identifier, such as "a photo of sks dog in the snow".
        sample_settings: keyword arguments of the pipeline call, if not its defaults.
        progress: (step, image) of one prompt and seed over training.
        protocol: `Scorers.protocol`.

    Raises:
        ValueError: the lengths differ.
    """
    if not len(prompts) == len(base_images) == len(adapted_images):
        raise ValueError(
            f"`prompts`, `base_images` and `adapted_images` need equal lengths, got {len(prompts)},"
            f" {len(base_images)} and {len(adapted_images)}"
        )
    run_dir = Path(run_dir)
    per_prompt = max((prompts.count(p) for p in set(prompts)), default=1)
    return write_html(
        run_dir / "report.html",
        "report",
        title,
        subtitle=_subtitle(settings, base, history),
        **_scores(history, choice),
        photos="".join(
            img(p, f"Photo {i + 1} of the subject", PHOTO_SIDE, crop=True)
            for i, p in enumerate(photos)
        ),
        pairs=_pairs(prompts, base_images, adapted_images, choice.step),
        **_layout(base_images, per_prompt),
        strip=_strip(progress, choice.step),
        reason=escape(choice.reason),
        warning=_warning(last_overfitting(history)),
        rule="".join(f"<p>{escape(paragraph)}</p>" for paragraph in RULE),
        protocol=_protocol(protocol),
        snippet=escape(snippet(run_dir, base, example_prompt, sample_settings or {})),
        files=_files(run_dir),
        settings="".join(
            f"<div><dt>{escape(str(k))}</dt><dd><code>{escape(_shown(v))}</code></dd></div>"
            for k, v in settings.items()
            if v is not None
        ),
    )


def snippet(run_dir: Path, base: str, prompt: str, sample_settings: Mapping[str, Any]) -> str:
    """The lines that load the run's best LoRA with diffusers alone."""
    folder = run_dir / "best"
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        folder = run_dir
    shown = Path(os.path.relpath(folder))
    # A run outside the working folder is named from its own name on: no path of ours in a page.
    where = f"{run_dir.resolve().name}/best" if shown.parts[:1] == ("..",) else shown.as_posix()
    imports = "from diffusers import DiffusionPipeline\n"  # of whatever family the base is
    source = json.dumps(base)
    if base == "embedded":
        imports, source = f"{imports}from dreamtune import embedded\n", "embedded.MODEL"
    options = "".join(f", {key}={value!r}" for key, value in sample_settings.items())
    return (
        f"{imports}\npipe = DiffusionPipeline.from_pretrained({source})\n"
        f"pipe.load_lora_weights({json.dumps(where)})\n"
        f"pipe({json.dumps(prompt)}{options}).images[0]"
    )


def _subtitle(settings: Mapping[str, Any], base: str, history: Sequence[Mapping[str, Any]]) -> str:
    base_name = "the embedded base" if base == "embedded" else Path(base).name
    parts = [f"{settings.get('method', 'adapter')} on {base_name}", f"{history[-1]['step']} steps"]
    seconds = history[-1].get("seconds")
    if seconds is not None:
        parts.append(f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min")
    if prompt := settings.get("instance_prompt"):
        parts.append(f"trained as “{prompt}”")
    return escape(" · ".join(parts))


def _scores(history: Sequence[Mapping[str, Any]], choice: Choice) -> dict[str, str]:
    """All that the page shows of the scores: whatever metrics the history has."""
    metrics, best = scored(history), choice.index
    heads = ("Step", *(metric.title for metric in metrics), *SHARES)
    rows = zip(history, choice.ratings, strict=True)
    return {
        "facts": _facts(metrics, choice.ratings[best], history[best], history[-1]["step"]),
        "charts": _charts(metrics, history, best),
        "heads": "".join(f'<th scope="col">{escape(head)}</th>' for head in heads),
        "rows": "".join(
            _row(metrics, record, rating, i == best) for i, (record, rating) in enumerate(rows)
        ),
        "pairings": "".join(f"<p>{escape(m.title)}: {escape(m.pairing)}.</p>" for m in metrics),
    }


def _warning(text: str | None) -> str:
    return f'<p class="why">{escape(text[0].upper() + text[1:])}</p>' if text else ""


def _facts(
    metrics: Sequence[Metric], rating: Rating, record: Mapping[str, Any], last_step: int
) -> str:
    gained, kept, _ = _shares(rating)
    entries = [
        ("Best step", f"{record['step']}", f"of {last_step} trained", ""),
        (SHARES[0], gained, "of the way from base to photos", "main"),
        (SHARES[1], kept, "of the base's prompt following", "main"),
        *((m.title, m.text(record), m.comparison_text(record), "") for m in metrics),
    ]
    return "".join(
        f'<div class="{kind}"><dt>{escape(name)}</dt>'
        f"<dd>{value}<small>{escape(note)}</small></dd></div>"
        for name, value, note, kind in entries
    )


def _pairs(
    prompts: Sequence[str], before: Sequence[Image.Image], after: Sequence[Image.Image], step: int
) -> str:
    parts = []
    for prompt in dict.fromkeys(prompts):
        rows = [i for i, other in enumerate(prompts) if other == prompt]
        sides = []
        for kind, label, images in (("before", "Base", before), ("after", f"Step {step}", after)):
            tiles = "".join(img(images[i], f"{label}: {prompt}", IMAGE_SIDE) for i in rows)
            sides.append(
                f'<div class="side {kind}"><p class="label">{label}</p>'
                f'<div class="tiles">{tiles}</div></div>'
            )
        parts.append(
            f'<article class="pair"><h3>{escape(prompt)}</h3>'
            f'<div class="sides">{"".join(sides)}</div></article>'
        )
    return "".join(parts)


def _layout(images: Sequence[Image.Image], per_prompt: int) -> dict[str, str]:
    """CSS of the image grid: small images at most at their own size, so that none is blurred."""
    side = images[0].width if images else IMAGE_SIDE
    small = side < UNSCALED
    # Four large images stand two by two; cards of a single pair stand beside each other.
    columns = 2 if per_prompt == 4 and not small else min(per_prompt, 4)
    return {
        "columns": str(columns),
        "tile": f"{side}px" if small else "1fr",
        "card": f"{2 * side * columns * 0.85 + 60:.0f}px" if small else "440px",
        "pairs_class": " one" if per_prompt == 1 or (per_prompt == 2 and small) else "",
    }


def _strip(progress: Sequence[tuple[int, Image.Image]], best_step: int) -> str:
    if not progress:
        return ""
    figures = "".join(
        f'<figure class="{"won" if step == best_step else ""}">'
        f"{img(image, f'The same prompt and seed at step {step}', PHOTO_SIDE)}"
        f"<figcaption>{step}{' best' if step == best_step else ''}</figcaption></figure>"
        for step, image in progress
    )
    return (
        '<section aria-labelledby="strip"><h2 id="strip">One image over training</h2>'
        f'<div class="strip">{figures}</div></section>'
    )


def _charts(metrics: Sequence[Metric], history: Sequence[Mapping[str, Any]], best: int) -> str:
    steps = [record["step"] for record in history]
    charts = []
    for metric in metrics:
        drawn: dict[str, Any] = {"number_format": metric.format}
        if (against := metric.comparison) is not None:
            values = [record.get(metric.comparison_key) for record in history]
            if against.constant:
                drawn |= {"reference": values[0], "reference_name": against.title}
            else:
                drawn |= {"other": values, "other_name": against.title}
        scores = [record.get(metric.key) for record in history]
        charts.append(curve(metric.title, steps, scores, best, **drawn))
    return "".join(charts)


def _row(metrics: Sequence[Metric], record: Mapping[str, Any], rating: Rating, won: bool) -> str:
    gained, kept, product = _shares(rating)
    errors = [*(m.error_text(record) for m in metrics), "", _kept_error(rating), ""]
    values = [*(m.text(record) for m in metrics), gained, kept, product]
    cells = "".join(
        f"<td>{value}{f' <small>{error}</small>' if error else ''}</td>"
        for value, error in zip(values, errors, strict=True)
    )
    mark = " best" if won else ""
    return f'<tr class="{mark and "won"}"><th scope="row">{record["step"]}{mark}</th>{cells}</tr>'


def _shares(rating: Rating) -> tuple[str, str, str]:
    """Subject gained, prompt kept and their product, as the page shows them."""
    if rating.step == 0 or not rating.finite:
        return ("–", "–", "–")
    kept = f"{rating.prompt_kept:.0%}"
    if not rating.kept_enough:
        product = "too little prompt"
    else:
        product = "–" if rating.product is None else f"{rating.product:.2f}"
    gained = "–" if rating.subject_gained is None else f"{rating.subject_gained:.0%}"
    return (gained, kept, product)


def _kept_error(rating: Rating) -> str:
    return "" if rating.prompt_error is None else f"± {rating.prompt_error:.0%}"


def _files(run_dir: Path) -> str:
    rows = []
    for path in sorted(run_dir.rglob("*")):
        name = path.relative_to(run_dir)
        if (
            path.is_file()
            and path.name in FILES
            and len(name.parts) <= 2
            and (not name.parts[0].startswith("checkpoint"))
        ):
            size = path.stat().st_size
            shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{max(size, 100) / 1e3:.1f} kB"
            rows.append(
                f'<tr><th scope="row"><code>{escape(name.as_posix())}</code></th>'
                f'<td>{FILES[path.name]}</td><td class="size">{shown}</td></tr>'
            )
    return "".join(rows)


def _protocol(protocol: Mapping[str, Any] | None) -> str:
    if not protocol:
        return ""
    return f"<pre><code>{escape(json.dumps(protocol, indent=1))}</code></pre>"


def _shown(value: Any) -> str:
    """A setting as text; of an absolute path only its last part, which names nobody's home. A kind
    may stand before it, such as open_clip's `local-dir:`.
    """
    if isinstance(value, Mapping):
        value = [f"{key} {inner}" for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    kind, text = kind_and_place(str(value))
    return f"{kind}…/{Path(text).name}" if os.path.isabs(text) else f"{kind}{text}"
