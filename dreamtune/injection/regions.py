"""Where in the picture each adapter of a routed row acts, at the resolution of each layer.

A layer that works on the picture, token by token or pixel by pixel, adds an adapter's change times
the share of its region at that place: changes of regions that overlap add up. Layers that work on
the text, which has no place, compute in turns: in turn 0 without the adapters that have regions, in
the others with those of one region each. What they are for is averaged over the picture, see
`Blend`: by the shares of the regions, in proportion where these come to more than 1; what they
leave is turn 0's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.injection.change import Factors, InLayer, Use, constant
from dreamtune.injection.region import Region

ROUNDING = 1e-6  # shares that come to 1 but for float32's: a turn less

Part = tuple[str, InLayer, Factors, Sequence[float]]


class Regions:
    """Attributes:
    rows: of each row of a route, name -> region; adapters without one are everywhere.
    places: of each row, what regions there are, each once. turn_of: of each row, name -> its turn.
    sizes: number of picture tokens -> (height, width), in the batch that runs.
    turns: that the batch needs. turn: which it is. text: the layers that work on text now.
    """

    def __init__(self, rows: Sequence[Mapping[str, Region]]) -> None:
        self.rows = rows
        self.places = [{region.place: region for region in row.values()} for row in rows]
        self.turn_of = [
            {name: 1 + list(places).index(region.place) for name, region in row.items()}
            for row, places in zip(rows, self.places)
        ]
        self.batch: tuple[int, int, Tensor] | None = None
        self.sizes: dict[int, tuple[int, int]] = {}
        self.turns: list[int] = []
        self.turn = 0
        self.text: Sequence[nn.Module] = ()
        self.kept: dict[object, Tensor] = {}
        self.prompted: Sequence[bool] = ()
        self.told: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]] | None) -> Regions | None:
        """None where no row has one."""
        own = [{n: s for n, s in row.items() if isinstance(s, Region)} for row in rows or ()]
        return Regions(own) if any(own) else None

    def start(self, sample: Tensor, order: Tensor, prompted: Sequence[bool]) -> None:
        """Of a forward. sample: what the network is called with, (batch, channels, height, width);
        order: the row of each; prompted: of equal parts of the batch, whether they have the prompt.
        Raises ValueError where it is no picture, or a mask does not fit.
        """
        self.prompted, self.told = prompted, {}
        if sample.dim() != 4:
            raise ValueError(
                "regions need a network of pictures (batch, channels, height, width), got a batch"
                f" of {tuple(sample.shape)}"
            )
        height, width = sample.shape[-2:]
        before = self.batch or (0, 0, None)
        if before[:2] == (height, width) and before[2] is order:
            return
        for row in self.rows:
            for name, region in row.items():
                region.check(name, height, width)
        self.batch, self.kept, self.sizes = (height, width, order), {}, {}
        weights = self._weights(height, width)
        self.turns = [turn for turn, share in enumerate(weights) if share.any()]
        while height * width not in self.sizes:  # a UNet halves, and rounds up
            self.sizes[height * width] = height, width
            height, width = -(-height // 2), -(-width // 2)

    def pairs(self, layer: Any, x: Tensor, parts: Sequence[Part]) -> list[tuple[Factors, Use]]:
        """What the layer adds for x. parts: of each change its adapter's name, factors, and
        strengths in the rows. Raises ValueError where a region is for a layer without a place.
        """
        found = []
        for name, change, factors, strengths in parts:
            at = self._at(layer, x, change.path, name, tuple(strengths))
            if at is None:
                continue
            if (own := change.use.at) is not None:
                at = at * own.to(at).reshape(-1, *(1 for _ in at.shape[1:]))
            found.append((factors, replace(change.use, at=at)))
        return found

    def _at(
        self, layer: Any, x: Tensor, path: str, name: str, strengths: tuple[float, ...]
    ) -> Tensor | None:
        """Strengths of rows, or of each place in them, (batch, tokens) or (batch, height, width);
        None where there are none in this turn.
        """
        if self.batch is None:
            raise ValueError("regions are routed, whose size a call of the whole network tells")
        regions, size = [row.get(name) for row in self.rows], None
        flat = not isinstance(layer, nn.Conv2d)
        if any(region is not None and s != 0 for region, s in zip(regions, strengths)):
            if not any(layer is one for one in self.text):
                size = self._size(layer, x, path, name)
            else:
                turns = (own.get(name, self.turn) for own in self.turn_of)
                strengths = tuple(s * (own == self.turn) for s, own in zip(strengths, turns))
                if not any(strengths):
                    return None

        def compute() -> Tensor:
            at = torch.tensor(strengths)
            if size is None:
                return at
            shares = [torch.ones(size) if r is None else r.share(*size) for r in regions]
            at = at[:, None, None] * torch.stack(shares)
            return at.flatten(1) if flat else at

        return self._keep((name, strengths, size, flat), compute, layer.weight)

    def _keep(self, key: tuple[object, ...], compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """(rows, ...) -> (batch, ...), of the dtype and where the other is."""
        assert self.batch is not None
        key = (*key, like.dtype, like.device)
        if key not in self.kept:
            with constant():
                self.kept[key] = compute()[self.batch[2]].to(like)
        return self.kept[key]

    def _size(self, layer: Any, x: Tensor, path: str, name: str) -> tuple[int, int]:
        """(height, width) of what the layer gives."""
        if isinstance(layer, nn.Conv2d) and x.dim() == 4:
            return _convolved(layer, x)
        if isinstance(layer, nn.Linear) and x.dim() == 3 and x.shape[1] in self.sizes:
            return self.sizes[x.shape[1]]
        raise ValueError(
            f"`{name}` has a region, but changes `{path}`, which was called with"
            f" {tuple(x.shape)}, no picture of {' or '.join(map(str, self.sizes))} tokens: give it"
            f' no region, or none of its strength there, strength={{"{path}": 0}}'
        )

    @property
    def has_text(self) -> bool:
        """Whether some region has a prompt of its own."""
        return any(region.text is not None for row in self.rows for region in row.values())

    def texts(self, given: Tensor) -> Tensor:
        """The text of each row of the batch, (batch, tokens, width), in this turn: the region's
        own in the rows with a prompt, else what is given. Raises ValueError for other sizes.
        """
        before = self.told.get(self.turn)
        if before is None or before[0] is not given:  # all attentions are given the same
            before = self.told[self.turn] = given, self._texts(given)
        return before[1]

    def _texts(self, given: Tensor) -> Tensor:
        assert self.batch is not None
        numbers, texts = [], []
        for number, row in enumerate(self.batch[2].tolist()):
            region = dict(enumerate(self.places[row].values(), 1)).get(self.turn)
            prompted = self.prompted[number * len(self.prompted) // len(given)]
            if region is None or region.text is None or not prompted:
                continue
            if region.text.shape != given.shape[1:]:
                raise ValueError(
                    f"the prompt of a region is {tuple(region.text.shape)} (tokens, width), the"
                    f" batch's {tuple(given.shape[1:])}: use prompts that the pipeline encodes"
                )
            numbers.append(number)
            texts.append(region.text.to(given))
        if not numbers:
            return given
        rows = torch.tensor(numbers, device=given.device)
        return given.index_copy(0, rows, torch.stack(texts))

    def weights(self, out: Tensor) -> Tensor:
        """(turns, batch, tokens, 1): shares of the outputs of `turns` at each token of out, (batch,
        tokens, width). They sum to 1.
        """
        size = self.sizes.get(out.shape[1]) if out.dim() == 3 else None
        if size is None:
            raise ValueError(
                "regions are routed, but an attention to text gave"
                f" {tuple(out.shape)}, no picture of {' or '.join(map(str, self.sizes))} tokens"
            )

        def compute() -> Tensor:
            return self._weights(*size)[self.turns].flatten(2).movedim(0, 1)

        return self._keep((size,), compute, out).movedim(1, 0).unsqueeze(-1)

    def _weights(self, height: int, width: int) -> Tensor:
        """(turns, rows, height, width)."""
        count = 1 + max(len(places) for places in self.places)
        weights = torch.zeros(count, len(self.rows), height, width)
        for row, places in enumerate(self.places):
            for turn, region in enumerate(places.values(), 1):
                weights[turn, row] = region.share(height, width)
        total = weights.sum(0)
        weights /= total.clamp(min=1)
        weights[0] = (1 - total).clamp(min=0)
        return weights * (weights > ROUNDING)


def _convolved(layer: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """(height, width) of the convolution of x."""
    if isinstance(layer.padding, str):
        height, width = x.shape[-2:]
        if layer.padding == "same":
            return height, width
    sizes = []
    for n, kernel, stride, dilation, padding in zip(
        x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation,
        (0, 0) if isinstance(layer.padding, str) else layer.padding,
    ):  # fmt: skip
        sizes.append((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    return sizes[0], sizes[1]
