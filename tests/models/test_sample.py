"""An image is a function of its prompt and seed, not of its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scorer_folders import write_tokenizer

from dreamtune.models.sample import grid, sample, sample_tensor


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    size = write_tokenizer(folder, length=16)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=size - 2,
            eos_token_id=size - 1, pad_token_id=size - 1,
        )
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(folder), unet=unet,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(leave=False)
    return pipe


PROMPTS, SEEDS = grid(["a dog", "a red cat in the snow"], [0, 1, 7])
OPTIONS = {"steps": 3, "guidance_scale": 4.0, "guidance_rescale": 0.3}


def test_a_pipeline_that_cannot_rescale_is_not_asked_to(pipe):
    plain = {**OPTIONS, "steps": 1, "guidance_rescale": 0.0}
    wanted, asked = sample_tensor(pipe, PROMPTS[:1], SEEDS[:1], **plain), []
    own = type(pipe).__call__

    def call(self, prompt, height, width, **options):
        asked.append(options.pop("guidance_rescale", None))
        return own(self, prompt, height, width, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "__call__", call)
        assert torch.equal(sample_tensor(pipe, PROMPTS[:1], SEEDS[:1], **plain), wanted)
        sample_tensor(pipe, PROMPTS[:1], SEEDS[:1], **{**plain, "guidance_rescale": 0.3})
    assert asked == [None, 0.3]


def test_images_do_not_depend_on_the_batch_size(pipe):
    one = sample_tensor(pipe, PROMPTS, SEEDS, batch_size=1, **OPTIONS)
    for size in (2, 4, 8):
        other = sample_tensor(pipe, PROMPTS, SEEDS, batch_size=size, **OPTIONS)
        assert (one - other).abs().max() < 1e-4


def test_stochastic_schedulers_too(pipe):
    from diffusers import EulerAncestralDiscreteScheduler

    before = pipe.scheduler
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(before.config)
    try:
        one = sample_tensor(pipe, PROMPTS, SEEDS, batch_size=1, **OPTIONS)
        other = sample_tensor(pipe, PROMPTS, SEEDS, batch_size=4, **OPTIONS)
    finally:
        pipe.scheduler = before
    assert (one - other).abs().max() < 1e-4


def test_an_image_is_what_the_pipeline_gives_for_its_seed(pipe):
    images = sample(pipe, PROMPTS, SEEDS, **OPTIONS)
    expected = pipe(
        PROMPTS[4], generator=torch.Generator().manual_seed(SEEDS[4]), num_inference_steps=3,
        guidance_scale=4.0, guidance_rescale=0.3,
    ).images[0]  # fmt: skip
    difference = np.asarray(images[4], int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1
    assert images[4].mode == "RGB"


def test_prompts_and_seeds_matter(pipe):
    images = sample_tensor(pipe, PROMPTS, SEEDS, **OPTIONS)
    assert (images[0] - images[1]).abs().max() > 1e-2
    assert (images[0] - images[3]).abs().max() > 1e-5


def test_embeddings_stand_in_for_prompts(pipe):
    embeds, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    one = sample_tensor(pipe, PROMPTS, SEEDS, **OPTIONS)
    other = sample_tensor(
        pipe, PROMPTS, SEEDS, arguments={"prompt_embeds": embeds}, batch_size=4, **OPTIONS
    )
    assert (one - other).abs().max() < 1e-4


def test_size_and_progress_bar(pipe, capsys):
    assert sample(pipe, ["a dog"], [0], size=32, steps=1)[0].size == (32, 32)
    assert sample(pipe, ["a dog"], [0], size=(16, 32), steps=1)[0].size == (32, 16)
    assert capsys.readouterr().err == ""
    assert pipe._progress_bar_config == {"leave": False}
    assert sample(pipe, [], []) == []


def test_what_does_not_pair_is_refused(pipe):
    with pytest.raises(ValueError, match="1 and 2"):
        sample(pipe, ["a dog"], [0, 1])
    with pytest.raises(ValueError, match="batch_size"):
        sample(pipe, ["a dog"], [0], batch_size=0)


def test_pixels_that_are_not_finite_are_an_error(pipe):
    weight = pipe.unet.conv_out.weight
    before = weight.detach().clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(ValueError, match="not finite"):
            sample(pipe, ["a dog"], [0], steps=1)
    finally:
        weight.data.copy_(before)
