"""Krea 2: what the network is told, its guidance, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from family_folders import write_krea2_pipeline
from tiny import disturb

import dreamtune
from dreamtune.models.load import load_base
from dreamtune.models.sample import sample_tensor


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_krea2_pipeline(tmp_path_factory.mktemp("krea2"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_filled_up_tokens_are_not_seen(written: Path) -> None:
    base = load_base(str(written))
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500.0])
    told = base.encode_prompts(["a dog"])
    embeds, mask = told["prompt_embeds"], told["prompt_embeds_mask"]
    assert embeds.shape == (1, 512, 2, 16) and mask.dtype == torch.bool and mask.sum() == 5 + 5
    noise = torch.randn(embeds.shape, generator=g)
    other = {**told, "prompt_embeds": torch.where(mask[..., None, None], embeds, noise)}
    seen = {**told, "prompt_embeds": embeds + noise}
    with torch.no_grad():
        found, same, moved = (base.predict(x, t, c) for c in (told, other, seen))
    torch.testing.assert_close(found, same, rtol=0, atol=1e-6)
    assert float((moved - found).abs().max()) > 1e-4


def test_guidance_is_added_and_a_distilled_base_is_without(written: Path, tmp_path: Path) -> None:
    base = load_base(str(written))
    assert base.sampling_defaults(16).guidance_scale == 4.5 and base.rows_per_image(4.5) == 1
    stock: Any = DiffusionPipeline.from_pretrained(written)
    how: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16}
    pictures = []
    for scale in (0.0, 0.5):
        own = {"guidance_scale": scale, "steps": 2, "size": 16}
        given = sample_tensor(base.pipeline(), ["a dog"], [0], **own)  # type: ignore[arg-type]
        seed = torch.Generator().manual_seed(0)
        found = stock("a dog", generator=seed, guidance_scale=scale, output_type="pt", **how)
        assert torch.equal(given, found.images)
        pictures.append(given)
    assert float((pictures[0] - pictures[1]).abs().max()) > 1e-5

    turbo = write_krea2_pipeline(tmp_path / "turbo", is_distilled=True)
    base = load_base(str(turbo))
    assert base.sampling_defaults(16).guidance_scale == 0.0
    assert base.pipeline().config.is_distilled
    assert base.pipeline().text_encoder_select_layers == (0, 1)


def test_norms_stay_in_float32(written: Path) -> None:
    base = load_base(str(written), dtype=torch.bfloat16)
    dtypes = {name: x.dtype for name, x in base.network.named_parameters()}
    assert {x for name, x in dtypes.items() if "norm" in name} == {torch.float32}
    assert {x for name, x in dtypes.items() if "norm" not in name} == {torch.bfloat16}
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    assert base.predict(x, t, base.encode_prompts(["a"])).isfinite().all()


def test_what_is_adapted(written: Path) -> None:
    """All attention, of the text too, as by diffusers' script."""
    base = load_base(str(written))
    adapter = dreamtune.inject(base.network, "lora", rank=2, target_modules=base.target_modules)
    leaves = ("to_q", "to_k", "to_v", "to_gate", "to_out.0")
    fused = ("text_fusion.layerwise_blocks.0", "text_fusion.refiner_blocks.0")
    blocks = ("transformer_blocks.0", *fused)
    assert set(adapter.weights()) == {f"{block}.attn.{leaf}" for block in blocks for leaf in leaves}


@pytest.mark.parametrize("method", ["lora", "dora", "oft"])
def test_rows_have_adapters_of_their_own_where_a_token_is_a_row_too(
    written: Path, tmp_path: Path, method: str
) -> None:
    """Of files that have these layers, as those of diffusers' script."""
    pipe: Any = DiffusionPipeline.from_pretrained(written)
    pipe.set_progress_bar_config(disable=True)
    targets = ["re:.*layerwise_blocks.*", "re:transformer_blocks.*"]
    for seed, name in enumerate(("dog", "cat")):
        adapter = dreamtune.inject(pipe.transformer, method, seed=seed, target_modules=targets)
        disturb(adapter, seed, size=0.5)
        adapter.save(tmp_path / f"{name}.safetensors")
        adapter.eject()
    for name in ("dog", "cat"):
        dreamtune.load(pipe, tmp_path / f"{name}.safetensors", name)
    how = {"steps": 2, "guidance_scale": 4.5, "size": 16}

    def image(prompts: list[str]) -> torch.Tensor:
        return sample_tensor(pipe, prompts, [7] * len(prompts), **how)  # type: ignore[arg-type]

    alone = []
    for name in ("dog", "cat"):
        dreamtune.set_adapters(pipe, {name: 1.0})
        alone.append(image(["a dog"]))
    dreamtune.set_adapters(pipe, {})
    with dreamtune.route(pipe, ["cat", None, "dog"]):
        rows = image(["a dog"] * 3)
    for row, wanted in zip(rows, (alone[1], image(["a dog"]), alone[0]), strict=True):
        torch.testing.assert_close(row, wanted[0], rtol=0, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-3


def test_what_of_a_prompt_is_seen(written: Path) -> None:
    """512 tokens, of which the last 5 are of the template."""
    base = load_base(str(written))
    assert not base.unseen("a" * 507)
    assert "has 542 tokens, the text encoder takes 541" in base.unseen("a" * 508)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"patch_size": 4}, "`patch_size` must be 2, got 4"),
        ("model_index.json", {"is_distilled": "no"}, "`is_distilled`"),
        ("model_index.json", {"text_encoder_select_layers": [1]}, "told 2 layers .* has 1"),
        ("model_index.json", {"text_encoder_select_layers": [0, 9]}, "has layer 9, .* has 1"),
        ("transformer/config.json", {"num_text_layers": 10**9}, "`num_text_layers`"),
        ("text_encoder/config.json", {"model_type": "qwen3"}, "`model_type` must be qwen3_vl"),
    ],
)
def test_files_that_do_not_fit(
    written: Path, tmp_path: Path, file: str, values: Any, words: str
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "base"))
    edit(folder / file, **values)
    with pytest.raises(ValueError, match=words):
        load_base(str(folder))
