"""Method x format: the table of README.md, and a file of each cell for the stock loaders.

python tests/helpers/matrix.py             # the table, as README.md has it
python tests/helpers/matrix.py FOLDER      # the files; then stock.py FOLDER FORMAT, anywhere
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import disturb, tiny_unet, unet_inputs

import dreamtune
from dreamtune import METHODS
from dreamtune.files.formats import EXPORTS, Change, export_format
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.models.load import prefixes_of

OTHERS = [
    "to_q", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out",
    "time_embedding.linear_1", "time_embedding.linear_2",
]  # fmt: skip
LINEAR = ["ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1"]
# Row -> method and its options: every method as it comes, and where options or layers decide.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "delora, `start` peft": ("delora", {"rank": 4, "start": "peft", "lambda_init": 2.0}),
    "delora, multiplicative": ("delora", {"rank": 4, "multiplicative": True}),
    "delora, `timestep_floor` below 1": ("delora", {"rank": 4, "timestep_floor": 0.5}),
    "oft, exact": ("oft", {"exact": True}),
    # rank 8 is more than `conv_out` is wide
    "lora, with convolutions": ("lora", {"rank": 8, "target_modules": OTHERS}),
    "delora, with convolutions": ("delora", {"rank": 4, "target_modules": OTHERS}),
    "ether+, with convolutions": ("ether+", {"target_modules": OTHERS}),
    "dora, with convolutions": ("dora", {"rank": 4, "target_modules": OTHERS}),
    "dora, other linear layers": ("dora", {"rank": 4, "target_modules": LINEAR}),
}
NONE = "—"


def asked(row: str) -> Change:
    """A row as a format is asked whether it holds it."""
    method, options = ROWS[row]
    options = {name: value for name, value in options.items() if name != "target_modules"}
    shapes = {"attn1.to_q": (64, 64), "mid_block.resnets.0.conv1": (64, 64, 3, 3)}
    if "convolutions" not in row:
        shapes.popitem()
    return Change(
        file=AdapterFile(method, options, ("to_q",), {}, {}, shapes),
        low_rank=dict,
        dtype=torch.float32,
        about={"exported_from": method, "fingerprint": {}, "metadata": {}},
        prefixes=prefixes_of(None),
    )


def held(row: str, format: str) -> str | None:
    """How a format holds it; None where it refuses."""
    try:
        return export_format(format).check(asked(row))
    except ValueError:
        return None


def table() -> str:
    lines = [
        f"| | {' | '.join(f'`{name}`' for name in EXPORTS)} |",
        "|---" * (len(EXPORTS) + 1) + "|",
    ]
    lines += [f"| read by | {' | '.join(EXPORTS.values())} |"]
    for row in sorted(ROWS):
        lines.append(f"| {row} | {' | '.join(held(row, name) or NONE for name in EXPORTS)} |")
    return "\n".join(lines)


def write(folder: Path) -> dict[str, dict[str, str]]:
    """Inputs, outputs and FORMAT/ROW/...; returns the messages of the cells that are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs, refused = unet_inputs(2), {name: {} for name in EXPORTS}
    outputs: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        outputs["base"] = tiny_unet()(*inputs).sample
        for number, (row, (method, options)) in enumerate(ROWS.items()):
            adapter = dreamtune.inject(unet := tiny_unet(), method, **options)
            disturb(adapter)
            outputs[str(number)] = unet(*inputs).sample
            for name in EXPORTS:
                place = folder / name / str(number)
                try:
                    dreamtune.export(adapter, place, name, metadata={"prompt": "a sks dog"})
                except ValueError as error:
                    refused[name][row] = str(error)
    save_file(dict(zip(("x", "t", "text"), inputs)), folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "rows.json").write_text(json.dumps(list(ROWS)))
    return refused


def write_whole(folder: Path, base: Path) -> None:
    """FOLDER/whole: a merged pipeline in shards, of a method that is not low rank, and an image."""
    from stock import image

    from dreamtune.models.load import load_base

    pipe = load_base(str(base)).pipeline()
    adapter = dreamtune.inject(pipe.unet, "dora")
    disturb(adapter)
    save_file({"image": image(pipe)}, folder / "image.safetensors")
    native = adapter.save(folder / "dora.safetensors")
    adapter.eject()
    dreamtune.export(native, folder, "merged", base=base, name="whole", max_shard_size="300KB")


def main() -> None:
    if len(sys.argv) < 2:
        return print(table())
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import write_pipeline

    folder = Path(sys.argv[1])
    base = write_pipeline(folder / "base")
    write(folder)
    write_whole(folder, base)


if __name__ == "__main__":
    main()
