"""Tiny random models and photos that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from scorer_folders import write_clip, write_dino

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No example is timed: a busy machine would fail it.
hypothesis_settings.register_profile("untimed", deadline=None)
hypothesis_settings.load_profile("untimed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` say why they did not run."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another has left, or writes to the user's own."""
    monkeypatch.setenv("DREAMTUNE_CACHE", str(tmp_path.with_name(f"{tmp_path.name}-cache")))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run side by side; more threads each would only wait for one another."""
    import torch

    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def write_pipeline(folder: Path, vae: str = "kl", prediction: str = "epsilon") -> Path:
    """A StableDiffusionPipeline folder of random weights: 16 px, 2 pixels a latent, 4 channels."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
    from scorer_folders import write_tokenizer
    from tiny import tiny_unet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = write_tokenizer(folder / "words", 16)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=words - 2,
            eos_token_id=words - 1, pad_token_id=words - 1,
        )
    )  # fmt: skip
    if vae == "kl":
        encoder = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    else:
        encoder = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
        )  # fmt: skip
    zero_snr = prediction == "v_prediction"
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        prediction_type=prediction, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing",
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=encoder, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(folder / "words"),
        unet=tiny_unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_xl_pipeline(folder: Path, prediction: str = "epsilon") -> Path:
    """A StableDiffusionXLPipeline folder of random weights: 16 px, 2 pixels a latent."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
    from scorer_folders import write_tokenizer
    from tiny import tiny_xl_unet
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    words = write_tokenizer(folder / "words", 16)
    common = {
        "vocab_size": words, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": words - 2,
        "eos_token_id": words - 1, "pad_token_id": words - 1,
    }  # fmt: skip
    torch.manual_seed(0)
    first = CLIPTextModel(CLIPTextConfig(hidden_size=24, **common))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=16, projection_dim=10, **common)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
        prediction_type=prediction, timestep_spacing="leading",
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=tiny_xl_unet(), scheduler=scheduler, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_sd3_pipeline(folder: Path, prediction: str = "flow", t5: bool = True) -> Path:
    """A StableDiffusion3Pipeline folder of random weights: 16 px, 2 pixels a latent of 16."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        StableDiffusion3Pipeline,
    )
    from scorer_folders import write_t5_tokenizer, write_tokenizer
    from tiny_transformers import tiny
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    assert prediction == "flow"
    words = write_tokenizer(folder / "words", 16)
    common = {
        "vocab_size": words, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": words - 2,
        "eos_token_id": words - 1, "pad_token_id": words - 1,
    }  # fmt: skip
    torch.manual_seed(0)
    first, second = (
        CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=n, projection_dim=m, **common))
        for n, m in ((8, 4), (12, 6))
    )
    third = tokenizer_3 = None
    if t5:
        pieces = write_t5_tokenizer(folder / "pieces")
        tokenizer_3 = T5TokenizerFast.from_pretrained(folder / "pieces")
        shape = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        third = T5EncoderModel(T5Config(vocab_size=pieces, **shape))
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=16, scaling_factor=1.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    StableDiffusion3Pipeline(
        vae=vae, text_encoder=first, text_encoder_2=second, text_encoder_3=third,
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=tokenizer_3,
        transformer=tiny(
            "SD3Transformer2DModel", sample_size=8, in_channels=16, out_channels=16,
            joint_attention_dim=24,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_z_image_pipeline(folder: Path, prediction: str = "flow") -> Path:
    """A ZImagePipeline folder of random weights: 2 pixels a latent of 16 numbers."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from scorer_folders import write_qwen_tokenizer
    from tiny_transformers import tiny
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    assert prediction == "flow"
    words = write_qwen_tokenizer(folder / "words")
    torch.manual_seed(0)
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=words, hidden_size=12, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=16, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    ZImagePipeline(
        vae=vae, text_encoder=text, tokenizer=Qwen2Tokenizer.from_pretrained(folder / "words"),
        transformer=tiny("ZImageTransformer2DModel", in_channels=16, axes_lens=[640, 16, 16]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_klein_pipeline(folder: Path, prediction: str = "flow") -> Path:
    """A Flux2KleinPipeline folder of random weights: 2 pixels a latent of 4 numbers, 4 a patch."""
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from scorer_folders import write_qwen_tokenizer
    from tiny_transformers import tiny
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    assert prediction == "flow"
    words = write_qwen_tokenizer(folder / "words")
    torch.manual_seed(0)
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=words, hidden_size=4, intermediate_size=8, num_hidden_layers=28,
            num_attention_heads=1, num_key_value_heads=1, head_dim=4,
        )
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    Flux2KleinPipeline(
        vae=vae, text_encoder=text, tokenizer=Qwen2Tokenizer.from_pretrained(folder / "words"),
        transformer=tiny(
            "Flux2Transformer2DModel", in_channels=16, num_layers=1, num_single_layers=1,
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_xl_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of Stable Diffusion XL that predicts noise."""
    return write_xl_pipeline(tmp_path_factory.mktemp("xlbase"))


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with an AutoencoderKL that predicts noise."""
    return write_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_v_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with an AutoencoderTiny, v-prediction and zero terminal SNR."""
    return write_pipeline(tmp_path_factory.mktemp("vbase"), "tiny", "v_prediction")


@pytest.fixture(scope="session")
def photo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small photos, one with a caption, and a file that is no photo."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 255, (20, 24 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("a sks dog in the snow\n")
    (folder / ".DS_Store").write_bytes(b"\0")
    return folder


@pytest.fixture(scope="session")
def scorer_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("scorers")
    dino, clip = write_dino(folder / "dino"), write_clip(folder / "clip")
    return {"dino": str(dino), "clip": f"local-dir:{clip}"}


@pytest.fixture
def undrawn() -> Iterator[pytest.MonkeyPatch]:
    """A run's charts are their captions: four or more a run, each as long as a training step."""
    from dreamtune.evaluation import curves, sweep_curves

    def caption(title: str, said: str, *rest: Any) -> str:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption></figure>'

    with pytest.MonkeyPatch.context() as patch:
        for module in (curves, sweep_curves):
            patch.setattr(module, "chart", caption)
        yield patch


@pytest.fixture
def settings(tiny_v_pipeline_dir: Path, photo_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """Six steps without scores: the least that goes through everything else."""
    return {
        "pretrained_model_name_or_path": str(tiny_v_pipeline_dir),
        "instance_data_dir": str(photo_dir),
        "instance_prompt": "a sks dog",
        "validation_prompt": ["a {} on a red chair", "a {}"],
        "max_train_steps": 6,
        "validation_steps": 3,
        "num_inference_steps": 2,
        "output_dir": str(tmp_path / "run"),
        "options": {"rank": 2},
        "dino": "none",
        "clip": "none",
    }


@pytest.fixture(scope="module")
def scorers(scorer_names: dict[str, str]) -> Any:
    """Of everything that is scored."""
    from galleries import EVERY

    from dreamtune.metrics import Scorers

    return Scorers.load(scorer_names, EVERY.metrics)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Photos, images and the base's images of a few subjects, with masks."""
    from galleries import write_masked

    return write_masked(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def results(folders: Any, scorers: Any) -> Any:
    from galleries import EVERY, task_of

    from dreamtune.evaluation.scoring import score_images

    return score_images(task_of(folders), scorers, EVERY)
