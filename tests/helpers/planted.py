"""Models whose files ask for code: each plant writes a marker if that code ever runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

CODE = "from pathlib import Path\nPath({marker!r}).write_text(__name__)\n"
CLASSES = """
from transformers import BertModel, BertConfig, CLIPTokenizer
class Evil(BertModel): pass
class EvilConfig(BertConfig): model_type = "evil"
class EvilTokenizer(CLIPTokenizer): pass
"""


def edit(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, **changes}))


def write_code(folder: Path, marker: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("evil.py",):
        (folder / name).write_text(CODE.format(marker=str(marker)) + CLASSES)


class Call:
    """Pickles as a call that writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def pickled(folder: Path, marker: Path, tensors: str, name: str) -> None:
    """The weights of a folder as a .bin with a call in it."""
    import torch

    state: dict[str, Any] = dict(load_file(folder / tensors))
    (folder / tensors).unlink()
    torch.save({**state, "x": Call(marker)}, folder / name, pickle_module=pickle)


AUTO = {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
TOKENS = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
MODULES = ("torch.py", "transformers.py", "scipy.py", "unet.py", "pipeline.py", "tokenizer.py")
DIFFUSERS = "diffusion_pytorch_model"


def base_plants() -> dict[str, Callable[[Path, Path], None]]:
    """Name -> what it does to a base's folder, and its marker."""

    def auto(part: str, file: str, wish: dict[str, Any]) -> Callable[[Path, Path], None]:
        def plant(base: Path, marker: Path) -> None:
            write_code(base / part, marker)
            edit(base / part / file, auto_map=wish)

        return plant

    def foreign(part: str, library: str, name: str) -> Callable[[Path, Path], None]:
        def plant(base: Path, marker: Path) -> None:
            write_code(base, marker, f"{library}.py")
            write_code(base / part, marker, f"{library}.py")
            edit(base / "model_index.json", **{part: [library, name]})

        return plant

    def binary(part: str, tensors: str, name: str) -> Callable[[Path, Path], None]:
        return lambda base, marker: pickled(base / part, marker, tensors, name)

    def pipeline(base: Path, marker: Path) -> None:
        write_code(base, marker, "pipeline.py", "evil.py")
        edit(base / "model_index.json", _class_name=["pipeline", "Evil"])

    def custom(base: Path, marker: Path) -> None:
        write_code(base, marker, "pipeline.py", "evil.py")
        edit(base / "model_index.json", custom_pipelines={"evil": {"py": "pipeline.py"}})

    def beside(base: Path, marker: Path) -> None:
        for part in ("", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            write_code(base / part, marker, *MODULES)

    def adapter(base: Path, marker: Path) -> None:
        other = base / "other"
        shutil.copytree(base / "text_encoder", other)
        pickled(other, marker, "model.safetensors", "pytorch_model.bin")
        edit(
            base / "text_encoder/adapter_config.json",
            peft_type="LORA", base_model_name_or_path=str(other),
        )  # fmt: skip

    def shard(base: Path, marker: Path) -> None:
        unet, other = base / "unet", base / "other"
        shutil.copytree(unet, other)
        pickled(other, marker, f"{DIFFUSERS}.safetensors", "x.bin")
        names = dict.fromkeys(load_file(unet / f"{DIFFUSERS}.safetensors"), "../other/x.bin")
        (unet / f"{DIFFUSERS}.safetensors").unlink()
        edit(unet / f"{DIFFUSERS}.safetensors.index.json", metadata={}, weight_map=names)

    def kernel(base: Path, marker: Path) -> None:
        write_code(base / "evil" / "kernel", marker, "__init__.py")
        edit(base / "text_encoder/config.json", _attn_implementation=str(base / "evil/kernel"))

    def quantised(base: Path, marker: Path) -> None:
        write_code(base, marker, "evil.py")
        edit(base / "unet/config.json", quantization_config={"quant_method": "evil"})

    weights = f"{DIFFUSERS}.safetensors"
    return {
        "auto_map of the scheduler": auto("scheduler", "scheduler_config.json", AUTO),
        "auto_map of the tokenizer": auto("tokenizer", "tokenizer_config.json", TOKENS),
        "auto_map of the text encoder": auto("text_encoder", "config.json", AUTO),
        "auto_map of the UNet": auto("unet", "config.json", AUTO),
        "auto_map of the VAE": auto("vae", "config.json", AUTO),
        "scheduler of a module beside": foreign("scheduler", "evil", "Evil"),
        "tokenizer of a module beside": foreign("tokenizer", "evil", "EvilTokenizer"),
        "text encoder of a module beside": foreign("text_encoder", "evil", "Evil"),
        "UNet of a module beside": foreign("unet", "unet", "Evil"),
        "VAE of a module beside": foreign("vae", "evil", "Evil"),
        "custom pipeline as the class": pipeline,
        "custom pipelines listed": custom,
        "modules of known names beside": beside,
        "pickle of the UNet": binary("unet", weights, f"{DIFFUSERS}.bin"),
        "pickle of the VAE": binary("vae", weights, f"{DIFFUSERS}.bin"),
        "pickle of the text encoder": binary(
            "text_encoder", "model.safetensors", "pytorch_model.bin"
        ),
        "adapter on another model": adapter,
        "shards elsewhere": shard,
        "attention kernel": kernel,
        "quantizer": quantised,
    }


def dino_plants() -> dict[str, Callable[[Path, Path], None]]:
    def known(folder: Path, marker: Path) -> None:
        write_code(folder, marker)
        edit(folder / "config.json", auto_map=AUTO)

    def unknown(folder: Path, marker: Path) -> None:
        write_code(folder, marker)
        edit(folder / "config.json", auto_map=AUTO, model_type="evil", trust_remote_code=True)

    def binary(folder: Path, marker: Path) -> None:
        pickled(folder, marker, "model.safetensors", "pytorch_model.bin")

    return {"auto_map": known, "unknown type": unknown, "pickle": binary}


def clip_plants() -> dict[str, Callable[[Path, Path], None]]:
    def config(folder: Path, **text: Any) -> None:
        path = folder / "open_clip_config.json"
        found = json.loads(path.read_text())
        found["model_cfg"]["text_cfg"] |= text
        path.write_text(json.dumps(found))

    def granted(folder: Path, marker: Path) -> None:
        write_code(folder, marker)
        config(folder, tokenizer_kwargs={"trust_remote_code": True})
        edit(folder / "tokenizer_config.json", auto_map=TOKENS, tokenizer_class="EvilTokenizer")

    def asked(folder: Path, marker: Path) -> None:
        write_code(folder, marker)
        edit(folder / "tokenizer_config.json", auto_map=TOKENS, tokenizer_class="EvilTokenizer")

    def of_config(folder: Path, marker: Path) -> None:
        write_code(folder, marker)
        edit(folder / "config.json", auto_map={**AUTO, **TOKENS}, model_type="evil")
        (folder / "tokenizer_config.json").unlink()

    def tower(folder: Path, marker: Path) -> None:
        other = folder / "other"
        write_code(other, marker)
        edit(other / "config.json", auto_map=AUTO, model_type="evil")
        config(folder, hf_model_name=str(other))

    def binary(folder: Path, marker: Path) -> None:
        pickled(folder, marker, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")

    return {
        "trust in tokenizer_kwargs": granted,
        "tokenizer's auto_map": asked,
        "auto_map of config.json": of_config,
        "text tower elsewhere": tower,
        "pickle": binary,
    }
