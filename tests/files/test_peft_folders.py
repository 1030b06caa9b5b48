"""Folders that PEFT itself saved, next to the model that it saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import assert_same, in_peft, ours, stock, unet_of
from tiny import tiny_unet, unet_inputs
from torch import Tensor

import dreamtune
from dreamtune.fields import UnreadableFile
from dreamtune.files.find import adapter_file

peft = pytest.importorskip("peft")
PLAIN = ["to_q", "to_k", "to_v", "to_out.0"]


def saved(folder: Path, config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the changes of a PEFT model that is saved there."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_unet(), config)
    model.save_pretrained(folder)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    with torch.no_grad():
        output = model(*unet_inputs(2)).sample
    return output, in_peft(model.base_model.model.named_modules())


CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8},
    {"r": 16, "lora_alpha": 4, "target_modules": ["attn2.to_k", "attn2.to_v"]},
    {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"to_q": 2, "mid_block.*to_v": 6},
        "alpha_pattern": {"attn1.to_q": 5, "up_blocks.*to_k": 7},
    },
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_is_loaded_and_exported(config: dict[str, Any], tmp_path: Path) -> None:
    settings = {"target_modules": PLAIN, **config}
    output, wanted = saved(tmp_path / "p", peft.LoraConfig(init_lora_weights=False, **settings))
    assert adapter_file(tmp_path / "p").name == "adapter_model.safetensors"
    assert_same(ours(tmp_path / "p"), wanted)
    unet = unet_of("ours")
    adapter = dreamtune.load(unet, tmp_path / "p")
    with torch.no_grad():
        torch.testing.assert_close(unet(*unet_inputs(2)).sample, output, rtol=0, atol=1e-5)
    adapter.eject()
    for format in ("diffusers", "kohya"):
        path = dreamtune.export(tmp_path / "p", tmp_path / format, format, base=unet)
        assert_same(stock(path), wanted)
    alone = dreamtune.export(tmp_path / "p", tmp_path / "alone")
    assert_same(stock(alone), wanted)


def test_the_config_is_obeyed_or_the_folder_refused(tmp_path: Path) -> None:
    saved(tmp_path / "p", peft.LoraConfig(r=4, init_lora_weights=False, target_modules=PLAIN))
    config = tmp_path / "p" / "adapter_config.json"
    values = json.loads(config.read_text())
    for edit, message in (
        ({"r": 8}, "is of rank 4, `adapter_config.json` beside it says 8"),
        ({"use_dora": True}, "32 layers lack keys, `down_blocks"),
        ({"lora_bias": True}, "`adapter_config.json` beside it: `lora_bias` is set"),
        ({"peft_type": "BOFT"}, "`adapter_config.json` beside it: the method is 'BOFT', read are"),
        ({"peft_type": "OFT"}, "`base_model.model.down_blocks.*` matches no linear layer"),
        ({"init_lora_weights": "olora"}, "started as 'olora'"),
        ({"lora_alpha": None}, "`lora_alpha` cannot be empty"),
    ):
        config.write_text(json.dumps({**values, **edit}))
        with pytest.raises(UnreadableFile, match=f"(?s)`adapter_model.safetensors`.*{message}"):
            dreamtune.load(unet_of("ours"), tmp_path / "p")
    for text, message in (("{", "is not JSON"), ("[]", "must hold names with values, got list"),
                          (" " * (1 << 20) + "{}", "has more than 1048576 bytes")):  # fmt: skip
        config.write_text(text)
        with pytest.raises(UnreadableFile, match=f"(?s)`adapter_model.safetensors`.*{message}"):
            dreamtune.load(unet_of("ours"), tmp_path / "p")


def test_a_file_elsewhere_is_not_judged_by_a_config_of_peft(tmp_path: Path) -> None:
    """A LoRA of diffusers that lies in PEFT's folder."""
    _, wanted = saved(
        tmp_path / "p", peft.LoraConfig(r=4, init_lora_weights=False, target_modules=PLAIN)
    )
    lora = dreamtune.export(tmp_path / "p", tmp_path / "d")
    values = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    (tmp_path / "d" / "adapter_config.json").write_text(json.dumps({**values, "r": 99}))
    assert_same(ours(lora), wanted)
    shutil.move(tmp_path / "p" / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    with pytest.warns(UserWarning, match="`adapter_config.json`, which is not beside it. A str"):
        alone = ours(tmp_path / "alone.safetensors")
    assert_same(alone, {path: change / 2 for path, change in wanted.items()})
