"""Flux.1: the guidance that a distilled base is told, that of others, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from family_folders import write_flux_pipeline
from safetensors.torch import load_file, save_file

from dreamtune.models.load import load_base
from dreamtune.models.sample import sample_tensor


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux_pipeline(tmp_path_factory.mktemp("dev"))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux_pipeline(tmp_path_factory.mktemp("schnell"), guided=False)


@pytest.fixture
def folder(dev: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dev, tmp_path / "base"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def image(pipe: Any, guidance_scale: float, **more: Any) -> torch.Tensor:
    how: dict[str, Any] = {"steps": 2, "guidance_scale": guidance_scale, "size": 16, **more}
    return sample_tensor(pipe, ["a sks dog"], [0], **how)


def stock(folder: Path, **more: Any) -> torch.Tensor:
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    how = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt", **more}
    return pipe("a sks dog", generator=torch.Generator().manual_seed(0), **how).images  # type: ignore[no-any-return]


def test_dev_is_told_its_guidance(dev: Path) -> None:
    """3.5, the pipeline's own, in pictures; 1 in training, whatever that of the pictures is."""
    base = load_base(str(dev))
    assert base.sampling_defaults(16).guidance_scale == 3.5 and base.rows_per_image(3.5) == 1
    assert base.guidance_options(3.5) == {"guidance_scale": 3.5}
    pipe = base.pipeline()
    assert torch.equal(image(pipe, 3.5), stock(dev))
    assert float((image(pipe, 3.5) - image(pipe, 1.0)).abs().max()) > 1e-5

    told = []
    base.network.register_forward_pre_hook(
        lambda module, given, named: told.append(named["guidance"]), with_kwargs=True
    )
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    base.predict(x, torch.tensor([100.0, 900.0]), base.encode_prompts(["a", "a sks dog"]))
    assert told[0].tolist() == [1.0, 1.0]


def test_dev_has_no_negative_prompts(dev: Path) -> None:
    base = load_base(str(dev))
    pipe = base.pipeline()
    assert not base.takes_negatives
    with pytest.raises(ValueError, match="no negative prompt for a base that is told .* 'a cat'"):
        image(pipe, 3.5, negative_prompts=["a cat"])
    assert torch.equal(image(pipe, 3.5, negative_prompts=[""]), image(pipe, 3.5))


def test_schnell_is_guided_away_from_a_prompt_where_asked(schnell: Path) -> None:
    base = load_base(str(schnell))
    assert base.sampling_defaults(16).guidance_scale == 1.0 and base.takes_negatives
    assert base.guidance_options(1.0) == {"true_cfg_scale": 1.0}
    assert base.guidance_options(4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
    pipe, arguments = base.pipeline(), base.sampling_arguments(["a sks dog"])
    plain, guided, away = (
        image(pipe, 1.0), image(pipe, 4.0), image(pipe, 4.0, negative_prompts=["a cat"]),
    )  # fmt: skip
    assert torch.equal(plain, stock(schnell))
    assert torch.equal(guided, stock(schnell, true_cfg_scale=4.0, negative_prompt=" "))
    assert torch.equal(away, stock(schnell, true_cfg_scale=4.0, negative_prompt="a cat"))
    assert torch.equal(image(pipe, 4.0, negative_prompts=[""]), guided)
    for scale, wanted in ((1.0, plain), (4.0, guided)):
        assert torch.equal(image(pipe, scale, arguments=arguments), wanted)
    pairs = ((plain, guided), (guided, away))
    assert all(float((x - y).abs().max()) > 1e-5 for x, y in pairs)


@pytest.mark.parametrize("kind", ["FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline"])
def test_a_kindred_pipeline_is_refused(folder: Path, kind: str) -> None:
    edit(folder / "model_index.json", _class_name=kind)
    with pytest.raises(ValueError, match=rf"is a {kind}, which is none of .*Flux.1 \(FluxPipeli"):
        load_base(str(folder))


def test_a_transformer_that_is_told_a_picture_is_refused(folder: Path) -> None:
    """As those of Fill and Control, which other pipelines have, in a folder of this one."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    wide = torch.cat([tensors["x_embedder.weight"]] * 2, 1)
    save_file({**tensors, "x_embedder.weight": wide}, file, {"format": "pt"})
    edit(folder / "transformer" / "config.json", in_channels=32, out_channels=16)
    with pytest.raises(ValueError, match="takes 32 channels and gives 16, .* have 16: .*Fill"):
        load_base(str(folder))


def test_parts_of_several_models(dev: Path) -> None:
    base = load_base(str(dev))
    about = {"id": "x", "embedded": False, "device": base.device, "dtype": base.dtype}
    clip = SimpleNamespace(config=SimpleNamespace(hidden_size=11))
    t5 = SimpleNamespace(config=SimpleNamespace(d_model=13))
    with pytest.raises(ValueError, match="told 10 numbers of pooled text, .* gives 11"):
        type(base)({**base.parts, "text_encoder": clip}, **about)
    with pytest.raises(ValueError, match="told 12 numbers a token, T5 gives 13"):
        type(base)({**base.parts, "text_encoder_2": t5}, **about)


def test_prompts_are_as_long_as_t5_has_them(dev: Path) -> None:
    base = load_base(str(dev))
    assert base.encode_prompts(["a"])["prompt_embeds"].shape == (1, 512, 12)
    assert base.unseen("a " * 300) and not base.unseen("a " * 200) and base.resolution == 256
