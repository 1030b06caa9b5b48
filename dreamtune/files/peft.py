"""A folder of PEFT: `base_model.model.<module path>.lora_A.weight`, with its settings beside it; of
a method that PEFT has its own tensors, of the others their exact low-rank change.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dreamtune.adapters import find_method
from dreamtune.fields import UnreadableFile, from_json
from dreamtune.files import peft_read
from dreamtune.files.formats import Change, LayerFactors, Prefixes
from dreamtune.files.lora import PlainLora, cast, check_low_rank, in_peft_words
from dreamtune.files.names import PEFT, exact_names
from dreamtune.files.peft_forms import Form, form_of, tensors_of
from dreamtune.files.stated import Stated, stated
from dreamtune.files.tensors import TensorFile, hash_of_json, holds, other_contents, write_new
from dreamtune.files.whole import whole
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.models.load import prefixes_for

CONFIG = "adapter_config.json"
LIMIT = 1 << 20  # bytes
SETTINGS = "settings"  # in our header: a hash of what `CONFIG` said
VERSION = "0.18.0"  # of PEFT: the first that reads all of what is written here


class Peft(PlainLora):
    """The tensors; `CONFIG` lies beside them."""

    file_name = "adapter_model.safetensors"

    def check(self, change: Change) -> str:
        if (form := form_of(change)) is not None:
            return f"PEFT's own {form.name}"
        if change.file.parts and not find_method(change.file.method).low_rank:
            path, parts = next(iter(change.file.parts.items()))
            raise ValueError(
                f"`{change.file.method}` acts on the parts {', '.join(parts)} of `{path}` each for"
                " itself, and PEFT's on the whole layer: use the native file with"
                " `dreamtune.load`, or export it as `merged`"
            )
        check_low_rank(change)
        return "a plain LoRA"

    def needs_base(self, change: Change) -> str:
        form = form_of(change)
        if form is not None and not form.takes_weight:
            return ""
        return super().needs_base(change)

    def usage(self, path: Path, change: Change) -> str:
        network = prefixes_for(change.file.shapes).peft.rstrip(".")
        return (
            "from peft import PeftModel\n\n"
            f"model = PeftModel.from_pretrained(pipe.{network}, {path.parent.name!r})"
        )

    def tensors(self, factors: LayerFactors, change: Change) -> dict[str, Tensor]:
        return in_peft_words(factors, PEFT)

    def write(self, path: Path, change: Change, overwrite: bool) -> None:
        """Both files, or neither. Between the two the header of the tensors tells that the settings
        are others.
        """
        form, settings = form_of(change), path.with_name(CONFIG)
        tensors = self.tensors(cast(change), change) if form is None else _own(form, change)
        values = _settings(form, change)
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        about = {**change.about, SETTINGS: hash_of_json(values)}
        if form is not None:
            about["shapes"] = {layer: list(shape) for layer, shape in change.file.shapes.items()}
        same = not settings.exists() or settings.read_bytes() == text.encode()
        strings = self.strings(change)
        if not overwrite:
            if not same:
                raise other_contents(settings)
            if path.exists() and not holds(path, tensors, about, strings):
                raise other_contents(path)
        with whole(settings) as partial:
            partial.write_text(text)
            write_new(path, tensors, about, overwrite, strings)

    def name(self, key: str, prefixes: Prefixes) -> str | None:
        return key.removeprefix(PEFT) if key.startswith(PEFT) else None

    def reads(self, file: TensorFile, prefixes: Prefixes) -> bool:
        own = any(k.startswith(PEFT) and k.endswith(peft_read.ENDS) for k in file.tensors)
        return own or super().reads(file, prefixes)

    def is_lora(self, file: TensorFile) -> bool:
        return peft_read.method_of(_values(file.folder / CONFIG)) is None

    def read(self, file: TensorFile, network: nn.Module | None, prefixes: Prefixes) -> AdapterFile:
        values = _values(file.folder / CONFIG)
        if SETTINGS in file.about and file.about[SETTINGS] != hash_of_json(values):
            warnings.warn(
                f"`{CONFIG}` beside `{file.name}` is not what was written with it: it is obeyed as"
                " it is now",
                stacklevel=3,
            )
        if values is None or peft_read.method_of(values) is None:
            return super().read(file, network, prefixes)
        return peft_read.read(file, values, _place(file.folder / CONFIG), network)

    def stated(self, file: TensorFile, prefixes: Prefixes) -> Stated | None:
        in_header, beside = super().stated(file, prefixes), _config(file.folder / CONFIG)
        if in_header and beside and in_header != beside:
            raise UnreadableFile(f"{in_header.place} and {beside.place} say different things")
        return beside or in_header

    def doubt(self, file: TensorFile) -> str | None:
        return f"PEFT keeps the strength in `{CONFIG}`, which is not beside it"


def _place(path: Path) -> str:
    return f"`{path.name}` beside it"


def _config(path: Path) -> Stated | None:
    values = _values(path)
    return None if values is None else stated(values, _place(path))


def _values(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    place = _place(path)
    try:
        with path.open("rb") as file:
            text = file.read(LIMIT + 1)
    except OSError as error:
        raise UnreadableFile(f"{place} cannot be read: {error.strerror or error}") from error
    if len(text) > LIMIT:
        raise UnreadableFile(f"{place} has more than {LIMIT} bytes")
    values = from_json(text, place)
    if not isinstance(values, dict):
        raise UnreadableFile(f"{place} must hold names with values, got {type(values).__name__}")
    return values


def _own(form: Form, change: Change) -> dict[str, Tensor]:
    """Key -> tensor of the method's own parameters."""
    found = {}
    for path in change.file.shapes:
        for end, tensor in tensors_of(form, change.file, path).items():
            found[f"{PEFT}{path}.{end}"] = tensor.to(change.dtype)
    return found


def _settings(form: Form | None, change: Change) -> dict[str, Any]:
    paths = list(change.file.shapes)
    if form is None:
        rank = max(down.shape[0] for _, down in change.factors.values())
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    else:
        config = form.config
    base = change.about["metadata"].get("base")
    return {
        **config,
        "base_model_name_or_path": base if isinstance(base, str) and "/" in base else None,
        "bias": "none",
        "inference_mode": True,
        "peft_version": VERSION,
        "target_modules": exact_names(paths, change.file.target_modules, change.network),
        "task_type": None,
    }


FORMAT = Peft()
