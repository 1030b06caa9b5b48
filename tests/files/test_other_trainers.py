"""LoRA files of other trainers: what is loaded is what the file says, and what stock loaders make
of it.
"""

from __future__ import annotations

import json
import random
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loras import (
    SPELLINGS,
    assert_same,
    flat,
    in_peft,
    loads_or_is_named,
    ours,
    pairs,
    products,
    spelt,
    stock,
    unet_of,
    write,
)
from tiny import images, tiny_pipeline, tiny_unet
from torch import Tensor

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.names import checkpoint_names

LoraConfig = pytest.importorskip("peft").LoraConfig
PLAIN = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling: str, tmp_path: Path) -> None:
    """Without a word on the strength it is 1; only PEFT's file, whose config is gone, is open."""
    factors = pairs()
    path = write(tmp_path, spelt(spelling, factors))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        got = ours(path)
    assert_same(got, products(factors))
    open_ = ["adapter_config.json`, which is not beside it. A strength of 1" in str(w.message)
             for w in said]  # fmt: skip
    assert open_ == ([True] if spelling == "PEFT" else [])
    if SPELLINGS[spelling][2]:
        assert_same(stock(path), got)


def mixed(path: str) -> int:
    """The ranks of the patterns in the last two of CONFIGS."""
    if path.endswith("to_q"):
        return 2
    return 8 if path.endswith("to_v") and path.startswith("down") else 4


CONFIGS: list[dict[str, Any]] = [
    {"lora_alpha": 1},
    {"lora_alpha": 12},
    {"lora_alpha": 6, "use_rslora": True},
    {"lora_alpha": 6, "alpha_pattern": {"attn1.to_k": 1, "to_k": 20}},
    {"lora_alpha": 6, "alpha_pattern": {"^mid_block.*to_v": 9, "up_.*q|to_k": 3}},
    {"lora_alpha": 6, "rank_pattern": {"to_q": 2, r"down_blocks\.\d\..*to_v": 8}},
    {
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"to_q": 2, "down_.*to_v": 8},
        "alpha_pattern": {"attn1.to_q": 5, "to_q": 7},
    },
]


def ranks(config: dict[str, Any]) -> int | Callable[[str], int]:
    return mixed if "rank_pattern" in config else 4


def header(config: dict[str, Any], prefix: str, targets: list[str] = PLAIN) -> dict[str, Any]:
    full = {**LoraConfig(r=4).to_dict(), **config, "target_modules": targets}
    return {f"{prefix}{name}": value for name, value in full.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_headers_strength(config: dict[str, Any], tmp_path: Path) -> None:
    """As diffusers' trainers keep it."""
    factors = pairs(ranks(config))
    path = write(tmp_path, spelt("diffusers", factors), header(config, "unet."))
    got = ours(path)
    assert_same(got, stock(path))
    assert any(float((got[p] - x).abs().max()) > 1e-3 for p, x in products(factors).items())


def test_the_headers_strength_without_a_prefix(tmp_path: Path) -> None:
    """As `unet.save_lora_adapter` keeps it."""
    path = write(tmp_path, spelt("without prefix", pairs(mixed)), header(CONFIGS[-1], ""))
    unet: Any = unet_of("stock")
    unet.load_lora_adapter(tmp_path, prefix=None, weight_name=path.name)
    wanted = in_peft(unet.named_modules())
    unet.unload_lora()
    assert_same(ours(path), wanted)


def alphas(factors: Any, alpha: Callable[[str], float | None]) -> dict[str, Tensor]:
    found = {f"lora_unet_{flat(p)}.alpha": alpha(p) for p in factors}
    return {k: torch.tensor(a, dtype=torch.float16) for k, a in found.items() if a is not None}


@pytest.mark.parametrize("alpha", [0.5, 12.0])
def test_kohyas_alpha(alpha: float, tmp_path: Path) -> None:
    factors = pairs()
    tensors = {**spelt("kohya", factors), **alphas(factors, lambda path: alpha)}
    path = write(tmp_path, tensors, ss_network_alpha=str(alpha), ss_network_dim="4")
    got = ours(path)
    assert_same(got, products(factors, alpha / 4))
    assert_same(got, stock(path))


def test_kohyas_alphas_and_ranks_of_their_own(tmp_path: Path) -> None:
    """alpha / r of each layer. Stock diffusers takes one alpha for all of them (0.42), so that its
    word is asked for the same file with the alphas in the factors.
    """
    rank = lambda p: 2 if "attn2" in p else 4  # noqa: E731
    alpha = lambda p: {"to_q": 1.0, "to_k": 8.0}.get(p.rpartition(".")[2], 3.0)  # noqa: E731
    factors = pairs(rank)
    got = ours(write(tmp_path, {**spelt("kohya", factors), **alphas(factors, alpha)}))
    assert_same(got, products(factors, lambda p: alpha(p) / rank(p)))
    inside = {p: (up * (alpha(p) / rank(p)), down) for p, (up, down) in factors.items()}
    assert_same(got, stock(write(tmp_path / "one", spelt("kohya", inside))))


def test_layers_without_an_alpha_among_others_are_counted(tmp_path: Path) -> None:
    factors = pairs()
    some = alphas(factors, lambda p: None if "attn2" in p else 1.0)
    path = write(tmp_path, {**spelt("kohya", factors), **some})
    with pytest.warns(UserWarning, match=r"16 of 32 layers have no alpha, `lora_unet|16 of 32"):
        got = ours(path)
    assert_same(got, products(factors, lambda p: 1.0 if "attn2" in p else 0.25))
    path = write(tmp_path, spelt("kohya", factors), ss_network_alpha="1", ss_network_dim="4")
    with pytest.warns(UserWarning, match="header has an alpha of 1, its layers have none"):
        got = ours(path)
    assert_same(got, stock(path))


SOME: list[Callable[[str], bool]] = [
    lambda p: p.endswith("to_v"),
    lambda p: "attn2" in p,
    lambda p: p.startswith("up_blocks"),
    lambda p: p.startswith("mid_block") and "attn1" in p,
]


@pytest.mark.parametrize("keep", SOME)
@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_some_layers(keep: Callable[[str], bool], spelling: str, tmp_path: Path) -> None:
    factors = pairs(keep=keep)
    path = write(tmp_path, spelt(spelling, factors))
    assert 0 < len(factors) < 32
    got = ours(path)
    assert_same(got, products(factors))
    again = dreamtune.export(path, tmp_path / "out", base=unet_of("ours"))
    assert_same(ours(again), got)
    assert_same(stock(again), stock(path))


def test_the_same_pictures(tmp_path: Path) -> None:
    """Through a pipeline, and the way back."""
    stated = header(CONFIGS[2], "unet.", [f"attn2.{name}" for name in PLAIN])
    path = write(tmp_path, spelt("processors", pairs(keep=lambda p: "attn2" in p)), stated)
    pipe = tiny_pipeline(tiny_unet())
    base = images(pipe)
    adapter = dreamtune.load(pipe, tmp_path)
    got = images(pipe)
    adapter.eject()
    assert torch.equal(images(pipe), base)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)  # type: ignore[attr-defined]
    wanted = images(pipe)
    assert float((got - wanted).abs().max()) < 1e-4 < 1e-2 < float((got - base).abs().max())


BASIC = {"unet.r": 4, "unet.lora_alpha": 1}


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({**BASIC, "unet.use_dora": True}, "DoRA: `use_dora` is set.*`pipe.load_lora_weights`"),
        ({**BASIC, "unet.lora_bias": True}, "`lora_bias` is set.*more than a low-rank change"),
        ({**BASIC, "unet.bias": "all"}, "`bias` is set"),
        ({**BASIC, "unet.init_lora_weights": "pissa_niter_4"}, "started as 'pissa_niter_4', which"),
        ({**BASIC, "unet.r": 8}, "` is of rank 4, `lora_adapter_metadata` .* says 8"),
        ({**BASIC, "unet.rank_pattern": {"attn1.to_q": 2}}, "attn1.to_q` is of rank 4, .* says 2"),
        ({**BASIC, "unet.r": "x"}, "`r` must be a whole number, got 'x'"),
        ({**BASIC, "unet.r": 10**30}, "`r` must be at most 4096"),
        ({**BASIC, "unet.lora_alpha": float("inf")}, "`lora_alpha` must be finite"),
        ({"unet.r": 4}, "`lora_alpha` is missing"),
        ({**BASIC, "unet.alpha_pattern": {"to_q": "x"}}, "`alpha_pattern` must be a number"),
        ({**BASIC, "unet.alpha_pattern": {"(": 1}}, r"the pattern `\(`: missing \)"),
        ({**BASIC, "unet.alpha_pattern": {"(a+)+$": 1}}, "may take ages to match"),
        ({**BASIC, "unet.alpha_pattern": {".*.*.*.*x": 1}}, "may take ages to match"),
        ({**BASIC, "unet.alpha_pattern": {f".*.*{i}": 1 for i in range(101)}}, "may take ages"),
        ({**BASIC, "unet.peft_type": "VERA"}, "the method is 'VERA', read are LORA"),
        ({**BASIC, "unet.peft_type": ["LORA"]}, "the method is .*LORA.*, read are LORA"),
        ([], "must hold names with values, got list"),
    ],
)
def test_what_the_header_says_is_obeyed_or_refused(
    metadata: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, spelt("diffusers", pairs()), metadata)
    unet = unet_of("ours")
    for read in (lambda: dreamtune.load(unet, path), lambda: dreamtune.export(path, "out")):
        with pytest.raises(UnreadableFile, match=f"(?s){message}") as error:
            read()
        assert path.name in str(error.value)
    assert not any("Adapted" in type(m).__name__ for m in unet.modules())


def test_header_that_is_for_another_network_or_not_known(tmp_path: Path) -> None:
    factors = pairs()
    tensors = spelt("diffusers", factors)
    path = write(tmp_path, tensors, {"text_encoder.r": 8, "text_encoder.lora_alpha": 1})
    assert_same(ours(path), products(factors))
    path = write(tmp_path, tensors, {"r": 4, "lora_alpha": 2, "rank_pattern": None})
    assert_same(ours(path), products(factors, 0.5))
    path = write(tmp_path, tensors, {**BASIC, "unet.use_new": 3, "unet.other": None})
    with pytest.warns(UserWarning, match="not known here and not applied: use_new$"):
        assert_same(ours(path), products(factors, 0.25))


def test_a_file_that_contradicts_itself(tmp_path: Path) -> None:
    factors = pairs()
    tensors = {**spelt("kohya", factors), **alphas(factors, lambda p: 1.0)}
    assert_same(ours(write(tmp_path, tensors, BASIC)), products(factors, 0.25))
    path = write(tmp_path, tensors, {**BASIC, "unet.lora_alpha": 2})
    with pytest.raises(UnreadableFile, match="a strength of 0.25 by its alpha, of 0.5 by `lora_ad"):
        dreamtune.load(unet_of("ours"), path)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"unet.{q}.lora_magnitude_vector": (32,)}, r"is a DoRA \(`unet.down.*`pipe.load_lora_w"),
        ({"unet.{q}.dora_scale": (32, 1)}, "is a DoRA"),
        ({"unet.{b}.ff.net.2.lora_A.weight": (4, 128)},
         "1 keys match no layer of the network, `down_.*ff.net.2` first"),
        ({"text_encoder.x.lora_A.weight": (4, 8)},
         "1 keys match no layer .*`text_encoder.x.*a text encoder use `pipe.load_lora_weights`"),
        ({"unet.{q}.lora_B.bias": (32,)}, "1 keys match no layer of the network, `unet.*.bias`"),
        ({"unet.{q}.lora_mid.weight": (4, 4)}, r"`mid` of `.*to_q` must be \(4, 4, kh, kw\), got"),
    ],
)  # fmt: skip
def test_more_than_a_lora_of_these_layers(
    more: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    names = {"q": f"{block}.attn1.to_q", "b": block}
    tensors = {key.format(**names): torch.ones(shape) for key, shape in more.items()}
    path = write(tmp_path, {**spelt("diffusers", pairs()), **tensors})
    for read in (
        lambda: dreamtune.load(unet_of("ours"), path),
        lambda: dreamtune.export(path, tmp_path / "out"),
    ):
        with pytest.raises(UnreadableFile, match=f"`{path.name}`.*{message}"):
            read()


def test_two_names_for_one_layer(tmp_path: Path) -> None:
    factors = pairs()
    for one, other in (("diffusers", "processors"), ("without prefix", "diffusers 0.2"),
                       ("kohya", "kohya, first names")):  # fmt: skip
        path = write(tmp_path, {**spelt(one, factors), **spelt(other, factors)})
        with pytest.raises(UnreadableFile, match="two names for one layer|has its `.*` twice"):
            dreamtune.load(unet_of("ours"), path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.bin"
    torch.save(spelt("diffusers", pairs()), path)
    with pytest.raises(UnreadableFile, match="weights.bin` is a pickle.*`pipe.load_lora_weights`"):
        dreamtune.load(unet_of("ours"), path)


def test_names_in_checkpoints_of_sd_1() -> None:
    """Two layers a block."""
    network = types.SimpleNamespace(config={"layers_per_block": 2})
    wanted = {
        "input_blocks.1.1.x": "down_blocks.0.attentions.0.x",
        "input_blocks.8.1.x": "down_blocks.2.attentions.1.x",
        "middle_block.1.x": "mid_block.attentions.0.x",
        "output_blocks.3.1.x": "up_blocks.1.attentions.0.x",
        "output_blocks.11.1.x": "up_blocks.3.attentions.2.x",
    }
    assert checkpoint_names(wanted.values(), network) == wanted  # type: ignore[arg-type]
    assert checkpoint_names(wanted.values(), None) == {}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), spelling=st.sampled_from([*SPELLINGS, "alphas", "config"]))
def test_a_file_that_fails_leaves_the_model_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, spelling: str
) -> None:
    """Damaged, edited, cast, renamed; and the file that PEFT keeps beside it."""
    rng, folder = random.Random(seed), tmp_path_factory.getbasetemp() / "damaged"
    tensors = spelt(spelling if spelling in SPELLINGS else "PEFT", pairs(2))
    stated = {"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {"to_q": 3}}
    if spelling == "alphas":
        tensors = {**spelt("kohya", pairs(2)), **alphas(pairs(2), lambda p: 1.0)}
    path = write(folder, tensors, stated if "diffusers" in spelling else None)
    beside = folder / "adapter_config.json"
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"x": 3}})
    if spelling == "config":
        beside.write_bytes(rng.choice([*damage.ANY, damage.edit_json_file])(text.encode(), rng))
    else:
        beside.write_text(text)
        path.write_bytes(rng.choice(damage.TENSORS)(path.read_bytes(), rng))
    loads_or_is_named(path)


def test_a_comfyui_file_needs_the_network(tmp_path: Path) -> None:
    path = write(tmp_path, spelt("ComfyUI", pairs()))
    with pytest.raises(ValueError, match="counts the blocks of a checkpoint.*pass it as `base`"):
        dreamtune.export(path, tmp_path / "out")
