"""LPIPS: how far apart two pictures are to the eye, by weighted differences of AlexNet's features
(Zhang et al. 2018, arXiv 1801.03924, equation 1, version 0.1).
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from dreamtune.metrics.dino import IMAGENET_MEAN, IMAGENET_STD
from dreamtune.metrics.extractor import Extractor, weights_hash
from dreamtune.metrics.names import public_name
from dreamtune.metrics.preprocess import Preprocess, Resizing
from dreamtune.metrics.table import Features, Metric, register

FILE = "lpips.safetensors"
SIDE = 224
# The layers of torchvision's AlexNet whose outputs are compared, each a ReLU.
STAGES = (range(0, 2), range(2, 5), range(5, 8), range(8, 10), range(10, 12))
HOW = (
    f"make the folder's `{FILE}` once, where the `lpips` package is: "
    "`state = lpips.LPIPS(net='alex').state_dict()`, then `safetensors.torch.save_file({k: v for "
    f"k, v in state.items() if not k.startswith('lins.')}}, '{FILE}')`"
)


class Lpips(Extractor):
    """Rows whose squared distance is LPIPS: sqrt(w / (height width)) times the channel-normalised
    features of five stages, laid end to end. 1.9 MB a picture at 224 px.

    The scaling layer of the published code, on pictures in [-1, 1], is ImageNet's mean and standard
    deviation on [0, 1].

    Args:
        name: a folder with lpips.safetensors, the state of `lpips.LPIPS(net='alex')`.
        resizing: by default the shorter side to 224 px and the centre.

    Raises:
        ValueError: there is no such file, or it lacks weights, or a weight is negative.
    """

    name, default, libraries = "lpips", "alex", ("torchvision",)

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resizing: Resizing | None = None,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.stages, self.weights = _load(Path(name))
        self.model = nn.ModuleList([*self.stages, self.weights])
        self.model.to(self.device, dtype).eval().requires_grad_(False)
        self.preprocess = Preprocess(
            resizing or Resizing("shortest", SIDE, SIDE),
            IMAGENET_MEAN,
            IMAGENET_STD,
            Image.Resampling.BICUBIC,
        )
        self.mean_colour = IMAGENET_MEAN
        self.protocol = {
            "model": public_name(name),
            "architecture": {"net": "alex", "version": "0.1"},
            "weights": weights_hash(self.model),
            **self.preprocess.protocol(),
            "dtype": str(dtype).removeprefix("torch."),
        }

    def encode(self, pixels: Tensor) -> Tensor:
        """Not of unit length."""
        x, parts = pixels, []
        for stage, weight in zip(self.stages, self.weights):
            x = stage(x)
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            scale = weight.reshape(1, -1, 1, 1) / (x.shape[2] * x.shape[3])
            parts.append((unit * scale.sqrt()).flatten(1))
        return torch.cat(parts, 1)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of all pairs of rows: (N, D), (M, D) -> (N, M)."""
    # `cdist` adds up half a million squares one by one, which is off by 2e-4.
    return torch.stack([(a - row).square().sum(1) for row in b], 1)


def apart(f: Features) -> Tensor | None:
    """(N,) mean LPIPS of an image and the others of its prompt, nan for one alone."""
    same = (f.index[:, None] == f.index).fill_diagonal_(False)
    counts = same.sum(1)
    if not counts.any():
        return None
    total = (distances(f.images, f.images) * same).sum(1)
    return torch.where(counts > 0, total / counts, torch.nan)


def _load(folder: Path) -> tuple[nn.ModuleList, nn.ParameterList]:
    """Stages of AlexNet, and the weights of each stage's channels."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torchvision.models import alexnet

    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"LPIPS: there is no `{file}`: {HOW}; then name the folder with --lpips.")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"LPIPS: cannot read `{file}`: {error}.") from None
    with torch.device("meta"):  # it comes with a classifier of 59 million weights
        layers = alexnet(weights=None).features
    stages = nn.ModuleList([nn.Sequential(*(layers[i] for i in stage)) for stage in STAGES])
    try:
        for number, stage in enumerate(STAGES, 1):
            for i in stage:
                if isinstance(layers[i], nn.Conv2d):
                    place = f"net.slice{number}.{i}"
                    own = {k: state[f"{place}.{k}"] for k in ("weight", "bias")}
                    layers[i].load_state_dict(own, assign=True)
        weights = nn.ParameterList(
            [state[f"lin{i}.model.1.weight"].flatten() for i in range(len(STAGES))]
        )
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"LPIPS: `{file}` is not of `net='alex'` ({error}): {HOW}.") from None
    if any((w < 0).any() for w in weights):
        raise ValueError(f"LPIPS: `{file}` has negative weights of channels; they must not be.")
    return stages, weights


register(
    Metric(
        "lpips",
        "LPIPS to photos",
        Lpips,
        score=lambda f: distances(f.images, f.photos).mean(1),
        pairing="mean LPIPS of all (generated image, photo) pairs; lower is more alike",
        while_training=False,
        pairs=lambda f: len(f.photos),
    )
)
register(
    Metric(
        "lpips_diversity",
        "LPIPS, diversity",
        Lpips,
        score=apart,
        pairing="mean LPIPS of an image and the other images of its prompt",
        tied=True,
        while_training=False,
    )
)
