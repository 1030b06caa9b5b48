"""What the files of a model's folder must hold: one schema a file, checked before a library reads
it. What the tables do not list is the libraries' to judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict, TypeAdapter
from pydantic_core import PydanticCustomError

from dreamtune.fields import UnreadableFile, checker, from_file, shown
from dreamtune.textfile import read_json


def exactly_two(values: list[Any]) -> list[Any]:
    if len(values) != 2:
        raise PydanticCustomError("pair", "it must be a list of two")
    return values


# JSON has types of its own: "no" is no false, "3" no number.
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict(), Field(ge=1, le=1 << 20)]
Depth = Annotated[int, Strict(), Field(ge=1, le=200)]  # layers are built before weights are missed
DepthOr0 = Annotated[int, Strict(), Field(ge=0, le=200)]
Token = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(gt=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1)]
Pixels = Annotated[int, Strict(), Field(ge=1, le=1 << 14)]
Text = Annotated[str, Strict()]
Wholes = Annotated[list[Whole], Field(min_length=1, max_length=32)]
Depths = Annotated[list[Depth], Field(min_length=1, max_length=32)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=32)]
Pair = Annotated[list[Pixels], AfterValidator(exactly_two)]
Class = Annotated[list[Text], AfterValidator(exactly_two)]
MaybeClass = Annotated[list[Text | None], AfterValidator(exactly_two)] | None
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]

Rules = TypeAdapter[dict[str, Any]]


def rules(needed: tuple[str, ...] = (), **hints: Any) -> Rules:
    return checker(hints, needed, others=True)


def components(parts: tuple[str, ...], optional: tuple[str, ...] = ()) -> Rules:
    """Of a model_index.json: library and class of each part; of an optional one null for both."""
    needed = tuple(part for part in parts if part not in optional)
    return rules(needed, **dict.fromkeys(needed, Class), **dict.fromkeys(optional, MaybeClass))


INDEX = rules(("_class_name",), _class_name=Text)
NAMED = rules(_class_name=Text)
NETWORK = rules(
    ("block_out_channels", "in_channels"),
    in_channels=Whole, out_channels=Whole, block_out_channels=Wholes,
    layers_per_block=Depth | Depths, transformer_layers_per_block=Depth | list[Depth | Depths],
    down_block_types=Texts, up_block_types=Texts, mid_block_type=Text | None,
    attention_head_dim=Whole | Wholes, num_attention_heads=Whole | Wholes | None,
    cross_attention_dim=Whole | Wholes, sample_size=Pixels | Pair | None,
    norm_num_groups=Whole | None, norm_eps=Positive, act_fn=Activation,
    flip_sin_to_cos=Flag, freq_shift=Number, center_input_sample=Flag,
    use_linear_projection=Flag, upcast_attention=Flag | None, dropout=Share,
    downsample_padding=Annotated[int, Strict(), Field(ge=0, le=16)],
    mid_block_scale_factor=Positive, resnet_out_scale_factor=Positive,
    resnet_time_scale_shift=Literal["default", "scale_shift"], resnet_skip_time_act=Flag,
    dual_cross_attention=Flag, only_cross_attention=Flag | list[Flag],
    conv_in_kernel=Depth, conv_out_kernel=Depth,
    addition_embed_type=Text | None, addition_time_embed_dim=Whole | None,
    projection_class_embeddings_input_dim=Whole | None,
)  # fmt: skip
AUTOENCODER = rules(
    ("latent_channels",),
    in_channels=Whole, out_channels=Whole, latent_channels=Whole, block_out_channels=Wholes,
    encoder_block_out_channels=Wholes, decoder_block_out_channels=Wholes | None,
    num_encoder_blocks=Depths, num_decoder_blocks=Depths, layers_per_block=Depth,
    down_block_types=Texts, up_block_types=Texts, sample_size=Pixels | Pair | None,
    norm_num_groups=Whole, act_fn=Activation, scaling_factor=Positive, shift_factor=Number | None,
    latent_magnitude=Positive, latent_shift=Number, upsample_fn=Text,
    upsampling_scaling_factor=Annotated[int, Strict(), Field(ge=1, le=16)],
    mid_block_add_attention=Flag, use_quant_conv=Flag, use_post_quant_conv=Flag,
)  # fmt: skip
TEXT_ENCODER = rules(
    ("model_type",),
    model_type=Literal["clip_text_model"],
    vocab_size=Whole, hidden_size=Whole, intermediate_size=Whole, projection_dim=Whole,
    num_hidden_layers=Depth, num_attention_heads=Depth, max_position_embeddings=Whole,
    hidden_act=Text, layer_norm_eps=Positive, attention_dropout=Share,
    eos_token_id=Token, bos_token_id=Token | None, pad_token_id=Token | None,
)  # fmt: skip
Part = dict[str, Any]  # of a config, which has rules of its own
OTHER_TEXT_ENCODER = rules(("model_type",), model_type=Text, text_config=Part, vision_config=Part)
LANGUAGE = rules(
    ("vocab_size",),
    vocab_size=Whole, num_layers=Depth, num_hidden_layers=Depth, num_heads=Depth,
    num_attention_heads=Depth, num_key_value_heads=Depth, hidden_size=Whole, d_model=Whole,
    d_kv=Whole, d_ff=Whole, head_dim=Whole, intermediate_size=Whole,
)  # fmt: skip
VISION = rules(
    depth=Depth, hidden_size=Whole, intermediate_size=Whole, num_heads=Depth, in_channels=Whole,
    out_hidden_size=Whole, num_position_embeddings=Whole, patch_size=Depth,
    temporal_patch_size=Depth, spatial_merge_size=Depth,
)  # fmt: skip
VIDEO_AUTOENCODER = rules(
    ("z_dim", "latents_mean", "latents_std"),
    base_dim=Whole, z_dim=Whole, dim_mult=Wholes, num_res_blocks=Depth, attn_scales=list[Number],
    temperal_downsample=Annotated[list[Flag], Field(min_length=1, max_length=8)], dropout=Share,
    input_channels=Whole, latents_mean=Annotated[list[Number], Field(min_length=1)],
    latents_std=Annotated[list[Positive], Field(min_length=1)],
)  # fmt: skip
TOKENIZER = rules(
    tokenizer_class=Literal["CLIPTokenizer", "CLIPTokenizerFast"],
    model_max_length=Annotated[float, Strict(), Field(gt=2)] | None,  # 10^30: none
)
SCHEDULER = rules(
    num_train_timesteps=Annotated[int, Strict(), Field(ge=1, le=100_000)],
    beta_start=Annotated[float, Strict(), Field(gt=0, lt=1)],
    beta_end=Annotated[float, Strict(), Field(gt=0, lt=1)],
    beta_schedule=Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
    trained_betas=list[Annotated[float, Strict(), Field(gt=0, lt=1)]] | None,
    prediction_type=Literal["epsilon", "v_prediction"],
    rescale_betas_zero_snr=Flag, use_flow_sigmas=Literal[False] | None,
    timestep_spacing=Literal["linspace", "leading", "trailing"],
    steps_offset=Annotated[int, Strict(), Field(ge=0, le=100)],
    clip_sample=Flag, clip_sample_range=Positive, set_alpha_to_one=Flag, skip_prk_steps=Flag,
    thresholding=Flag, dynamic_thresholding_ratio=Share, sample_max_value=Positive,
)  # fmt: skip

FLOW_SCHEDULER = rules(
    num_train_timesteps=Annotated[int, Strict(), Field(ge=1, le=100_000)],
    shift=Positive, use_dynamic_shifting=Flag, base_shift=Number | None, max_shift=Number | None,
    base_image_seq_len=Whole, max_image_seq_len=Whole, invert_sigmas=Literal[False] | None,
    shift_terminal=Share | None, use_karras_sigmas=Flag | None, use_exponential_sigmas=Flag | None,
    use_beta_sigmas=Flag | None, time_shift_type=Literal["exponential", "linear"],
    stochastic_sampling=Literal[False] | None,
)  # fmt: skip
TRANSFORMER = rules(
    ("in_channels",),
    sample_size=Pixels | None, patch_size=Depth, in_channels=Whole, out_channels=Whole | None,
    num_layers=Depth, attention_head_dim=Whole, num_attention_heads=Depth,
    joint_attention_dim=Whole, caption_projection_dim=Whole, pooled_projection_dim=Whole,
    pos_embed_max_size=Pixels | None, dual_attention_layers=list[Token], qk_norm=Text | None | Flag,
    dim=Whole, n_layers=Depth, n_refiner_layers=Depth, n_heads=Depth, n_kv_heads=Depth,
    num_single_layers=DepthOr0, mlp_ratio=Positive, axes_dims_rope=Wholes, guidance_embeds=Flag,
    timestep_guidance_channels=Whole, cap_feat_dim=Whole, siglip_feat_dim=None,
    rope_theta=Positive, t_scale=Positive, axes_dims=Wholes, axes_lens=Wholes,
    all_patch_size=Depths, all_f_patch_size=Depths,
    zero_cond_t=Flag, use_additional_t_cond=Flag, use_layer3d_rope=Flag,
)  # fmt: skip

# What the first release of each format stated, and the shapes of weights do not tell.
USUAL = {
    "unet": (
        "act_fn", "attention_head_dim", "center_input_sample", "flip_sin_to_cos", "freq_shift",
        "mid_block_scale_factor", "norm_eps", "norm_num_groups", "downsample_padding",
    ),
    "transformer": (
        "attention_head_dim", "num_attention_heads", "patch_size", "n_heads", "axes_dims",
        "rope_theta", "t_scale",
    ),
    "vae": ("act_fn", "scaling_factor"),
    "text_encoder": ("hidden_act", "layer_norm_eps", "num_attention_heads"),
    "scheduler": (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample",
        "set_alpha_to_one", "steps_offset", "prediction_type",
    ),
}  # fmt: skip


def read_config(path: Path, schema: Rules, place: str) -> dict[str, Any]:
    """A JSON file of a model, checked. place: what messages call it. Raises UnreadableFile."""
    found = from_file(schema, read_json(path), f"`{place}`")
    refuse_code(found, place)
    return found


def refuse_code(config: Any, place: str) -> None:
    """Nothing that is read asks for code: not from the folder, not from the hub.

    Raises UnreadableFile that names the wish. transformers and open_clip would grant some of these,
    or ask on the terminal.
    """
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        waiting += value.values()
        for key, wish in value.items():
            kernel = "attn_implementation" in key and "/" in str(wish)
            if (key in ("trust_remote_code", "auto_map", "custom_pipelines") and wish) or kernel:
                raise UnreadableFile(
                    f"`{place}` asks for code that comes with the model (`{key}`: {shown(wish)}), "
                    "which is never run. Take that line out, or use another model."
                )
            if key == "quantization_config" and wish:
                raise UnreadableFile(f"`{place}` is of quantized weights, which cannot be used.")


def assumed(part: str, stated: dict[str, Any], used: Any) -> list[str]:
    """Name and value of each usual setting that a config does not state. used: what has them."""
    known = used if isinstance(used, dict) else vars(used)
    names = [n for n in USUAL[part] if n not in stated and n in known]
    return [f"{name} {known[name]}" for name in names]
