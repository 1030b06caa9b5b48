"""Attention from a picture to a text, of which each region of the picture has keys and values of
its own: those that the adapters of the region give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dreamtune.injection.layer import Adapted
from dreamtune.injection.mix import Mix
from dreamtune.injection.places import PROJECTIONS, innermost, walk

# Of diffusers. What they give at a place of the picture is of the query there; what the output goes
# through is affine, so that averages may be taken after it.
PROCESSORS = (
    "AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor",
    "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor",
)  # fmt: skip


class Blend:
    """Around the forwards of an attention to text, by hooks, so that its processor stays what it
    is: the average over the turns of `Regions`.
    """

    def __init__(self, attention: nn.Module, path: str, mix: Mix) -> None:
        self.path, self.mix = path, mix
        self.text = [innermost(attention.get_submodule(name)) for name in ("to_k", "to_v")]
        self.hooks = [
            attention.register_forward_pre_hook(self._before),
            attention.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, attention: nn.Module, args: Any) -> None:
        regions = self.mix.regions
        if regions is not None:
            check_known(attention, self.path)
            regions.text, regions.turn = self.text, regions.turns[0]

    def _after(self, attention: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        regions = self.mix.regions
        if regions is None or len(regions.turns) == 1:
            return None
        first, *others = regions.weights(out)
        out = first * out
        for turn, weight in zip(regions.turns[1:], others):
            regions.turn = turn
            out = out + weight * attention.forward(*args, **kwargs)
        return out


@contextmanager
def placed(model: nn.Module, mix: Mix) -> Iterator[None]:
    """Inside, the model's attentions know the regions of the mix, where it has any.

    Raises:
        ValueError: an adapted attention that is not known to attend place by place.
    """
    blends: list[Blend] = []
    try:
        for spot in walk(model) if mix.regions is not None else ():
            attention: Any = spot.module
            layers = {n: getattr(attention, n, None) for n in (*PROJECTIONS, "to_out")}
            if layers["to_q"] is None or not any(map(_adapted, layers.values())):
                continue
            check_known(attention, spot.path)
            to_text = attention.is_cross_attention and any(
                _adapted(layers[name]) for name in ("to_k", "to_v")
            )
            around = any(isinstance(_owner(h), Blend) for h in attention._forward_hooks.values())
            if to_text and not around:  # of a route that is open around this one
                blends.append(Blend(attention, spot.path, mix))
        yield
    finally:
        for blend in blends:
            blend.remove()


def check_known(attention: Any, path: str) -> None:
    processor = getattr(attention, "processor", None)
    kind = processor.__class__.__name__  # that of one that stands for another is the other's
    if kind not in PROCESSORS or not hasattr(attention, "is_cross_attention"):
        raise ValueError(
            f"regions are routed, but `{path}` is a `{type(attention).__name__}` with"
            f" `{kind}`, not known to attend place by place: give the adapters no regions, or the"
            f" attention one of {', '.join(PROCESSORS)}"
        )


def _adapted(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(isinstance(m, Adapted) for m in module.modules())


def _owner(hook: Any) -> object:
    return getattr(hook, "__self__", None)
