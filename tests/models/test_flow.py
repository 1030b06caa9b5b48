"""Flow matching: its table, draws and loss, and what a base of it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_klein_pipeline, write_sd3_pipeline, write_z_image_pipeline
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling

from dreamtune.config import Config
from dreamtune.fast.fuse import compile_blocks
from dreamtune.models.flow import FlowMatching
from dreamtune.models.load import FAMILIES, load_base
from dreamtune.models.sample import sample_tensor
from dreamtune.training.speed import Speed, not_captured

EVERY = torch.linspace(0, 1 - 1e-4, 10_000)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd3_pipeline(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "base"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(("shift", "dynamic"), [(1.0, False), (3.0, False), (3.0, True)])
def test_timesteps_are_those_of_the_schedulers_table(shift: float, dynamic: bool) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    t = FlowMatching.of(scheduler, "uniform").timesteps((torch.arange(1000) + 0.5) / 1000)
    assert torch.equal(t, scheduler.timesteps)


def test_draws_are_logit_normal() -> None:
    """Ten thousand even draws, against as many of diffusers' own."""
    found = FlowMatching(density="logit_normal").timesteps(EVERY) / 1000
    assert found.max() == 1.0 and found.min() >= 0.001
    own = compute_density_for_timestep_sampling(
        "logit_normal", 10_000, 0.0, 1.0, generator=torch.Generator().manual_seed(0)
    )
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(
        found.quantile(shares), (1 - own).quantile(shares), rtol=0, atol=0.012
    )
    even = FlowMatching().timesteps(EVERY) / 1000
    torch.testing.assert_close(even.quantile(shares), shares, rtol=0, atol=2e-3)


def test_the_loss_is_that_of_the_picture_where_asked() -> None:
    g = torch.Generator().manual_seed(0)
    x, noise, said = torch.randn(3, 5, 2, 4, 4, generator=g, dtype=torch.float64)
    process = FlowMatching(shift=3.0, of_picture=True)
    t = process.timesteps(torch.tensor([0.0, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64))
    sigma = (t / 1000).view(-1, 1, 1, 1)
    noisy = process.noised(x, noise, t)
    torch.testing.assert_close(noisy, x + sigma * (noise - x))
    weight = process.weight(t)
    assert weight is not None and FlowMatching().weight(t) is None
    ours = weight * (said - process.target(x, noise, t)).square().mean((1, 2, 3))
    torch.testing.assert_close(ours, (noisy - sigma * said - x).square().mean((1, 2, 3)))


def test_what_a_base_of_flow_matching_refuses(folder: Path) -> None:
    base = load_base(str(folder))
    with pytest.raises(ValueError, match="`sampler` must be base for Stable Diffusion 3.*dpm"):
        base.scheduler_for("dpm++")
    with pytest.raises(ValueError, match="`snr_gamma` must be left out .* got 5"):
        base.process(5.0)
    with pytest.raises(ValueError, match="`resolution` must be a multiple of 16, got 24"):
        base.check_side(24)
    with pytest.raises(ValueError, match="`resolution` must be at most 32, .* got 48"):
        base.check_side(48)
    with pytest.raises(ValueError, match="`prediction_type` must be left out"):
        load_base(str(folder), prediction_type="epsilon")


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (SCHEDULER, {"invert_sigmas": True}, "`invert_sigmas`"),
        (SCHEDULER, {"stochastic_sampling": True}, "`stochastic_sampling`"),
        (SCHEDULER, {"shift": -1.0}, "`shift`"),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "must be diffusers.Fl"),
        ("model_index.json", {"text_encoder": [None, None]}, "text_encoder"),
        ("model_index.json", {"text_encoder_3": [None, None]}, "text_encoder_3 and tokenizer_3"),
        ("model_index.json", {"tokenizer_3": ["transformers", "X"]}, "T5TokenizerFast"),
        ("text_encoder_3/config.json", {"model_type": "umt5"}, "`model_type`"),
        ("text_encoder_3/config.json", {"vocab_size": 9}, "text_encoder_3"),
        ("transformer/config.json", {"pooled_projection_dim": 11}, "transformer"),
    ],
)
def test_files_that_do_not_fit(folder: Path, file: str, values: Any, words: str) -> None:
    edit(folder / file, **values)
    with pytest.raises(ValueError, match=words):
        load_base(str(folder))


def test_without_t5_as_with_it(folder: Path) -> None:
    """Embeddings and picture are those of the pipeline bit for bit, of a prompt of any length."""
    prompts = ["a sks dog", "a " * 30]
    none: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    for more in ({}, none):
        if more:
            edit(folder / "model_index.json", **dict.fromkeys(none, [None, None]))
        base = load_base(str(folder))
        assert bool(base.unseen(prompts[1])) == bool(more) and not base.unseen(prompts[0])
        first = base.call_arguments(prompts)
        base.let_encoders_go()
        found = base.call_arguments(prompts)  # read once more
        stock: Any = StableDiffusion3Pipeline.from_pretrained(folder, **more)
        with torch.no_grad():
            theirs = stock.encode_prompt(prompts, None, None)
        for name, x in zip(base.told, theirs, strict=True):  # type: ignore[attr-defined]
            assert torch.equal(found[name], x) and torch.equal(first[name], x), name  # type: ignore
    tokens = base.encode_prompts(prompts)["prompt_embeds"]
    assert tokens.shape == (2, 16 + 256, 24) and not tokens[:, 16:].any()


def test_text_encoders_wait_in_bf16_beside_a_network_in_half_precision(folder: Path) -> None:
    base = load_base(str(folder), dtype=torch.float16)
    kinds = {name: next(x.parameters()).dtype for name, x in base.encoders().items()}
    assert set(kinds.values()) == {torch.bfloat16}
    assert base.vae.dtype == torch.float32 and base.network.dtype == torch.float16
    base.let_encoders_go()
    assert base.text_encoder_3.dtype == torch.bfloat16


def test_the_blocks_that_are_compiled(folder: Path) -> None:
    assert compile_blocks(load_base(str(folder)).network) == 2


def test_z_image_is_recorded_where_prompts_are_equally_long(tmp_path: Path) -> None:
    base = load_base(str(write_z_image_pipeline(tmp_path / "base")))
    told = base.encode_prompts(["a sks dog", "a"])
    assert told["prompt_tokens"].tolist() == [18, 10] and told["prompt_embeds"].shape == (2, 18, 12)
    assert not told["prompt_embeds"][1, 10:].any()
    assert [base.rows_per_image(scale) for scale in (0.0, 0.5, 5.0)] == [1, 2, 2]
    assert base.unseen("a " * 300) and not base.unseen("a " * 200)
    with pytest.raises(ValueError, match="`resolution` must be at most 64, .* got 80"):
        base.check_side(80)
    speed, why = Speed(True, False, False, {}), base.why_not_captured(base.for_step(told))
    slower = not_captured(speed, why, Config(capture="auto"))
    assert not slower.captured and list(slower.notes(torch.device("cuda")))[0] == (
        "Steps are not captured: the network is told on the host how long a prompt is, and these "
        "have 10 and 18 tokens."
    )
    with pytest.raises(ValueError, match="`capture` is on, but the network is told on the host"):
        not_captured(speed, why, Config(capture="on"))
    alike = base.for_step(base.encode_prompts(["a sks dog", "a sks dog"]))
    assert alike.keys() == {"prompt_embeds"} and alike["prompt_embeds"].shape == (2, 18, 12)
    assert not base.why_not_captured(alike) and not_captured(speed, "", Config()).captured
    x, t = torch.randn(2, base.transformer.config.in_channels, 2, 2), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        both = base.encode_prompts(["a sks dog", "a sks dog"])
        torch.testing.assert_close(base.predict(x, t, alike), base.predict(x, t, both))
    edit(tmp_path / "base" / "transformer" / "config.json", cap_feat_dim=13)
    with pytest.raises(ValueError, match="transformer"):
        load_base(str(tmp_path / "base"))


def test_klein_is_guided_by_a_forward_of_its_own(tmp_path: Path) -> None:
    """Negative prompts go in as embeddings; a distilled base has no guidance."""
    folder = write_klein_pipeline(tmp_path / "base")
    base = load_base(str(folder))
    assert base.rows_per_image(4.0) == 1 and base.sampling_defaults(64).guidance_scale == 4.0
    how: dict[str, Any] = {"steps": 2, "guidance_scale": 4.0, "size": 16}
    pipe = base.pipeline()
    plain, empty, other = (
        sample_tensor(pipe, ["a dog"], [0], negative_prompts=negative, **how)
        for negative in (None, [""], ["a cat"])
    )
    assert torch.equal(plain, empty) and float((plain - other).abs().max()) > 1e-5
    edit(folder / "model_index.json", is_distilled=True)
    assert load_base(str(folder)).sampling_defaults(64).guidance_scale == 1.0
    edit(folder / "transformer" / "config.json", joint_attention_dim=15)
    with pytest.raises(ValueError, match="transformer"):
        load_base(str(folder))


@pytest.mark.parametrize(
    "kind",
    [
        "SanaPipeline", "Lumina2Pipeline", "AuraFlowPipeline", "PixArtSigmaPipeline",
        "HiDreamImagePipeline", "Flux2Pipeline", "QwenImage21Pipeline", "CogView4Pipeline",
    ],
)  # fmt: skip
def test_another_family_is_refused_with_the_names_of_those_that_are_here(
    kind: str, folder: Path
) -> None:
    edit(folder / "model_index.json", _class_name=kind)
    names = ".*".join(family.pipelines[0] for family in FAMILIES)
    with pytest.raises(ValueError, match=f"is a {kind}, which is none of .*{names}"):
        load_base(str(folder))
