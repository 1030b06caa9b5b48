"""The fast way of an adapter: stacked weights, joint projections, factors in places that stay.

For a model whose owner changes nothing of it but through the adapter, as the trainer, which records
its steps as CUDA graphs; and for a pipeline that is watched: `touched` says what somebody else has
done to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamtune.injection.attention import JointProjections, joint_layers, project_jointly
from dreamtune.injection.change import Use, tensors_of, trains, version
from dreamtune.injection.group import Group
from dreamtune.injection.layer import Adapted, follow
from dreamtune.injection.places import Place, attentions_of
from dreamtune.injection.stack import Stack
from dreamtune.injection.streams import beside


class Stacked:
    """Attributes:
    watched: whether others may touch the model. Then there is room below the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        places: Mapping[str, Place],
        use: Use,
        watched: bool,
    ) -> None:
        self.model, self.groups, self.use, self.watched = model, groups, use, watched
        self.places = dict(places)
        self.fresh: tuple[object, ...] | None = None  # what the factors were computed from
        self.stacks: list[Stack] = []
        for group in groups:
            joint = joint_layers(group.names, self.places)
            parts = [[self.places[name].layer for name in part] for part in joint]
            group.stack = Stack(group.adapter, parts, use, roomy=watched)  # type: ignore[arg-type]
            self.stacks.append(group.stack)
        self.attentions = project_jointly(attentions_of(places.values()))
        self.where = [_where(place) for place in places.values()]

    def release(self) -> None:
        """The layers plain again, and each weight a tensor of its own."""
        for attention in self.attentions:
            if type(attention.processor) is JointProjections:
                attention.processor = attention.processor.original
        for group in self.groups:
            assert group.stack is not None
            group.stack.release()
            group.stack = None

    def refresh(self, anew: bool = False) -> None:
        """Computes all factors. anew: also what is taken of the weights alone."""
        if anew:
            for stack in self.stacks:
                stack.constants(anew=True)
        training, self.fresh = self._training(), None
        for stack in self.stacks:
            stack.clear()  # a graph of an earlier step would decide on which stream gradients run
        tasks = [stack.factors for stack in self.stacks]
        made = beside(tasks, self.stacks[0].weight.device)
        for stack, factors in zip(self.stacks, made):
            stack.set(factors, training)
        # Factors that carry a graph belong to one step: the next forward computes them again.
        self.fresh = None if training else self._state()

    def before_forward(self) -> bool:
        """Whether factors were computed anew."""
        for stack in self.stacks:
            first = stack.layers[0].weight
            moved = first.data_ptr() != stack.weight.data_ptr()
            if moved or first.dtype != stack.weight.dtype or first.device != stack.weight.device:
                stack.restack()
                self.fresh = None
        if self.fresh is None or self._training() or self.fresh != self._state():
            self.refresh(anew=self.watched)
            return True
        return False

    def touched(self) -> str | None:
        """What of the model is no longer as this stands for, or None."""
        for siblings, name, layer, tensors, kept in self.where:  # before every call: few lookups
            own = layer.__dict__
            if siblings.get(name) is not layer:
                return "there is something around a layer, or in its place"
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return "a layer has hooks"
            for key, tensor, address in kept:
                if tensors[key] is not tensor or tensor.data_ptr() != address:
                    return "weights were moved, cast or replaced"
        for attention in self.attentions:
            if type(attention.processor) is not JointProjections:
                return "an attention has another processor"
        return "the model is offloaded" if offloaded_whole(self.model) else None

    def _training(self) -> bool:
        return any(trains(group.adapter) for group in self.groups)

    def _state(self) -> tuple[object, ...]:
        own = (version(x) for group in self.groups for x in tensors_of(group.adapter))
        return self.use.state(), torch.is_inference_mode_enabled(), *own

    def bound(self) -> list[Tensor]:
        """The weights that the change is another for, with what is below them."""
        stacks = self.stacks
        return [s.stack for s in stacks if s.adapter.depends_on_weight or not s.adapter.low_rank]


def _where(place: Place) -> tuple[Any, ...]:
    """A layer among its siblings, and its tensors, where they are."""
    tensors = place.layer._parameters
    kept = [(key, x, x.data_ptr()) for key, x in tensors.items() if x is not None]
    return place.parent._modules, place.name, place.layer, tensors, kept


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(layer: nn.Module) -> bool:
    own = layer.__dict__
    return "forward" in own or any(own[name] for name in HOOKS)


def offloaded_whole(module: nn.Module) -> bool:
    """Whether accelerate or diffusers moves the module's weights for each forward."""
    registry = module.__dict__.get("_diffusers_hook")  # there, and empty, after a `cache_context`
    return "_hf_hook" in module.__dict__ or bool(getattr(registry, "hooks", registry))


def why_not(model: nn.Module, groups: Sequence[Group], places: Mapping[str, Place]) -> str | None:
    """Why the model cannot be stacked, or None."""
    if any(map(offloaded_whole, model.modules())):
        return "the model is offloaded: its weights are not in one place"
    for group in groups:
        if not group.together():
            return f"the {group.key} layers are not of one dtype on one device"
    for name, place in places.items():
        if place.parent._modules.get(place.name) is not place.layer:
            around = type(place.parent._modules.get(place.name))
            return f"`{name}` is inside a `{around.__module__}.{around.__name__}`: unload it first"
        follow(place.layer)
        if hooked(place.layer):
            return f"`{name}` has hooks: a joint projection would not call them"
        if isinstance(place.layer, Adapted) and len(place.layer.changes) > 1:
            return f"`{name}` holds several adapters"
        mix = getattr(place.layer, "mix", None)
        if mix is not None and not mix.plain:
            return "its strengths are not 1 in all rows and layers: `set_adapters` or `route`"
        kind = type(getattr(place.attention, "processor", None)).__name__
        if place.attention is not None and kind != "AttnProcessor2_0":
            return f"the processor of `{name}` is `{kind}`, not `AttnProcessor2_0`"
    return None
