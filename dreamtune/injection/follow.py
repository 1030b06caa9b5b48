"""What an adapter does around each forward of its model: it follows what was done to the model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dreamtune.injection.change import Use, tensors_of, trains, version
from dreamtune.injection.group import Group
from dreamtune.injection.places import Place, attentions_of, check_in_place, fused_adapters
from dreamtune.injection.stacked import Stacked, offloaded_whole, why_not
from dreamtune.injection.timesteps import timesteps
from dreamtune.injection.values import Answer, Values


class Following:
    """Attributes:
    stacked: the fast way; None where the layers are plain.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], places: Mapping[str, Place], use: Use
    ) -> None:
        self.model, self.groups, self.places, self.use = model, groups, places, use
        self.attentions = attentions_of(places.values())
        self.seen: object = None  # what the layers' factors were computed from
        self.values = Values()  # and the values of that
        # whether they still are, for the forward that runs, and what that was called with
        self.asked: tuple[Answer, Sequence[Any], Mapping[str, Any]] | None = None
        self.stacked: Stacked | None = None
        self.strengths: dict[tuple[object, ...], torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        nothing = {"stacked": None, "seen": None, "values": Values(), "asked": None}
        return {**self.__dict__, **nothing}  # a copy is plain

    def refresh(self) -> None:
        """Computes all factors, whatever was seen."""
        self.values.forget()
        if self.stacked is not None:
            self.stacked.refresh(anew=True)
        else:
            self._prepare()
            self.seen = None if self._training() else self._state()

    def forget(self) -> None:
        """The next forward computes all factors."""
        self.seen = None
        self.values.forget()
        if self.stacked is not None:
            self.stacked.fresh = None

    def _prepare(self) -> None:
        for group in self.groups:
            group.forget()
            if group.together() and not offloaded_whole(self.model):
                group.prepare()

    def before_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self.use.slots > 1 and self.use.rows is None and not torch.is_grad_enabled():
            # equal blocks would give the half without the prompt to the first slots
            raise ValueError(
                f"an adapter of {self.use.slots} slots needs `route(rows)`, the slot of each row of"
                " the batch, for a forward without gradients. A pipeline's batch under guidance"
                " holds all rows without the prompt, then all with it: `route(rows.repeat(2))`"
            )
        self.use.call = strength_of_call(kwargs)
        self.use.at = self._strength_of_rows(args, kwargs)
        stacked = self.stacked
        if stacked is not None and stacked.watched and (why := stacked.touched()):
            warnings.warn(f"dreamtune: the adapter is slowed down, for {why}", stacklevel=2)
            self.slow_down()
        if self.stacked is not None:
            if self.stacked.before_forward():
                self.values.forget()
        else:
            self.check()
            if not torch.compiler.is_compiling():  # what is compiled computes them itself
                self._follow()
        self._compare(args, kwargs)

    def after_forward(self) -> Any:
        """The output, where it had to be computed again; else None."""
        asked, self.asked = self.asked, None
        if asked is None or asked[0].same():
            return None
        self._renew()
        return self.model.forward(*asked[1], **asked[2])

    def _strength_of_rows(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        adapter = self.groups[0].adapter
        if not adapter.asks_for_timestep:
            return None
        at = adapter.strength_at(timesteps(self.model, args, kwargs, adapter.name))
        if torch.is_grad_enabled():
            return at
        # in one place: a recorded forward reads it there, and this runs before it, not in it
        key = (at.shape, at.device, torch.is_inference_mode_enabled())
        kept = self.strengths.setdefault(key, at)
        return kept if kept is at else kept.copy_(at)

    def _follow(self) -> None:
        """The factors of all layers at once, where some would be others than those kept."""
        if self.seen is None or self._training() or self.seen != self._state():
            self.refresh()

    def _training(self) -> bool:
        return any(trains(group.adapter) for group in self.groups)

    def _state(self) -> tuple[object, ...]:
        return (self.use.state(), *((x.data_ptr(), version(x)) for x in self._read()))

    def _compare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Whether values were written where no version shows it. Where that is known at once the
        factors are computed anew; a GPU is asked, and answers while the forward runs: waiting
        before it would cost more than the factors do.
        """
        self.asked = None
        if self.stacked is not None and not self.stacked.watched:
            return
        if torch.compiler.is_compiling() or _capturing() or self._training():
            return  # training has computed them just now
        answer = self.values.ask(self._read(), often=self.stacked is not None)
        if answer.late:
            # with what it was called with: diffusers' UNet takes residuals out of a caller's list
            self.asked = answer, *_kept(args, kwargs)
        elif not answer.same():
            self._renew()

    def _renew(self) -> None:
        self.refresh()
        self.values.ask(self._read())  # there are factors below stacked weights

    def _read(self) -> list[torch.Tensor]:
        """What the factors are computed from."""
        own = [x for group in self.groups for x in tensors_of(group.adapter)]
        if self.stacked is not None:
            return [*own, *self.stacked.bound()]
        return [*own, *(layer.weight for group in self._bound() for layer in group.layers)]

    def _bound(self) -> list[Group]:
        """The groups whose change is another for other weights."""
        return [g for g in self.groups if g.adapter.depends_on_weight]

    def check(self) -> None:
        """Raises ValueError where the model no longer does what the adapter's layers do."""
        check_in_place(self.places, self.attentions)
        for place in self.places.values():
            if place.parent._modules.get(place.name) is place.layer:
                continue
            inside = fused_adapters(place)
            if inside and self._bound():
                raise ValueError(
                    f"`fuse_lora` wrote {inside} into the weights that the change of"
                    f" `{self.groups[0].adapter.name}` is computed from: call `unfuse_lora()`; or"
                    " `merge()` this adapter first, or take the fused weights as the base by"
                    " `unload_lora_weights()`"
                )

    def stack(self, watched: bool) -> None:
        self.values = Values()
        self.stacked = Stacked(self.model, self.groups, self.places, self.use, watched)
        with torch.no_grad():
            self.stacked.refresh(anew=True)

    def speed_up(self) -> None:
        """Raises ValueError where the model is not one that the fast way stands for."""
        if self.stacked is not None:
            return
        self.check()
        if why := why_not(self.model, self.groups, self.places):
            raise ValueError(f"the adapter cannot be sped up: {why}")
        self.stack(watched=True)

    def slow_down(self) -> None:
        """Harmless where the layers are plain."""
        if self.stacked is not None:
            self.stacked.release()
        self.stacked = self.seen = None
        self.values = Values()


def _kept(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    return [_copied(x) for x in args], {name: _copied(x) for name, x in kwargs.items()}


def _copied(x: Any) -> Any:
    return type(x)(x) if type(x) in (list, dict) else x


def _capturing() -> bool:
    """Whether a CUDA graph is recorded, which comparing would end."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


CALLS = ("cross_attention_kwargs", "attention_kwargs", "joint_attention_kwargs")


def strength_of_call(kwargs: Mapping[str, Any]) -> float:
    """As diffusers tells a model the strength of its LoRAs for one call."""
    for name in CALLS:
        if kwargs.get(name) is not None:
            return float(kwargs[name].get("scale", 1.0))
    return 1.0
