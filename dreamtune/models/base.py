"""The contract of a base family: what training, sampling and files need of a frozen base model."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dreamtune.injection.targets import TARGET_MODULES
from dreamtune.models.conditioning import Arguments, Conditioning, take
from dreamtune.models.folder import ModelFolder
from dreamtune.models.prefixes import Prefixes
from dreamtune.models.quiet import move, quiet_diffusers
from dreamtune.models.sample import guidance_options

Parts = dict[str, Any]  # by the names that the pipeline's `__init__` has for them


class Frame(NamedTuple):
    """Where the square that is trained on lies: in a picture of `shape` whose short side was
    brought to the square's, from `corner` on. Each is (down, across), in pixels.
    """

    shape: tuple[int, int]  # before it was resized
    corner: tuple[int, int]
    size: tuple[int, int]


class Latents(NamedTuple):
    """mean (n, ...): encoded images as the network takes them; std: the spread of the encoder's
    distribution, None where it has none.
    """

    mean: Tensor
    std: Tensor | None


@dataclass(frozen=True)
class SamplingDefaults:
    sampler: str
    guidance_scale: float
    guidance_rescale: float


class Process(ABC):
    """How latents become noise, and what the network is to predict. t: (n,) timesteps, as the
    network takes them.
    """

    @abstractmethod
    def timesteps(self, u: Tensor) -> Tensor:
        """u (n,), uniform in [0, 1), to t by the family's distribution of timesteps."""

    @abstractmethod
    def noised(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The network's input, shaped like latents."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict from `noised`."""

    def weight(self, t: Tensor) -> Tensor | None:
        """(n,) weights of the rows' losses, or None for 1."""
        return None

    def constants(self) -> list[Tensor]:
        """Tensors that the methods read: a recorded step reads them where they are."""
        return []


class Base(ABC):
    """A text-to-image model whose parts are frozen. One family is a module with one subclass, and a
    line in `load.FAMILIES`.

    Attributes:
        pipeline_name: of the pipeline's class in diffusers.
        network_name: of the trained network in a pipeline.
        network_class: the name of its class in diffusers.
        encoder_names: of the text encoders in a pipeline.
        folders: those of a model that are read.
        prefixes: of the keys of LoRA files.
        multiple: of the sides of images, in pixels.
        uncaptured: why no forward of its network can be one CUDA graph; "" where it can.
        uncheckpointed: why its network is not to recompute activations; "" where it may.
        target_modules: names of the layers that are adapted where the user does not say.
        parts: the pipeline's modules, tokenizers and scheduler, and what else it is made with; each
            is an attribute of its name too. Text encoders that were let go are None there.
        id: names the base in files: a hub id, or the last part of a path.
        embedded: whether it is the one in this package.
        device, dtype: where the network computes; the other parts wait on the CPU, the autoencoder
            in float32 and the text encoders in their own `encoder_dtype`.
        notes: sentences for the user, of what was assumed of the base or chosen in its files.
        fused, compiled: what was done to make the network faster.
    """

    pipeline_name: ClassVar[str]
    network_name: ClassVar[str]
    network_class: ClassVar[str]
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    folders: ClassVar[tuple[str, ...]]
    prefixes: ClassVar[Prefixes]
    multiple: ClassVar[int] = 8
    uncaptured: ClassVar[str] = ""
    uncheckpointed: ClassVar[str] = ""
    target_modules: ClassVar[tuple[str, ...]] = TARGET_MODULES

    def __init__(
        self,
        parts: Parts,
        *,
        id: str,
        embedded: bool,
        device: torch.device,
        dtype: torch.dtype,
        notes: Sequence[str] = (),
        read_encoders: Callable[[], Parts] | None = None,
    ) -> None:
        """read_encoders: the text encoders once more; without it they are never let go."""
        self.parts = dict(parts)
        self.id, self.embedded, self.device, self.dtype = id, embedded, device, dtype
        self.notes = tuple(notes)
        self.fused = self.compiled = False
        self._read_encoders = read_encoders
        for name, module in self._modules(self.parts):
            module.requires_grad_(False).eval()
            if name == self.network_name:
                move(module, device, dtype)
            else:
                own = self.encoder_dtype(dtype) if name in self.encoder_names else torch.float32
                move(module, torch.device("cpu"), own)

    def __getattr__(self, name: str) -> Any:
        """A part."""
        if name not in self.__dict__.get("parts", ()):
            raise AttributeError(f"a {type(self).__name__} has no `{name}`")
        return self.encoders()[name] if name in self.encoder_names else self.parts[name]

    @staticmethod
    def _modules(parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(name, part) for name, part in parts.items() if isinstance(part, nn.Module)]

    @classmethod
    @abstractmethod
    def load_folder(
        cls, folder: ModelFolder, dtype: torch.dtype, prediction_type: str | None
    ) -> Parts:
        """All parts. prediction_type: what the user says that the network predicts. Raises
        ValueError that says what to do.
        """

    @classmethod
    @abstractmethod
    def load_encoders(cls, folder: ModelFolder, dtype: torch.dtype) -> Parts:
        """The text encoders alone; None for one that the model is without."""

    @classmethod
    def encoder_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """In which the text encoders wait and compute, of a network in `dtype`."""
        return torch.float32

    @classmethod
    @abstractmethod
    def load_network(cls, folder: ModelFolder, dtype: torch.dtype) -> nn.Module:
        """The trained network alone."""

    @property
    def network(self) -> Any:
        """The module that is trained: a diffusers model."""
        return self.parts[self.network_name]

    def encoders(self) -> Parts:
        """The text encoders, read again where they were let go."""
        if self._read_encoders is not None and self.parts[self.encoder_names[0]] is None:
            with quiet_diffusers():
                self.parts.update(self._read_encoders())
            for name, module in self._modules(self.parts):
                if name in self.encoder_names:
                    module.requires_grad_(False).eval()
        return {name: self.parts[name] for name in self.encoder_names}

    def let_encoders_go(self) -> None:
        """Frees the memory of the text encoders, until a prompt is encoded that was not before."""
        if self._read_encoders is not None:
            self.parts.update(dict.fromkeys(self.encoder_names))

    @property
    @abstractmethod
    def resolution(self) -> int:
        """The side in pixels that the base was trained at."""

    def check_side(self, size: int) -> None:
        """Raises ValueError for a side of images, in pixels, that the family cannot have."""
        if size < self.multiple or size % self.multiple:
            raise ValueError(f"`resolution` must be a multiple of {self.multiple}, got {size}.")

    @property
    @abstractmethod
    def prediction_type(self) -> str | None:
        """What the network predicts, as the config names it; None where the family has one way."""

    @property
    def sampling_steps(self) -> int:
        """Of an image where nobody says: few suffice the embedded base."""
        return 12 if self.embedded else 25

    @abstractmethod
    def sampling_defaults(self, size: int) -> SamplingDefaults:
        """For images of `size` pixels a side."""

    @abstractmethod
    def process(self, snr_gamma: float | None = None) -> Process:
        """Noise and target in training. Raises ValueError where `snr_gamma` has no meaning."""

    @abstractmethod
    def encode_images(self, pixels: Tensor, batch: int = 4) -> Latents:
        """(n, 3, h, w) in [-1, 1] -> latents on the device, float32."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """A row a prompt, on the device, float32."""

    @property
    def empty_is_none(self) -> bool:
        """Whether an empty negative prompt and none make the same picture."""
        return True

    def for_step(self, prompts: Conditioning) -> Conditioning:
        """What a training step is told of these: without what says nothing of them."""
        return prompts

    def why_not_captured(self, prompts: Conditioning) -> str:
        """Why no step that is told these (`for_step`) can be one CUDA graph; "" where it can."""
        return self.uncaptured

    @property
    def takes_negatives(self) -> bool:
        """Whether guidance can lead away from a prompt."""
        return True

    @abstractmethod
    def unseen(self, prompt: str) -> str:
        """A sentence on what of a prompt is cut off; "" where all of it is encoded."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction for x (n, ...) and t (n,), computed in `dtype`."""

    def encode_frames(self, frames: Sequence[Frame]) -> Conditioning:
        """What the network is told of each picture beside its prompt, on the device; {} where that
        is nothing.
        """
        return {}

    @abstractmethod
    def scheduler_for(self, sampler: str) -> Any:
        """A scheduler of its own: "base", the one in the model's files, or "dpm++". Raises
        ValueError for one that the family is not sampled with.
        """

    def pipeline(self, sampler: str = "base", prompts: bool = True) -> Any:
        """A diffusers pipeline of these very modules; without `prompts` it has no text encoder.

        sampler: see `scheduler_for`.
        """
        import diffusers

        encoders = self.encoders() if prompts else dict.fromkeys(self.encoder_names)
        arguments = {**self.parts, **encoders, "scheduler": self.scheduler_for(sampler)}
        with quiet_diffusers():
            pipe = getattr(diffusers, self.pipeline_name)(**arguments)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @abstractmethod
    def call_arguments(self, prompts: Sequence[str]) -> Arguments:
        """Of the pipeline's call, a row a prompt, in `dtype`: what the pipeline itself makes of
        them, and of no negative prompt.
        """

    def waiting_parts(self, prompts: bool) -> Sequence[nn.Module]:
        """The modules beside the network that sampling needs."""
        left_out = () if prompts else self.encoder_names
        parts = {**self.parts, **self.encoders()} if prompts else self.parts
        found = [m for name, m in self._modules(parts) if name not in left_out]
        return [m for m in found if m is not self.network]

    def rows_per_image(self, guidance_scale: float) -> int:
        """Rows of the network's batch for an image of the pipeline's: all rows without the prompt
        come first, then all with it.
        """
        return 2 if guidance_scale > 1 else 1

    def guidance_options(self, guidance_scale: float) -> dict[str, Any]:
        """Of the stock pipeline's call for a prompt."""
        import diffusers

        pipeline = getattr(diffusers, self.pipeline_name)
        return guidance_options(pipeline, self.network, guidance_scale)

    def sampling_arguments(self, prompts: Sequence[str]) -> Arguments:
        """`call_arguments` of prompts, each distinct one encoded once."""
        distinct = list(dict.fromkeys(prompts))
        return take(self.call_arguments(distinct), [distinct.index(p) for p in prompts])

    @contextlib.contextmanager
    def on_device(self, dtype: torch.dtype, *modules: Any) -> Iterator[None]:
        """Copies of the modules' weights on the training device in `dtype`, dropped afterwards: the
        GPU is free while training, and the weights that wait on the CPU are never rounded.
        """
        if self.device.type == "cpu":  # no copies: there they are
            before = [next(m.parameters()).dtype for m in modules]
            for m in modules:
                move(m, self.device, dtype)
            try:
                yield
            finally:
                for m, old in zip(modules, before, strict=True):
                    move(m, self.device, old)
            return
        kept = [(t, t.data) for m in modules for t in (*m.parameters(), *m.buffers())]
        try:
            for t, here in kept:
                there = here.to(self.device, non_blocking=True)
                t.data = there.to(dtype) if there.is_floating_point() else there
            yield
        finally:
            for t, here in kept:
                t.data = here

    @contextlib.contextmanager
    def sampling(self, sampler: str = "base", prompts: bool = True) -> Iterator[Any]:
        """The pipeline, everything on the device for as long as the block runs. Without `prompts`
        it takes what `sampling_arguments` gives.
        """
        with self.on_device(self.dtype, *self.waiting_parts(prompts)):
            training = self.network.training
            self.network.eval()
            try:
                with self.uncompiled():
                    yield self.pipeline(sampler, prompts)
            finally:
                self.network.train(training)

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """A batch of samples has another shape than a step: not worth compiling for."""
        if not self.compiled:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")
