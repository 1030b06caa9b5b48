"""Qwen-Image and those that took its parts over: masks, frames, guidance, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from family_folders import write_qwen_image_pipeline

from dreamtune.config import Config
from dreamtune.fast.watch import why_not_recorded
from dreamtune.models.conditioning import take
from dreamtune.models.load import load_base
from dreamtune.models.sample import sample_tensor
from dreamtune.training.speed import Speed, not_captured

PROMPTS = ["a", "a sks dog in the snow"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_image_pipeline(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "base"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_filled_up_tokens_are_not_seen(written: Path) -> None:
    """A row is what it is alone, among longer ones too, and after a cache of others."""
    base = load_base(str(written))
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500.0])
    short, both = base.encode_prompts(PROMPTS[:1]), base.encode_prompts(PROMPTS)
    mask = both["prompt_embeds_mask"]
    assert mask.dtype == torch.long and mask.sum(1).tolist() == [1 + 5, 18 + 5]
    assert short["prompt_embeds_mask"].tolist() == [[1] * 6]
    first = {name: rows[:1] for name, rows in both.items()}
    with torch.no_grad():
        alone, among = base.predict(x, t, short), base.predict(x, t, first)
        unmasked = base.predict(x, t, {**first, "prompt_embeds_mask": torch.ones_like(mask[:1])})
    torch.testing.assert_close(among, alone, rtol=0, atol=1e-6)
    assert float((unmasked - alone).abs().max()) > 1e-5


def test_a_picture_is_a_frame_by_the_statistics_of_its_channels(written: Path) -> None:
    base = load_base(str(written))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, config = base.encode_images(pixels), base.vae.config
    with torch.no_grad():
        codes = base.vae.encode(pixels[:, :, None]).latent_dist
    assert found.mean.shape == (2, 4, 8, 8) and found.std is not None
    mean, std = (torch.tensor(y).view(4, 1, 1) for y in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(found.mean * std + mean, codes.mean[:, :, 0])
    torch.testing.assert_close(found.std * std, codes.std[:, :, 0])
    assert (base.latent_scale, base.resolution) == (2, 256)


def test_qwen_image_is_guided_away_from_nothing(written: Path) -> None:
    """As its card has it; without guidance the negative prompt is not asked for."""
    base = load_base(str(written))
    how: dict[str, Any] = {"steps": 2, "size": 16}
    assert base.sampling_defaults(16).guidance_scale == 4.0 and base.rows_per_image(4.0) == 1
    assert base.guidance_options(4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
    stock: Any = DiffusionPipeline.from_pretrained(written)
    pipe, arguments = base.pipeline(), base.sampling_arguments(PROMPTS)
    for scale in (1.0, 4.0):
        for i, prompt in enumerate(PROMPTS):
            own = base.guidance_options(scale)
            wanted = stock(
                prompt, generator=torch.Generator().manual_seed(i), output_type="pt", height=16,
                width=16, num_inference_steps=2, **own,
            ).images  # fmt: skip
            given = sample_tensor(pipe, [prompt], [i], guidance_scale=scale, **how)
            assert torch.equal(given, wanted)
            found = sample_tensor(
                pipe, [prompt], [i], guidance_scale=scale, arguments=take(arguments, [i]), **how
            )
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_what_of_a_prompt_is_seen(written: Path) -> None:
    """512 tokens after the 34 of the template, of which 5 come after the prompt."""
    base = load_base(str(written))
    assert not base.unseen("a" * 507)
    assert "has 547 tokens, the text encoder takes 546" in base.unseen("a" * 508)
    assert base.encode_prompts(["a" * 508])["prompt_embeds"].shape == (1, 512, 16)


def test_no_forward_is_recorded(written: Path) -> None:
    base = load_base(str(written))
    assert why_not_recorded(base.network) == base.uncaptured
    slower = not_captured(Speed(True, False, False, {}), base.uncaptured, Config())
    assert not slower.captured


TRANSFORMER, VAE, TEXT = (f"{part}/config.json" for part in ("transformer", "vae", "text_encoder"))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "none of the families"),
        ("model_index.json", {"_class_name": "QwenImageEditPlusPipeline"}, "none of the families"),
        ("model_index.json", {"_class_name": "QwenImageLayeredPipeline"}, "none of the families"),
        (TRANSFORMER, {"zero_cond_t": True}, "has `zero_cond_t`, as those of Qwen-Image-Edit"),
        (TRANSFORMER, {"use_layer3d_rope": True}, "has `use_layer3d_rope`"),
        (TRANSFORMER, {"zero_cond_t": "no"}, "`zero_cond_t`"),
        (VAE, {"latents_mean": [0.0] * 3}, "has 4 channels, `latents_mean` 3 numbers"),
        (VAE, {"latents_std": [1.0, 1.0, 1.0, 0.0]}, "`latents_std`"),
        (VAE, {"temperal_downsample": "no"}, "`temperal_downsample`"),
        (TEXT, {"model_type": "qwen2_vl"}, "`model_type` must be qwen2_5_vl, .* got qwen2_vl"),
        (TEXT, {"text_config": {"vocab_size": -1}}, "`vocab_size`"),
        (TEXT, {"vision_config": {"depth": 10**9}}, "`vision_config`: `depth`"),
    ],
)
def test_files_that_do_not_fit(folder: Path, file: str, values: Any, words: str) -> None:
    edit(folder / file, **values)
    with pytest.raises(ValueError, match=words):
        load_base(str(folder))


def test_parts_of_several_models(written: Path) -> None:
    base = load_base(str(written))
    about = {"id": "x", "embedded": False, "device": base.device, "dtype": base.dtype}

    class Fixed(dict[str, Any]):
        """The transformer's config, but for these."""

        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__({**base.transformer.config, **values})

        __getattr__ = dict.__getitem__

    for values, words in (
        ({"in_channels": 32}, "takes 32 channels, the patches of its autoencoder have 16"),
        ({"out_channels": 8}, "takes 16 channels and gives 32"),
        ({"joint_attention_dim": 13}, "told 13 numbers a token, its text encoder gives 16"),
        ({"guidance_embeds": True}, "has `guidance_embeds`"),
    ):
        other = SimpleNamespace(config=Fixed(values))
        with pytest.raises(ValueError, match=words):
            type(base)({**base.parts, "transformer": other}, **about)
