"""Images of an adapter by a protocol in the folders that are scored, and its base's beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dreamtune.config import Config
from dreamtune.data.words import SubjectWords
from dreamtune.evaluation.layout import PROMPT, UNRELATED, Photos
from dreamtune.evaluation.prompts import templates, unrelated
from dreamtune.evaluation.protocols import Protocol
from dreamtune.files.find import base_of_run, run_settings
from dreamtune.files.whole import whole
from dreamtune.models.base import Base
from dreamtune.models.load import load_base
from dreamtune.models.sample import Sampling, grid, sample
from dreamtune.pipeline.load import load
from dreamtune.pipeline.speed import speed_up_where_possible
from dreamtune.training.defaults import device_and_dtype


@dataclass(frozen=True)
class Sampler:
    """A base, and how it makes images."""

    base: Base
    sampling: Sampling

    @classmethod
    def of(
        cls,
        file: Path | None,
        name: str | None,
        fixed: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
    ) -> Sampler:
        """Of an adapter's file: by the settings of its run, if it lies in one, or by those given.
        name: of the base, instead of the run's. fixed: what the protocol says of the sampling.
        Raises ValueError for no base."""
        if settings is None:
            settings = run_settings(file) if file else {}
        if name is None:
            name = base_of_run(file) if file else ""
        device, dtype = device_and_dtype(Config(pretrained_model_name_or_path="embedded"))
        base = load_base(
            name,
            revision=settings.get("revision"),
            variant=settings.get("variant"),
            prediction_type=settings.get("prediction_type"),
            dtype=dtype,
            device=device,
        )
        size = fixed.get("size") or settings.get("resolution") or base.resolution
        usual = asdict(base.sampling_defaults(size))
        found = {k: v if (v := settings.get(k)) is not None else usual[k] for k in usual}
        steps = settings.get("num_inference_steps") or base.sampling_steps
        batch = settings.get("sample_batch_size") or 8
        chosen = {**found, "steps": steps, "size": size, "batch_size": batch, **fixed}
        return cls(base, Sampling(**chosen))

    def statement(self) -> dict[str, Any]:
        """What the images depend on; a batch is none of it."""
        return {k: v for k, v in asdict(self.sampling).items() if k != "batch_size"}


def sample_into(
    folder: Path,
    sampler: Sampler,
    file: Path | None,
    words: SubjectWords,
    subject: Photos,
    protocol: Protocol,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Fills `images/` and, with an adapter, `base/` of the folder: images of one subject.

    file: of the adapter; None for the base alone. Returns what a result says of the sampling.
    Raises ValueError where the prompts are captions and the held-out photos have none.
    """
    on_embedded = sampler.base.embedded
    own = templates(protocol.prompts, words.class_noun, on_embedded, subject.captions)
    others = unrelated(protocol.unrelated, words.class_noun, on_embedded)
    prompts = named_prompts(words, own, others)
    seeds = range(protocol.first_seed, protocol.first_seed + protocol.images_per_prompt)
    with sampler.base.sampling(sampler.sampling.sampler) as pipe:
        adapter = load(pipe, file) if file else None
        if adapter is not None:
            speed_up_where_possible(pipe)
        for place, scale in (("images", 1.0), ("base", 0.0)):
            if adapter is not None:
                adapter.scale = scale
            elif place == "base":
                continue
            tell(f"Sampling {len(prompts) * len(seeds)} images into {folder / place}")
            make(pipe, folder / place / subject.name, prompts, seeds, sampler.sampling)
    return {**sampler.statement(), "prompts": own, "unrelated": others, "seeds": list(seeds)}


def named_prompts(words: SubjectWords, own: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Folder below a subject's -> prompt, of its own templates and of unrelated prompts."""
    return {
        **{f"{i:02}": words.prompt(text) for i, text in enumerate(own)},
        **{f"{UNRELATED}/{i:02}": text for i, text in enumerate(others)},
    }


def is_made(folder: Path, seeds: Sequence[int]) -> bool:
    """Whether a prompt's folder has its text and all images whole."""
    if not (folder / PROMPT).is_file():
        return False
    for seed in seeds:
        try:
            with Image.open(folder / f"{seed}.png", formats=("PNG",)) as image:
                image.load()
        except (OSError, ValueError, SyntaxError):  # what Pillow has for damage
            return False
    return True


def make(
    pipe: Any, folder: Path, prompts: Mapping[str, str], seeds: Sequence[int], how: Sampling
) -> int:
    """A folder a prompt, each file written when it is whole. Prompts that are there already are not
    made again. Returns how many images were made."""
    per_batch = max(1, how.batch_size // len(seeds))
    named = [(n, text) for n, text in prompts.items() if not is_made(folder / n, seeds)]
    for start in range(0, len(named), per_batch):
        part = named[start : start + per_batch]
        texts, numbers = grid([text for _, text in part], seeds)
        images = iter(sample(pipe, texts, numbers, **how.options()))
        for place, text in part:
            with whole(folder / place / PROMPT) as partial:
                partial.write_text(f"{text}\n", encoding="utf-8")
            for seed in seeds:
                with whole(folder / place / f"{seed}.png") as partial:
                    next(images).save(partial, "PNG", compress_level=1)
    return len(named) * len(seeds)
