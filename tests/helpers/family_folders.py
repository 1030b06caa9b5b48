"""Folders of random weights of the families of flow matching: 2 pixels a latent, 2 a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from scorer_folders import (
    QWEN_IMAGE_WORDS,
    write_qwen_tokenizer,
    write_t5_tokenizer,
    write_tokenizer,
)
from tiny_transformers import tiny


def write_flux_pipeline(folder: Path, prediction: str = "flow", guided: bool = True) -> Path:
    """A FluxPipeline folder, as dev; not guided: as schnell, and without blocks of one stream."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    assert prediction == "flow"
    words, pieces = write_tokenizer(folder / "words", 16), write_t5_tokenizer(folder / "pieces")
    torch.manual_seed(0)
    first = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words, hidden_size=10, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, bos_token_id=words - 2,
            eos_token_id=words - 1, pad_token_id=words - 1,
        )
    )  # fmt: skip
    second = T5EncoderModel(
        T5Config(vocab_size=pieces, d_model=12, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    blocks: dict[str, Any] = {"num_layers": 1, "num_single_layers": int(guided)}
    FluxPipeline(
        vae=vae, text_encoder=first, text_encoder_2=second,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words"),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "pieces"),
        transformer=tiny(
            "FluxTransformer2DModel", in_channels=16, guidance_embeds=guided, **blocks
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guided else 1.0, use_dynamic_shifting=guided
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_chroma_pipeline(folder: Path, prediction: str = "flow") -> Path:
    """A ChromaPipeline folder."""
    from diffusers import AutoencoderKL, ChromaPipeline, FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    assert prediction == "flow"
    pieces = write_t5_tokenizer(folder / "pieces")
    torch.manual_seed(0)
    text = T5EncoderModel(
        T5Config(vocab_size=pieces, d_model=12, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    ChromaPipeline(
        vae=vae, text_encoder=text,
        tokenizer=T5TokenizerFast.from_pretrained(folder / "pieces"),
        transformer=tiny("ChromaTransformer2DModel", in_channels=16),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_qwen_image_pipeline(folder: Path, prediction: str = "flow") -> Path:
    """A QwenImagePipeline folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    assert prediction == "flow"
    words = write_qwen_tokenizer(folder / "words", QWEN_IMAGE_WORDS)
    torch.manual_seed(0)
    text = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**_language(words), "hidden_size": 16},
            vision_config={**VISION, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
        )
    )
    QwenImagePipeline(
        vae=_frames(), text_encoder=text,
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "words"),
        transformer=tiny(
            "QwenImageTransformer2DModel", in_channels=16, num_layers=1, joint_attention_dim=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_krea2_pipeline(folder: Path, prediction: str = "flow", **more: Any) -> Path:
    """A Krea2Pipeline folder, told two layers of its text encoder. more: of the pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline
    from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

    assert prediction == "flow"
    words = write_qwen_tokenizer(folder / "words", QWEN_IMAGE_WORDS)
    torch.manual_seed(0)
    text = Qwen3VLModel(
        Qwen3VLConfig(
            text_config={**_language(words), "hidden_size": 16, "head_dim": 8},
            vision_config={
                **VISION, "out_hidden_size": 16, "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        )
    )  # fmt: skip
    Krea2Pipeline(
        vae=_frames(), text_encoder=text,
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "words"),
        transformer=tiny("Krea2Transformer2DModel", in_channels=16, text_hidden_dim=16),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=6400
        ),
        **{"text_encoder_select_layers": (0, 1), **more},
    ).save_pretrained(folder)  # fmt: skip
    return folder


VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1}


def _language(words: int) -> dict[str, Any]:
    return {
        "vocab_size": words, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip


def _frames() -> Any:
    """An autoencoder of videos with statistics of its own."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.2, 2.0],
    )  # fmt: skip
