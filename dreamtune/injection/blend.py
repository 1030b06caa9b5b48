"""Attention from a picture to a text, of which each region of the picture has keys and values of
its own: those that the adapters of the region give, of the region's own text where it has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dreamtune.injection.layer import Adapted
from dreamtune.injection.mix import Mix
from dreamtune.injection.places import PROJECTIONS, innermost, walk
from dreamtune.injection.regions import Regions

# Of diffusers. What they give at a place of the picture is of the query there; what the output goes
# through is affine, so that averages may be taken after it.
PROCESSORS = (
    "AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor",
    "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor",
)  # fmt: skip

TEXT = "encoder_hidden_states"


class Blend:
    """Around the forwards of an attention to text, by hooks, so that its processor stays what it
    is: the average over the turns of `Regions`, each with the region's text where it has one.
    """

    def __init__(self, attention: nn.Module, path: str, mix: Mix) -> None:
        self.path, self.mix = path, mix
        self.text = [innermost(attention.get_submodule(name)) for name in ("to_k", "to_v")]
        self.given: tuple[Any, Any] = (), {}
        self.hooks = [
            attention.register_forward_pre_hook(self._before, with_kwargs=True),
            attention.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, attention: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        regions = self.mix.regions
        if regions is None:
            return None
        check_known(attention, self.path)
        self.given = args, kwargs
        regions.text, regions.turn = self.text, regions.turns[0]
        return told(regions, args, kwargs)

    def _after(self, attention: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        regions, (args, kwargs), self.given = self.mix.regions, self.given, ((), {})
        if regions is None or len(regions.turns) == 1:
            return None
        first, *others = regions.weights(out)
        out = first * out
        for turn, weight in zip(regions.turns[1:], others):
            regions.turn = turn
            args_of, kwargs_of = told(regions, args, kwargs)
            out = out + weight * attention.forward(*args_of, **kwargs_of)
        return out


def told(regions: Regions, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """What an attention to text is called with in this turn."""
    text = kwargs.get(TEXT, args[1] if len(args) > 1 else None)
    if text is None or not regions.has_text:
        return args, kwargs
    # IP-Adapter: the text, and pictures
    text = (regions.texts(text[0]), *text[1:]) if isinstance(text, tuple) else regions.texts(text)
    return (*args[:1], *args[2:]) if len(args) > 1 else args, {**kwargs, TEXT: text}


@contextmanager
def placed(model: nn.Module, mix: Mix) -> Iterator[None]:
    """Inside, the model's attentions know the regions of the mix, where it has any.

    Raises:
        ValueError: an adapted attention that is not known to attend place by place.
    """
    blends: list[Blend] = []
    has_text = mix.regions is not None and mix.regions.has_text
    try:
        for spot in walk(model) if mix.regions is not None else ():
            attention: Any = spot.module
            layers = {n: getattr(attention, n, None) for n in (*PROJECTIONS, "to_out")}
            if layers["to_q"] is None or not (has_text or any(map(_adapted, layers.values()))):
                continue
            check_known(attention, spot.path)
            to_text = attention.is_cross_attention and (
                has_text or any(_adapted(layers[name]) for name in ("to_k", "to_v"))
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
