"""Stable Diffusion 1.x, 2.x and XL from one .safetensors file in the original layout, without
network.

Such a file holds weights only: the configs of its kind ship in configs_sd/, and the tokenizers are
built from the merges that open_clip ships."""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dreamtune.models.checkpoint import (
    END,
    KINDS,
    check_pairs,
    check_parts,
    check_told,
    header,
    kind_of,
    opened,
)
from dreamtune.models.diffusion import PREDICTIONS
from dreamtune.models.stated import Stated, read_stated
from dreamtune.models.weights import check_complete, lacking, read_by_library

CONFIGS = Path(__file__).parent / "configs_sd"
LATENT_SCALE = 8  # pixels a latent, in all kinds


def load_file(
    path: Path,
    dtype: torch.dtype,
    prediction_type: str | None,
    notes: list[str],
    network_alone: bool = False,
) -> dict[str, Any]:
    """The parts of a single-file checkpoint (original layout), with the configs and tokenizers of
    its kind; the network alone if that is asked for. dtype: of the network.

    What the file states is obeyed, but for the user's `prediction_type`; where it does not, 2.x is
    read as v-prediction, all others as epsilon. Adds to `notes` what was assumed.

    Raises ValueError for a file that is no such checkpoint, or not all of one.
    """
    kind, names, metadata = kind_of(path), *header(path)
    check_pairs(path, names)
    if not network_alone:
        check_parts(path, names, KINDS[kind])
    if kind == "xl":
        check_told(path, names)
    stated = read_stated(path, names, metadata, KINDS[kind].layer)
    predicted = prediction(path, kind, stated, prediction_type, notes)
    if predicted == "epsilon" and kind == "v2":
        kind = "v2-base"
    wanted = ("unet",) if network_alone else tuple(KINDS[kind].parts)
    parts = read_parts(path, kind, wanted, dtype)
    if stated.resolution is not None:
        parts["unet"].register_to_config(sample_size=stated.resolution // LATENT_SCALE)
    if stated.scaling_factor is not None and "vae" in parts:
        parts["vae"].register_to_config(scaling_factor=stated.scaling_factor)
    parts["scheduler"] = scheduler_of(parts["scheduler"], predicted, stated)
    return parts


def load_encoders(path: Path) -> dict[str, Any]:
    """The text encoders alone, of a file that `load_file` has read."""
    kind = kind_of(path)
    encoders = [name for name in KINDS[kind].parts if name.startswith("text_encoder")]
    parts = read_parts(path, kind, tuple(encoders))
    return {name: parts[name] for name in encoders}


def read_parts(
    path: Path, folder: str, wanted: tuple[str, ...], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Modules by diffusers, with tokenizers and scheduler. folder: of configs; dtype: of the UNet,
    the others are float32. Raises UnreadableFile that names part and weights.
    """
    import diffusers

    kind, configs = KINDS[folder], CONFIGS / folder
    given: dict[str, Any] = {name: clip_tokenizer(pad) for name, pad in kind.tokenizers.items()}
    given |= {name: None for name in kind.parts if name not in wanted}
    if kind.pipeline == "StableDiffusionPipeline":
        given |= {"safety_checker": None, "feature_extractor": None}
    with read_by_library(str(path)), right_suffix(path) as file:
        try:
            if "unet" in wanted:  # apart from the rest: XL's alone has 10 GB in float32
                given["unet"] = diffusers.UNet2DConditionModel.from_single_file(
                    str(file),
                    config=str(configs),
                    subfolder="unet",
                    local_files_only=True,
                    torch_dtype=dtype,
                )
            pipe: Any = getattr(diffusers, kind.pipeline).from_single_file(
                str(file),
                config=str(configs),
                local_files_only=True,
                torch_dtype=torch.float32,
                **given,
            )
        except Exception:  # of several types, for a gap too, which none of them names
            for part in ("unet", "vae"):
                if part in wanted and (gaps := gaps_of(path, part, configs)):
                    raise lacking(f"{path}: {kind.parts[part]}", *gaps) from None
            raise
        for part in wanted:
            check_complete(f"{path}: {kind.parts[part]}", getattr(pipe, part))
    names = (*wanted, *kind.tokenizers, "scheduler")
    return {name: getattr(pipe, name) for name in names}


def prediction(path: Path, kind: str, stated: Stated, asked: str | None, notes: list[str]) -> str:
    """The prediction type: the user's, the file's, the kind's."""
    notes += stated.notes
    usual = "v_prediction" if kind == "v2" else "epsilon"
    if asked is not None:
        for place, said in stated.prediction_types.items():
            if said != asked:
                notes.append(
                    f"--prediction_type {asked} is used, although `{path.name}` says {said} "
                    f"({place})."
                )
        return asked
    said_type = stated.prediction_type(path)
    if said_type is None:
        other = next(p for p in PREDICTIONS if p != usual)
        notes.append(
            f"`{path.name}` does not say what it predicts: a Stable Diffusion {KINDS[kind].title} "
            f"single file is read as {usual}; --prediction_type {other} otherwise."
        )
    return said_type or usual


def scheduler_of(scheduler: Any, predicted: str, stated: Stated) -> Any:
    """The kind's scheduler with what the file states. Without signal at the last step it is DDIM
    on timesteps that begin there (arXiv 2305.08891); PNDM of 1.x knows no such schedule.
    """
    changes = {"prediction_type": predicted, **stated.schedule}
    if not stated.zero_snr:
        return type(scheduler).from_config(scheduler.config, **changes)
    from diffusers import DDIMScheduler

    changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return DDIMScheduler.from_config(scheduler.config, **changes)


def gaps_of(path: Path, part: str, configs: Path) -> tuple[str, list[str]] | None:
    """Class of the network, and those of its weights that the file does not give, by diffusers' own
    renaming, on names and shapes alone; None where there are none.
    """
    import diffusers
    from diffusers.loaders import single_file_utils

    kind, rename = {
        "unet": (diffusers.UNet2DConditionModel, single_file_utils.convert_ldm_unet_checkpoint),
        "vae": (diffusers.AutoencoderKL, single_file_utils.convert_ldm_vae_checkpoint),
    }[part]
    config = kind.load_config(str(configs / part))
    with opened(path) as file, torch.device("meta"):
        shapes = {name: torch.empty(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        module = kind.from_config(config)
    found = rename(shapes, config=dict(config))
    gaps = [name for name in module.state_dict() if found.get(name) is None]
    return (kind.__name__, gaps) if gaps else None


@contextlib.contextmanager
def right_suffix(path: Path) -> Iterator[Path]:
    """The file by a name that diffusers knows a safetensors file by."""
    if path.suffix == ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"{path.stem}.safetensors")
        link.symlink_to(path.resolve())
        yield link


@lru_cache(maxsize=2)
def clip_tokenizer(pad: str = END) -> Any:
    """CLIP's tokenizer, from the merges that open_clip ships. pad: "!" for 2.x and
    for the second of XL.
    """
    import open_clip
    from transformers import CLIPTokenizer

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = (
        gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    )
    letters = list(byte_letters().values())
    words = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merge_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
        merge_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "CLIPTokenizer",
                    "model_max_length": 77,
                    "pad_token": pad,
                    "bos_token": "<|startoftext|>",
                    "eos_token": "<|endoftext|>",
                    "unk_token": "<|endoftext|>",
                }
            )
        )
        return CLIPTokenizer.from_pretrained(folder)


def byte_letters() -> dict[int, str]:
    """byte -> printable letter, as in GPT-2's and CLIP's byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}
