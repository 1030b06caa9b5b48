"""Pipelines of diffusers from tiny random models, and one way to call them all: by embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from tiny import tiny_pipeline
from tiny_transformers import TEXT, tiny
from torch import Tensor, nn

SIDE = 32  # pixels of a transformer's picture: 4 latents, 2 tokens


def _numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Kit:
    """A pipeline of one class.

    Attributes:
        network: makes its network.
        make: of that, the pipeline.
        embeddings: (indices of prompts, whether guided, which negative prompt) -> arguments.
        guidance: arguments without guidance and with it; the second None where there is none.
        more: further arguments of a call.
        other: names of schedulers that it takes beside its own.
        changing: arguments under which the guidance changes on the way, in one way each.
        encode: what `encode_prompt` gives for texts, where several images of an embedding are not
            made: see `_spoken`.
        like: the pipeline that has the same network.
    """

    name: str
    network: Callable[[], nn.Module]
    make: Callable[[nn.Module], Any]
    embeddings: Callable[[list[int], bool, int], dict[str, Any]]
    guidance: tuple[dict[str, Any], dict[str, Any] | None]
    more: dict[str, Any] = field(default_factory=dict)
    other: Sequence[str] = ()
    changing: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    encode: Callable[..., Any] | None = None
    like: str = ""

    def pipe(self) -> Any:
        pipe = self.make(self.network())
        pipe.set_progress_bar_config(disable=True)
        pipe.own_scheduler = pipe.scheduler
        if self.encode is not None:
            pipe.encode_prompt = self.encode(pipe.encode_prompt)
        return pipe

    def draw(
        self,
        pipe: Any,
        which: Sequence[int] = (0, 1, 2),
        *,
        guided: bool | None = None,
        images: int = 1,
        negative: int = 0,
        scheduler: type | None = None,
        steps: int = 1,
        **more: Any,
    ) -> Tensor:
        """Latents of those prompts, `images` each, of seeds of their own."""
        own = pipe.own_scheduler
        pipe.scheduler = (scheduler or type(own)).from_config(own.config)
        guided = self.guidance[1] is not None if guided is None else guided
        seeds = [images * i + j for i in which for j in range(images)]
        options = {
            **self.embeddings(list(which), guided, negative),
            **(self.guidance[guided] or {}),
            "num_images_per_prompt": images,
            "num_inference_steps": steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "latent",
            **self.more,
            **more,
        }
        if images > 1 and self.encode is not None:
            options = {name: x for name, x in options.items() if "_embeds" not in name}
            options["prompt"] = [f"{i}" for i in which]
            if guided:
                options["negative_prompt"] = [f"{i} {negative}" for i in which]
        if "mask_image" in options:  # the first generator draws the picture's code
            noise = torch.stack([_numbers(4, 8, 8, seed=100 + seed) for seed in seeds])
            options["latents"] = noise.to(pipe.unet.dtype)
            options["generator"] = [torch.Generator().manual_seed(0) for _ in seeds]
        network = network_of(pipe)
        there = network.device if network.device.type == "cuda" else None  # others offload

        def fitting(x: Any) -> Any:
            if isinstance(x, list):
                return [fitting(y) for y in x]
            if not isinstance(x, Tensor):
                return x
            return x.to(there, network.dtype if x.is_floating_point() else x.dtype)

        return pipe(**{name: fitting(x) for name, x in options.items()}).images


def network_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _text(width: int, pooled: int = 0, names: Mapping[str, str] | None = None) -> Any:
    """Embeddings under diffusers' names. pooled: width, 0 for none."""
    prompts = _numbers(3, TEXT, width, seed=1)
    negatives = _numbers(2, 3, TEXT, width, seed=2)
    pools, others = _numbers(3, pooled, seed=3), _numbers(2, 3, pooled, seed=4)

    def embeddings(which: list[int], guided: bool, negative: int) -> dict[str, Any]:
        found: dict[str, Any] = {"prompt_embeds": prompts[which]}
        if guided:
            found["negative_prompt_embeds"] = negatives[negative][which]
        if pooled:
            found["pooled_prompt_embeds"] = pools[which]
        if pooled and guided:
            found["negative_pooled_prompt_embeds"] = others[negative][which]
        return found

    return embeddings


def _spoken(four: bool) -> Any:
    """An `encode_prompt` for Flux or, with four results, Stable Diffusion 3: of a text the
    embeddings of that number, as the pipelines repeat them for the images of a prompt. They do not
    repeat those that they are given.
    """

    def encode(own: Callable[..., Any]) -> Callable[..., Any]:
        def told(texts: Sequence[str], guided: bool) -> dict[str, Tensor]:
            number, *negative = texts[0].split()
            which = [int(text.split()[0]) for text in texts]
            return _text(12, 10)(which, guided, int(negative[0]) if negative else 0)

        def encode_prompt(prompt: Any = None, num_images_per_prompt: int = 1, **more: Any) -> Any:
            if prompt is None:
                return own(prompt=prompt, num_images_per_prompt=num_images_per_prompt, **more)
            found, sides = [], [(prompt, "" if " " not in prompt[0] else "negative_")]
            if four:
                guided = more["do_classifier_free_guidance"]
                sides = [(prompt, ""), (more["negative_prompt"] if guided else None, "negative_")]
            for kind in ("prompt_embeds", "pooled_prompt_embeds"):
                for texts, side in sides:
                    x = None if texts is None else told(texts, bool(side))[f"{side}{kind}"]
                    n = num_images_per_prompt
                    found.append(None if x is None else x.repeat_interleave(n, 0))
            return found if four else [*found, torch.zeros(TEXT, 3)]

        return encode_prompt

    return encode


def _masked(which: list[int], guided: bool, negative: int) -> dict[str, Any]:
    found = _text(12)(which, guided, negative)
    masks = {f"{name}_mask": torch.ones(len(which), TEXT, dtype=torch.long) for name in found}
    return found | masks


def _listed(which: list[int], guided: bool, negative: int) -> dict[str, Any]:
    return {name: list(x) for name, x in _text(12)(which, guided, negative).items()}


def cut(*names: str) -> Any:
    """A callback after the first step, as diffusers' own: guidance ends, and with it the rows of
    the tensors that belong to the negative prompt.
    """

    def callback(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe._guidance_scale = 0.0
            tensors |= {name: tensors[name].chunk(2)[1] for name in names}
        return tensors

    named = {"callback_on_step_end_tensor_inputs": ["latents", *names]}
    return {"callback_on_step_end": callback, **named}


UNETS = ("HeunDiscreteScheduler", "DPMSolverMultistepScheduler")
FLOWS = ("FlowMatchHeunDiscreteScheduler",)


def _sd(name: str) -> Kit:
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    mask = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(6)) > 0.5).float()
    size = {"height": 8, "width": 8}
    more: dict[str, dict[str, Any]] = {
        "StableDiffusionPipeline": size,
        "StableDiffusionImg2ImgPipeline": {"image": picture, "strength": 1.0},
        "StableDiffusionInpaintPipeline": {"image": picture, "mask_image": mask, **size},
        "StableDiffusionControlNetPipeline": {"image": picture, **size},
    }

    doubled = {
        "StableDiffusionInpaintPipeline": ("mask", "masked_image_latents"),
        "StableDiffusionControlNetPipeline": ("image",),
    }

    def make(unet: nn.Module) -> Any:
        parts = dict(tiny_pipeline(unet).components)  # type: ignore[attr-defined]
        if "ControlNet" in name:
            torch.manual_seed(3)
            parts["controlnet"] = net = diffusers.ControlNetModel.from_unet(
                unet, conditioning_channels=3, load_weights_from_unet=False
            ).eval()
            for x in net.parameters():
                torch.nn.init.normal_(x, std=0.05)
        return getattr(diffusers, name)(**parts, requires_safety_checker=False)

    return Kit(
        name, small_unet, make, _text(24), ({"guidance_scale": 1.0}, {"guidance_scale": 5.0}),
        more[name], UNETS, {"ended by a callback": cut("prompt_embeds", *doubled.get(name, ()))},
        like="" if name == "StableDiffusionPipeline" else "StableDiffusionPipeline",
    )  # fmt: skip


def small_unet(**more: Any) -> nn.Module:
    """One level of blocks: a test of all features calls it hundreds of times."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1, "cross_attention_dim": 24, "attention_head_dim": 8,
        "norm_num_groups": 8,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(options | more)).eval()


def _sdxl_unet() -> nn.Module:
    return small_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    )  # fmt: skip


def _sdxl(unet: nn.Module) -> Any:
    vae = tiny_pipeline(unet).vae  # type: ignore[attr-defined]
    return diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=unet, scheduler=diffusers.DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip


def _of_flow(name: str, *absent: str, **more: Any) -> Any:
    def make(transformer: nn.Module) -> Any:
        none = dict.fromkeys(("vae", "text_encoder", "tokenizer", *absent))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        parts: dict[str, Any] = {**none, "transformer": transformer, "scheduler": scheduler}
        return getattr(diffusers, name)(**{**parts, **{k: v() for k, v in more.items()}})

    return make


def _flux2_vae() -> nn.Module:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=1,
        norm_num_groups=4,
    ).eval()  # fmt: skip


def _with(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: tiny(kind, **options)


TWO = ("text_encoder_2", "tokenizer_2")
SIZE = {"height": SIDE, "width": SIDE}
GUIDED = ({"guidance_scale": 1.0}, {"guidance_scale": 4.0})
TRUE = ({"true_cfg_scale": 1.0}, {"true_cfg_scale": 4.0})
KITS = {
    kit.name: kit
    for kit in (
        _sd("StableDiffusionPipeline"),
        _sd("StableDiffusionImg2ImgPipeline"),
        _sd("StableDiffusionInpaintPipeline"),
        _sd("StableDiffusionControlNetPipeline"),
        Kit(
            "StableDiffusionXLPipeline", _sdxl_unet, _sdxl, _text(24, 10), GUIDED,
            {"height": 8, "width": 8}, UNETS,
            {"ended by a callback": cut("prompt_embeds", "add_text_embeds", "add_time_ids")},
        ),
        Kit(
            "StableDiffusion3Pipeline", _with("SD3Transformer2DModel"),
            _of_flow("StableDiffusion3Pipeline", *TWO, "text_encoder_3", "tokenizer_3"),
            _text(12, 10), GUIDED, SIZE, FLOWS,
            {
                "ended by a callback": cut("prompt_embeds", "pooled_prompt_embeds"),
                "of skipped layers": {
                    "skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0,
                    "skip_layer_guidance_stop": 1.0,
                },
            },
            _spoken(four=True),
        ),
        Kit(
            "FluxPipeline", _with("FluxTransformer2DModel"), _of_flow("FluxPipeline", *TWO),
            _text(12, 10), TRUE, SIZE, (), {}, _spoken(four=False),
        ),
        Kit(
            "Flux2Pipeline", _with("Flux2Transformer2DModel"),
            _of_flow("Flux2Pipeline", vae=_flux2_vae), _text(12), ({}, None), SIZE,
        ),
        Kit(
            "Flux2KleinPipeline", _with("Flux2Transformer2DModel", guidance_embeds=False),
            _of_flow("Flux2KleinPipeline", vae=_flux2_vae), _text(12), GUIDED, SIZE, (),
            {"ended by a callback": cut()}, like="Flux2Pipeline",
        ),
        Kit(
            "QwenImagePipeline", _with("QwenImageTransformer2DModel", out_channels=1),
            _of_flow("QwenImagePipeline"), _masked, TRUE, SIZE,
        ),
        Kit(
            "ZImagePipeline", _with("ZImageTransformer2DModel"), _of_flow("ZImagePipeline"),
            _listed, ({"guidance_scale": 0.0}, {"guidance_scale": 4.0}), SIZE, (),
            {"ended by a callback": cut(), "truncated": {"cfg_truncation": 0.3}},
        ),
    )
}  # fmt: skip
