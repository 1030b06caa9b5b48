"""LoRA as PEFT saves it: `base_model.model.<module path>.lora_A.weight`, its alpha beside it."""

from __future__ import annotations

from pathlib import Path

from dreamtune.fields import UnreadableFile, from_json
from dreamtune.files.formats import Prefixes
from dreamtune.files.lora import LoraFormat
from dreamtune.files.names import PEFT
from dreamtune.files.stated import Stated, stated
from dreamtune.files.tensors import TensorFile

CONFIG = "adapter_config.json"
LIMIT = 1 << 20  # bytes


class Peft(LoraFormat):
    file_name = "adapter_model.safetensors"

    def name(self, key: str, prefixes: Prefixes) -> str | None:
        return key.removeprefix(PEFT) if key.startswith(PEFT) else None

    def stated(self, file: TensorFile, prefixes: Prefixes) -> Stated | None:
        in_header, beside = super().stated(file, prefixes), _config(file.folder / CONFIG)
        if in_header and beside and in_header != beside:
            raise UnreadableFile(f"{in_header.place} and {beside.place} say different things")
        return beside or in_header

    def doubt(self, file: TensorFile) -> str | None:
        return f"PEFT keeps the strength in `{CONFIG}`, which is not beside it"


def _config(path: Path) -> Stated | None:
    if not path.is_file():
        return None
    place = f"`{path.name}` beside it"
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
    return stated(values, place)


FORMAT = Peft()
