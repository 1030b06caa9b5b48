"""Chroma: its mask, and why its network is not checkpointed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from family_folders import write_chroma_pipeline

from dreamtune.config import Config
from dreamtune.fast.watch import why_not_recorded
from dreamtune.models.load import load_base
from dreamtune.training.run import Run


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chroma_pipeline(tmp_path_factory.mktemp("chroma"))


def test_it_is_told_one_token_that_is_filled_up(written: Path) -> None:
    base = load_base(str(written))
    mask = base.encode_prompts(["a sks dog", "a"])["prompt_attention_mask"]
    assert mask.shape == (2, 512) and set(mask.unique().tolist()) == {0.0, 1.0}
    counts = [len(base.tokenizer(prompt).input_ids) + 1 for prompt in ("a sks dog", "a")]
    assert mask.sum(1).tolist() == counts
    assert base.sampling_defaults(16).guidance_scale == 5.0 and base.rows_per_image(5.0) == 1
    assert base.unseen("a " * 300) and not base.unseen("a " * 200) and base.resolution == 256
    assert why_not_recorded(base.network) == base.uncaptured


def test_checkpointing_is_refused_for_it_changes_what_the_network_says(
    written: Path, photo_dir: Path, tmp_path: Path
) -> None:
    base = load_base(str(written))
    told = base.encode_prompts(["a sks dog"])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = base.predict(x, torch.tensor([500.0]), told)
    base.network.enable_gradient_checkpointing()
    found = base.predict(x, torch.tensor([500.0]), told)
    assert float((found - wanted).abs().max()) > 1e-3  # else it need not be refused
    run = Run(
        Config(
            pretrained_model_name_or_path=str(written), instance_data_dir=str(photo_dir),
            instance_prompt="a sks dog", output_dir=str(tmp_path / "run"), resolution=16,
            gradient_checkpointing=True,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="`gradient_checkpointing` must be off .* without"):
        run.open(base)
    run.close()


def test_parts_of_several_models(written: Path) -> None:
    base = load_base(str(written))
    about = {"id": "x", "embedded": False, "device": base.device, "dtype": base.dtype}
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=8))
    t5 = SimpleNamespace(config=SimpleNamespace(d_model=13))
    with pytest.raises(ValueError, match="takes 16 channels and gives 16, .* have 32"):
        type(base)({**base.parts, "vae": vae}, **about)
    with pytest.raises(ValueError, match="told 12 numbers a token, T5 gives 13"):
        type(base)({**base.parts, "text_encoder": t5}, **about)
