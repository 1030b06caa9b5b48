"""What families share whose pictures are latents, and whose prompts their pipeline encodes."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dreamtune.fields import UnreadableFile, from_file, shown
from dreamtune.models.base import Base, Latents, Parts
from dreamtune.models.conditioning import Arguments, Conditioning, rows_together, together
from dreamtune.models.folder import ModelFolder
from dreamtune.models.quiet import quiet_diffusers
from dreamtune.models.rules import AUTOENCODER, NAMED, Rules, assumed, components
from dreamtune.models.text import Named, fit, load_text_encoder, load_tokenizer

AUTOENCODERS = (("diffusers", "AutoencoderKL"), ("diffusers", "AutoencoderTiny"))
PROMPTS = 32  # encoded at once


class LatentBase(Base):
    """A family of diffusers' usual parts: a network, an autoencoder, text encoders with tokenizers.

    Attributes:
        classes: part -> the classes that it may be of, each library and name as model_index.json
            has them. The scheduler is checked where it is read.
        optional: parts that a model may be without.
        network_rules, autoencoder_rules: of the network's config.json, and the autoencoder's.
        told: what the pipeline's `encode_prompt` returns, by the names that its call has for it.
        encoding: further arguments of it.
    """

    classes: ClassVar[Mapping[str, tuple[Named, ...]]]
    optional: ClassVar[tuple[str, ...]] = ()
    network_rules: ClassVar[Rules]
    autoencoder_rules: ClassVar[Rules] = AUTOENCODER
    told: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    encoding: ClassVar[Mapping[str, Any]] = {"num_images_per_prompt": 1}

    @classmethod
    @abstractmethod
    def load_scheduler(
        cls, folder: ModelFolder, named: Sequence[str], prediction_type: str | None
    ) -> Any:
        """named: library and class, of model_index.json. Raises ValueError for one of another kind,
        and for a `prediction_type` that it cannot have.
        """

    @classmethod
    def load_folder(
        cls, folder: ModelFolder, dtype: torch.dtype, prediction_type: str | None
    ) -> Parts:
        import diffusers

        named = cls.named(folder)
        parts: Parts = {
            "scheduler": cls.load_scheduler(folder, named["scheduler"], prediction_type)
        }
        tokenizers = {name: tokenizer_of(name) for name in cls.encoder_names}
        for part in tokenizers.values():
            kind = named[part]
            parts[part] = load_tokenizer(folder, part, kind[1]) if kind else None
        stated = folder.config("vae", cls.autoencoder_rules)
        vae_class = getattr(diffusers, named["vae"][1])
        parts[cls.network_name] = cls.load_network(folder, dtype)
        parts["vae"] = load_module(folder, "vae", vae_class, stated, torch.float32)
        parts |= cls.load_encoders(folder, cls.encoder_dtype(dtype))
        for name, part in tokenizers.items():
            if parts[name] is not None:
                fit(parts[part], parts[name], folder, part)
        return parts

    @classmethod
    def load_encoders(cls, folder: ModelFolder, dtype: torch.dtype) -> Parts:
        named = cls.named(folder)
        return {
            n: load_text_encoder(folder, dtype, n, named[n][1]) if named[n] else None
            for n in cls.encoder_names
        }

    @classmethod
    def named(cls, folder: ModelFolder) -> dict[str, Any]:
        """Part -> library and class in its model_index.json, None for one that it is without.

        Raises UnreadableFile for a class that is none of `classes`.
        """
        place = folder.place("", "model_index.json")
        schema = components(cls.folders, cls.optional)
        found = from_file(schema, folder.index(), f"`{place}`")
        for part in cls.optional:
            if not any(found.get(part) or ()):
                found[part] = None
        for part, known in cls.classes.items():
            if found[part] is not None and tuple(found[part]) not in known:
                words = " or ".join(".".join(k) for k in known)
                raise UnreadableFile(
                    f"`{place}` names {'.'.join(found[part])[:100]} as {part}; it must be {words}."
                )
        for name in cls.encoder_names:
            part = tokenizer_of(name)
            if (found[name] is None) != (found[part] is None):
                raise UnreadableFile(f"`{place}` names one of {name} and {part}; both go together.")
        return found

    @classmethod
    def load_network(cls, folder: ModelFolder, dtype: torch.dtype) -> torch.nn.Module:
        import diffusers

        name = cls.network_name
        part = name if "config.json" in folder.names(name) else ""
        there = "config.json" in folder.names(part)
        found = folder.config(part, NAMED).get("_class_name") if there else None
        if found != cls.network_class:
            raise UnreadableFile(
                f"`{folder.name}` holds no {cls.network_class}: its config.json must be in it or "
                f"in its {name}/, got {str(found)[:100]}."
            )
        stated = folder.config(part, cls.network_rules)
        kind = getattr(diffusers, cls.network_class)
        return load_module(folder, part, kind, stated, dtype, name)

    @property
    def latent_scale(self) -> int:
        """Pixels a latent, along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_shift_and_scale(self) -> tuple[Any, Any]:
        """Latents are (codes - shift) * scale, as the family's pipeline undoes it."""
        config = self.vae.config
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    def coded(self, pixels: Tensor) -> Any:
        """What the autoencoder returns of (n, 3, h, w)."""
        return self.vae.encode(pixels)

    def as_taken(self, codes: Tensor, std: Tensor | None) -> Latents:
        """What the autoencoder gives, as the network takes it."""
        shift, scale = self.latent_shift_and_scale()
        return Latents((codes - shift) * scale, None if std is None else std * scale)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, batch: int = 4) -> Latents:
        """(n, 3, h, w) in [-1, 1] -> (n, c, h / 8, w / 8), as the network takes them.

        Computed in float32: the autoencoders of SD 1.x and of XL overflow in fp16.
        """
        means, stds = [], []
        with self.on_device(torch.float32, self.vae):
            for part in pixels.split(batch):
                encoded = self.coded(part.to(self.device, torch.float32))
                spread = getattr(encoded, "latent_dist", None)
                mean = encoded.latents if spread is None else spread.mean
                taken = self.as_taken(mean, None if spread is None else spread.std)
                means.append(taken.mean)
                if taken.std is not None:
                    stds.append(taken.std)
        return Latents(torch.cat(means), torch.cat(stds) if stds else None)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What `told` has but the negatives. A prompt that is too long is cut, with a warning."""
        return self.conditioning_of(self._encoded(prompts, guided=False))

    def encoded_by(self, pipe: Any, prompts: list[str], guided: bool) -> Sequence[Any]:
        """What `told` names, by the pipeline's `encode_prompt`; guided: with the negatives."""
        found: Sequence[Any] = pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=guided, **self.encoding
        )
        return found

    def conditioning_of(self, encoded: Arguments) -> Conditioning:
        """What the network is told, of what `encode_prompt` returned."""
        return rows_together([{name: x for name, x in encoded.items() if isinstance(x, Tensor)}])

    def call_arguments(self, prompts: Sequence[str]) -> Arguments:
        encoded = self._encoded(prompts, guided=True)
        return {name: cast(x, self.dtype) for name, x in encoded.items()}

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str], guided: bool) -> Arguments:
        """By the pipeline's own `encode_prompt`, computed in `encoder_dtype`, given in float32."""
        for prompt in prompts:
            if told := self.unseen(prompt):
                logging.getLogger("dreamtune").warning("%s: %s", told, prompt)
        parts: list[Arguments] = []
        encoders = [x for x in self.encoders().values() if x is not None]
        with self.on_device(self.encoder_dtype(self.dtype), *encoders), quiet_diffusers():
            pipe = self.pipeline()
            for start in range(0, len(prompts), PROMPTS):
                part = list(prompts[start : start + PROMPTS])  # which it may write into
                named = zip(self.told, self.encoded_by(pipe, part, guided), strict=True)
                given = {n: x for n, x in named if x is not None and len(x)}
                parts.append({name: cast(x, torch.float32) for name, x in given.items()})
        return together(parts)


def cast(rows: Tensor | list[Tensor], dtype: torch.dtype) -> Tensor | list[Tensor]:
    """But for masks, which are no numbers."""
    if isinstance(rows, list):
        return [row.to(dtype) for row in rows]
    return rows.to(dtype) if rows.is_floating_point() else rows


def tokenizer_of(encoder: str) -> str:
    """text_encoder_2 -> tokenizer_2."""
    return encoder.replace("text_encoder", "tokenizer")


def load_module(
    folder: ModelFolder,
    part: str,
    kind: Any,
    stated: dict[str, Any],
    dtype: torch.dtype,
    name: str | None = None,
) -> Any:
    """A network of diffusers. stated: its config, checked; name: of the part, where it is the
    folder itself. Raises UnreadableFile for a config of another class, and for weights that are not
    there.
    """
    place, own = folder.place(part, "config.json"), kind.__name__
    if (found := stated.get("_class_name", own)) != own:
        raise UnreadableFile(f"`{place}` is of a {shown(found)}, not of a {own}.")
    module = folder.load(part, kind, dtype)
    if unsaid := assumed(name or part, stated, module.config):
        folder.notes.append(f"`{place}` does not say, and it is assumed: {', '.join(unsaid)}.")
    return module
