"""Stable Diffusion 1.x/2.x from one .safetensors file in the original layout, without network.

Such a file holds weights only: the configs of the two families ship in configs_sd/, and the
tokenizer is built from the merges that open_clip ships."""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dreamtune.models.diffusion import PREDICTIONS
from dreamtune.models.stated import Stated, read_stated
from dreamtune.models.weights import check_complete, lacking, listed, read_by_library

CONFIGS = Path(__file__).parent / "configs_sd"
LATENT_SCALE = 8  # pixels a latent, in both families
NETWORK = "model.diffusion_model."
# What tells diffusers which names the text encoder has: those of transformers, of open_clip.
TEXT_NAMES = (
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "cond_stage_model.model.token_embedding.weight",
)
PARTS = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder"}


def load_file(
    path: Path, prediction_type: str | None, notes: list[str], network_alone: bool = False
) -> tuple[Any, ...]:
    """The parts of a single-file checkpoint (original layout), with the configs and tokenizer of
    its family; the network alone if that is asked for.

    What the file states is obeyed, but for the user's `prediction_type`; where it does not, 1.x is
    read as epsilon and 2.x as v-prediction. Adds to `notes` what was assumed.

    Raises ValueError for a file that is no such checkpoint, or not all of one.
    """
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"`{path}` is not a .safetensors file; convert it (a .ckpt can run code when it is "
            f"read)."
        )
    family, names, metadata = family_of(path), *header(path)
    check_pairs(path, names)
    if not network_alone:
        check_parts(path, names)
    stated = read_stated(path, names, metadata)
    predicted = prediction(path, family, stated, prediction_type, notes)
    if predicted == "epsilon" and family == "v2":
        family = "v2-base"
    tokenizer = clip_tokenizer(pad="!" if family.startswith("v2") else "<|endoftext|>")
    pipe = read_parts(path, family, tokenizer, network_alone)
    if stated.resolution is not None:
        pipe.unet.register_to_config(sample_size=stated.resolution // LATENT_SCALE)
    if stated.scaling_factor is not None and pipe.vae is not None:
        pipe.vae.register_to_config(scaling_factor=stated.scaling_factor)
    scheduler = scheduler_of(pipe.scheduler, predicted, stated)
    return pipe.unet, pipe.vae, pipe.text_encoder, tokenizer, scheduler


def read_parts(path: Path, family: str, tokenizer: Any, network_alone: bool) -> Any:
    """A pipeline of diffusers. Raises UnreadableFile that names part and weights."""
    from diffusers import StableDiffusionPipeline

    left_out = {"vae": None, "text_encoder": None} if network_alone else {}
    with read_by_library(str(path)), right_suffix(path) as file:
        try:
            pipe: Any = StableDiffusionPipeline.from_single_file(
                str(file),
                config=str(CONFIGS / family),
                tokenizer=tokenizer,
                safety_checker=None,
                feature_extractor=None,
                local_files_only=True,
                torch_dtype=torch.float32,
                **left_out,
            )
        except Exception:  # of several types, for a gap too, which none of them names
            for part in ("unet", "vae"):
                if part not in left_out and (gaps := gaps_of(path, part, CONFIGS / family)):
                    raise lacking(f"{path}: {PARTS[part]}", *gaps) from None
            raise
        for part, words in PARTS.items():
            if part not in left_out:
                check_complete(f"{path}: {words}", getattr(pipe, part))
    return pipe


def prediction(path: Path, family: str, stated: Stated, asked: str | None, notes: list[str]) -> str:
    """The prediction type: the user's, the file's, the family's."""
    notes += stated.notes
    usual = "v_prediction" if family == "v2" else "epsilon"
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
            f"`{path.name}` does not say what it predicts: a Stable Diffusion {family[1]}.x single "
            f"file is read as {usual}; --prediction_type {other} otherwise."
        )
    return said_type or usual


def scheduler_of(scheduler: Any, predicted: str, stated: Stated) -> Any:
    """The family's scheduler with what the file states. Without signal at the last step it is DDIM
    on timesteps that begin there (arXiv 2305.08891); the 1.x family's PNDM knows no such schedule.
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


def header(path: Path) -> tuple[set[str], dict[str, str]]:
    """Names of the tensors, and the metadata. Raises ValueError for what is no safetensors file."""
    with opened(path) as file:
        return set(file.keys()), dict(file.metadata() or {})


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"`{path}` is not a regular file.")
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged or not a safetensors file: {error}") from None


def family_of(path: Path) -> str:
    """The folder of configs for a single file, "v1" or "v2", by the names and shapes in its header.

    Raises ValueError for a file of another kind.
    """
    first = f"{NETWORK}input_blocks.0.0.weight"
    key = f"{NETWORK}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    with opened(path) as file:
        names = set(file.keys())
        whole = any(n.startswith("cond_stage_model.") for n in names)
        if key not in names or not whole:
            raise ValueError(
                f"`{path}` is not a Stable Diffusion 1.x/2.x checkpoint: it has no "
                f"`{key if key not in names else 'cond_stage_model'}`. A LoRA, SDXL or "
                "a lone UNet cannot be the base."
            )
        width = file.get_slice(key).get_shape()[-1]
        inputs = file.get_slice(first).get_shape()[1:2] if first in names else [4]
    families = {768: "v1", 1024: "v2"}
    if width not in families:
        raise ValueError(
            f"`{path}`: text width {width} is neither Stable Diffusion 1.x (768) nor 2.x (1024)."
        )
    if inputs != [4]:
        raise ValueError(
            f"`{path}`: its UNet takes {inputs[0] if inputs else 0} channels, not 4: an "
            "inpainting, depth or image-conditioned model cannot be the base."
        )
    return families[width]


def check_parts(path: Path, names: Collection[str]) -> None:
    """Parts that diffusers misses without a word that helps. Raises ValueError."""
    if not any(n.startswith("first_stage_model.") for n in names):
        raise ValueError(
            f"`{path}` has no autoencoder (no `first_stage_model.` names): it was pruned. Use the "
            "whole checkpoint."
        )
    if not set(TEXT_NAMES) & set(names):
        raise ValueError(
            f"`{path}` lacks weights of the text encoder: it has neither `{TEXT_NAMES[0]}` nor "
            f"`{TEXT_NAMES[1]}`."
        )


def check_pairs(path: Path, names: Collection[str]) -> None:
    """Of these convolutions diffusers reads the bias wherever it finds the weight."""
    for start, words in ((NETWORK, PARTS["unet"]), ("first_stage_model.", PARTS["vae"])):
        ends = (".op.weight", ".conv.weight")
        weights = [n for n in names if n.startswith(start) and n.endswith(ends)]
        biases = {f"{n.removesuffix('weight')}bias" for n in weights}
        if missing := sorted(biases - set(names)):
            raise ValueError(f"`{path}` lacks weights of the {words}: {listed(missing)}.")


@lru_cache(maxsize=2)
def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer, from the merges that open_clip ships. pad: "!" for 2.x."""
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
