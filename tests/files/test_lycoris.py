"""LoHa and LoKr of LyCORIS: the change of a file is that of the formula, written out."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import damage
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loras import (
    assert_same,
    flat,
    in_peft,
    loads_or_is_named,
    ours,
    stock,
    targets,
    unet_of,
    write,
)
from tiny import tiny_unet, unet_inputs
from torch import Tensor

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.lycoris import as_factors, hadamard, kronecker

File = tuple[dict[str, Tensor], dict[str, Tensor]]  # tensors of a file; module path -> change


def loha(prefix: str = "lora_unet_", rank: int = 2, alpha: float | None = 1.0) -> File:
    g = torch.Generator().manual_seed(1)
    tensors, changes = {}, {}
    for path, layer in targets().items():
        out, width, own = layer.out_features, layer.in_features, {}
        for name, shape in (("w1_a", (out, rank)), ("w1_b", (rank, width)),
                            ("w2_a", (out, rank)), ("w2_b", (rank, width))):  # fmt: skip
            own[name] = torch.randn(shape, generator=g)
            tensors[f"{prefix}{flat(path)}.hada_{name}"] = own[name]
        if alpha is not None:
            tensors[f"{prefix}{flat(path)}.alpha"] = torch.tensor(alpha)
        one, two = torch.zeros(2, out, width, dtype=torch.float64)
        for r in range(rank):
            one += own["w1_a"][:, r, None].double() * own["w1_b"][r].double()
            two += own["w2_a"][:, r, None].double() * own["w2_b"][r].double()
        changes[path] = (1.0 if alpha is None else alpha / rank) * one * two
    return tensors, changes


def lokr(prefix: str = "lora_unet_", rank: int = 2, alpha: float = 1.0, both: bool = False) -> File:
    """Of 4 x 4 blocks; their arrangement is a product too where `both`."""
    g = torch.Generator().manual_seed(2)
    tensors, changes = {}, {}
    for path, layer in targets().items():
        height, width = layer.out_features // 4, layer.in_features // 4
        parts = {"w2_a": (height, rank), "w2_b": (rank, width)}
        parts |= {"w1_a": (4, rank), "w1_b": (rank, 4)} if both else {"w1": (4, 4)}
        own = {name: torch.randn(shape, generator=g) for name, shape in parts.items()}
        tensors |= {f"{prefix}{flat(path)}.lokr_{name}": t for name, t in own.items()}
        tensors[f"{prefix}{flat(path)}.alpha"] = torch.tensor(alpha)
        arrangement = own["w1_a"] @ own["w1_b"] if both else own["w1"]
        block = (own["w2_a"] @ own["w2_b"]).double()
        change = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        for row in range(4):
            for column in range(4):
                place = change[row * height : (row + 1) * height, column * width :]
                place[:, :width] = alpha / rank * float(arrangement[row, column]) * block
        changes[path] = change
    return tensors, changes


FILES: dict[str, File] = {
    "LoHa": loha(),
    "LoHa, weak": loha(alpha=0.25),
    "LoHa without alpha": loha(rank=3, alpha=None),
    "LoHa around a model": loha("lycoris_", alpha=4.0),
    "LoKr": lokr(alpha=3.0),
    "LoKr of products": lokr("lycoris_", rank=1, both=True),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_change_is_the_formulas(kind: str, tmp_path: Path) -> None:
    tensors, changes = FILES[kind]
    path = write(tmp_path, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(ours(path), changes)
    if kind in ("LoHa", "LoKr"):
        assert_same(stock(dreamtune.export(path, tmp_path / "out", base=unet_of("ours"))), changes)


@pytest.mark.parametrize(
    "config",
    [
        ("LoHaConfig", {"r": 3, "alpha": 5}),
        ("LoHaConfig", {"r": 2, "alpha": 1, "rank_pattern": {"to_q": 4},
                        "alpha_pattern": {"to_v": 8}}),
        ("LoKrConfig", {"r": 2, "alpha": 6}),
        ("LoKrConfig", {"r": 1, "alpha": 6, "decompose_both": True, "decompose_factor": 4}),
    ],
)  # fmt: skip
def test_folders_of_peft(config: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """The scale is PEFT's too, alpha over the rank that is stated."""
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(1)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    method = getattr(peft, config[0])(target_modules=names, init_weights=False, **config[1])
    model = peft.get_peft_model(tiny_unet(), method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada" in name or "lokr" in name:
                parameter.normal_(0, 0.4)
        output = model(*unet_inputs(1)).sample
    model.save_pretrained(tmp_path)
    assert_same(ours(tmp_path), in_peft(model.base_model.model.named_modules()))
    adapter = dreamtune.load(unet_of("ours"), tmp_path)
    with torch.no_grad():
        got = unet_of("ours")(*unet_inputs(1)).sample
    adapter.eject()
    torch.testing.assert_close(got, output, rtol=0, atol=1e-4)


def test_the_factors_alone() -> None:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    one, other = (draw(7, 2), draw(2, 5)), (draw(7, 3), draw(3, 5))
    up, down = hadamard(one, other)
    assert up.shape == (7, 6) and down.shape == (6, 5)
    torch.testing.assert_close(up @ down, (one[0] @ one[1]) * (other[0] @ other[1]))
    up, down = kronecker(one, (draw(3, 1), draw(1, 4)))
    assert up.shape == (21, 2) and down.shape == (2, 20)
    for shape in ((3, 5), (5, 3)):
        whole = draw(*shape)
        up, down = as_factors(whole)
        assert up.shape[1] == 3 and torch.equal(up @ down, whole)


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    "kind, edit, message",
    [
        ("LoHa", {f"{LAYER}.hada_w1_a": (32, 3), f"{LAYER}.hada_w1_b": (3, 32)},
         r"its two matrices must be of one rank, got \[3, 2\]"),
        ("LoHa", {f"{LAYER}.hada_w1_a": (31, 2)}, r"must be of one shape, got \[\(31, 32\), \(32,"),
        ("LoHa", {f"{LAYER}.hada_w1_a": (32, 3)}, r"hada_w1_a \(32, 3\) and hada_w1_b \(2, 32\)"),
        ("LoHa", {f"{LAYER}.hada_t1": (2, 2, 3, 3)}, "1 keys match no layer .*attn1_to_q` first"),
        ("LoHa", {f"{LAYER}.alpha": (2,)}, "`alpha` of .* must be one finite number"),
        ("LoHa", {f"{LAYER}.lora_up.weight": (32, 2)}, "1 keys match no layer of the network"),
        ("LoHa", {"lora_unet_conv_in.hada_w1_a": (4, 2)}, "1 keys match no layer of the network"),
        ("LoHa", {f"{LAYER}.dora_scale": (32, 1)}, "it is a DoRA"),
        ("LoKr", {f"{LAYER}.lokr_w1": (5, 4)}, r"to_q` is \(32, 32\) here and \(40, 32\) in the f"),
        ("LoKr", {f"{LAYER}.lokr_w1_a": (4, 2)}, "1 keys match no layer of the network"),
        ("LoKr", {f"{LAYER}.lokr_w1": (4,)}, r"`lokr_w1` of .* or a kernel, got shape \(4,\)"),
        ("LoKr", {f"{LAYER}.lokr_w2_a": (8, 9), f"{LAYER}.lokr_w2_b": (9, 8)},
         r"its LOKR may change the layer of 32 by 32 at a rank of 36, which is no low rank"),
    ],
)  # fmt: skip
def test_what_is_no_such_change(
    kind: str, edit: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    more = {key: torch.ones(shape) for key, shape in edit.items()}
    path = write(tmp_path, {**FILES[kind][0], **more})
    with pytest.raises(UnreadableFile, match=f"`{path.name}`.*{message}"):
        dreamtune.load(unet_of("ours"), path)


def test_what_is_of_full_rank(tmp_path: Path) -> None:
    path = write(tmp_path, loha(rank=5)[0])
    with pytest.raises(UnreadableFile, match="by 32 at a rank of 25, which is no low|by 24 at a r"):
        dreamtune.load(unet_of("ours"), path)
    whole = {k.replace("w2_a", "w2"): torch.ones(8, 8) for k in FILES["LoKr"][0] if "w2_a" in k}
    whole |= {k: t for k, t in FILES["LoKr"][0].items() if "w2" not in k}
    with pytest.raises(UnreadableFile, match="at a rank of 32, which is no low rank. Use the tool"):
        dreamtune.load(unet_of("ours"), write(tmp_path, whole))


def test_a_lokr_of_whole_matrices_has_a_strength_of_1(tmp_path: Path) -> None:
    """LyCORIS does not look at its alpha there."""
    tensors, changes = {}, {}
    for path, layer in targets().items():
        column = torch.linspace(-1, 1, layer.out_features)[:, None]
        row = torch.linspace(1, 2, layer.in_features)[None]
        name = f"lora_unet_{flat(path)}"
        tensors |= {f"{name}.lokr_w1": column, f"{name}.lokr_w2": row}
        tensors[f"{name}.alpha"] = torch.tensor(7.0)
        changes[path] = column.double() @ row.double()
    assert_same(ours(write(tmp_path, tensors)), changes)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(list(FILES)))
def test_a_file_that_fails_leaves_the_model_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str
) -> None:
    rng = random.Random(seed)
    path = write(tmp_path_factory.getbasetemp() / "lycoris", FILES[kind][0])
    path.write_bytes(rng.choice(damage.TENSORS)(path.read_bytes(), rng))
    loads_or_is_named(path)
