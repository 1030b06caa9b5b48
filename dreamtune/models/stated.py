"""What a single-file checkpoint says of itself: marker keys, its header's metadata, a yaml beside.

The keys `v_pred` and `ztsnr` are those of Forge and reForge, the metadata is modelspec 1.0 of
Stability AI, the yaml is what AUTOMATIC1111's web UI reads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dreamtune.configfile import parse_yaml
from dreamtune.fields import UnreadableFile, checker, from_file, shown
from dreamtune.textfile import read_text

WORDS = {
    "eps": "epsilon", "epsilon": "epsilon",
    "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction",
}  # fmt: skip
ARCHITECTURES = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
Beta = Annotated[float, Field(gt=0, lt=1)]
YAML = checker(
    {
        "parameterization": str, "linear_start": Beta, "linear_end": Beta,
        "timesteps": Annotated[int, Field(ge=1, le=100_000)],
        "scale_factor": Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)],
    },
    others=True,
)  # fmt: skip


@dataclass
class Stated:
    """What is stated, None where nothing is.

    Attributes:
        prediction_types: of each place that says one.
        zero_snr: whether the noisiest step holds no signal.
        resolution: pixels a side.
        schedule: the scheduler's values by diffusers' names.
        scaling_factor: of the autoencoder.
    """

    prediction_types: dict[str, str] = field(default_factory=dict)
    zero_snr: bool = False
    resolution: int | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    scaling_factor: float | None = None
    notes: list[str] = field(default_factory=list)

    def prediction_type(self, file: Path) -> str | None:
        """Raises ValueError where two places differ."""
        if len(set(self.prediction_types.values())) > 1:
            said = "; ".join(f"{place} says {t}" for place, t in self.prediction_types.items())
            raise ValueError(f"`{file}` contradicts itself: {said}. Choose by --prediction_type.")
        return next(iter(self.prediction_types.values()), None)


def read_stated(
    file: Path, names: Collection[str], metadata: Mapping[str, str] | None, layer: str = "1"
) -> Stated:
    """names: of its tensors; layer: of the text encoder that is used, counted from its end. Raises
    UnreadableFile for a statement that is not understood.
    """
    found = Stated(zero_snr="ztsnr" in names)
    if "v_pred" in names:
        found.prediction_types["its key `v_pred`"] = "v_prediction"
    read_modelspec(file, metadata or {}, found, layer)
    if file.with_suffix(".yaml").exists():
        read_beside(file.with_suffix(".yaml"), found)
    return found


def read_modelspec(
    file: Path, metadata: Mapping[str, str], found: Stated, layer: str = "1"
) -> None:
    spec = {k.removeprefix("modelspec."): v for k, v in metadata.items()}
    spec = {k: spec[k] for k in spec if f"modelspec.{k}" in metadata}
    architecture = spec.get("architecture", "")
    if "inpainting" in architecture or "/" in architecture:
        raise UnreadableFile(
            f"`{file}` says that it is a {architecture[:100]} (`modelspec.architecture`): only a "
            "text-to-image model can be the base."
        )
    if architecture in ARCHITECTURES:
        place = "its metadata `modelspec.architecture`"
        found.prediction_types[place] = ARCHITECTURES[architecture]
    if word := spec.get("prediction_type"):
        place = "its metadata `modelspec.prediction_type`"
        found.prediction_types[place] = meant(word, f"`{file}`, {place}")
    if sides := re.fullmatch(r"(\d{2,5})(?:x(\d{2,5}))?", spec.get("resolution", "")):
        width, height = int(sides[1]), int(sides[2] or sides[1])
        if width == height and width % 8 == 0:
            found.resolution = width
        else:
            found.notes.append(
                f"`{file.name}` says a resolution of {sides[0]}, which is no square: give "
                "--resolution for another than the usual one."
            )
    if spec.get("encoder_layer", layer) not in ("", layer):
        used = "last layer" if layer == "1" else "last layer but one"
        found.notes.append(
            f"`{file.name}` says that it was trained with clip skip {spec['encoder_layer'][:20]}: "
            f"here the {used} of the text encoder is used."
        )


def read_beside(file: Path, found: Stated) -> None:
    """A web UI's yaml, `model.params` of it."""
    place = f"`{file}`"
    loaded = parse_yaml(read_text(file), place)
    model = loaded.get("model") if isinstance(loaded, dict) else None
    params = model.get("params") if isinstance(model, dict) else None
    if not isinstance(params, dict):
        raise UnreadableFile(
            f"{place} lies beside a base and has no `model: params:`: move it away."
        )
    params = from_file(YAML, params, place)
    if "parameterization" in params:
        type_ = meant(params["parameterization"], f"{place}, `parameterization`")
        found.prediction_types[f"`{file.name}` beside it"] = type_
    names = {"linear_start": "beta_start", "linear_end": "beta_end"}
    names["timesteps"] = "num_train_timesteps"
    found.schedule |= {names[k]: params[k] for k in names if k in params}
    found.scaling_factor = params.get("scale_factor")


def meant(word: str, place: str) -> str:
    if word.lower() not in WORDS:
        raise UnreadableFile(f"{place} must be one of {', '.join(WORDS)}, got {shown(word)}.")
    return WORDS[word.lower()]
