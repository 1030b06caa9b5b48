"""Several adapters in one pipeline: how much of each, which rows have which, all in the weights.

    dreamtune.load(pipe, "runs/dog", name="dog")
    dreamtune.load(pipe, "runs/cat", name="cat")
    dreamtune.set_adapters(pipe, {"dog": 1.0, "cat": 0.4})
    with dreamtune.route(pipe, ["dog", "cat", None]):
        images = pipe([p0, p1, p2], num_images_per_prompt=2).images

Each is a change of the base's weights, whatever else is in the model: sums, of which the order does
not matter. A strength is a factor on the change, and on the adapter's own `scale`: 1 is as it was
trained, 0 the base bit for bit. Of ETHER and ETHER+, whose reflections are no sums, 0.5 is half of
the difference that they make to the weight, which is no reflection.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from dreamtune.fields import nearest
from dreamtune.injection.bank import Bank, Copies, check_free, owners
from dreamtune.injection.compiled import follow_compiled
from dreamtune.injection.inject import InjectedAdapter, plainly
from dreamtune.injection.mix import Strength
from dreamtune.injection.region import Region
from dreamtune.injection.shelf import Entry
from dreamtune.pipeline.calls import running_call
from dreamtune.pipeline.load import held_by, network_of
from dreamtune.pipeline.text import GUIDED, encoded

BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
LISTED = 20  # names in a message
Row = str | None | Mapping[str, Strength]


def get_adapters(pipe: Any) -> dict[str, InjectedAdapter | Entry]:
    """Those in the pipeline's network by name, in the order that they were loaded; then those of
    `load_many`.
    """
    network = network_of(pipe)
    found: dict[str, InjectedAdapter | Entry] = {a.name: a for a in InjectedAdapter.of(network)}
    shelves = [bank.mix.shelf for bank in owners(network, Bank)]
    return found | {
        n: e for shelf in shelves if shelf is not None for n, e in shelf.entries.items()
    }


def set_adapters(pipe: Any, strengths: Mapping[str, Strength | Sequence[Strength]]) -> None:
    """Name -> strength; an adapter that is not named is not in use until it is.

    A strength is a number; a mapping of parts of the network to numbers, "down", "mid", "up" or a
    module path such as "up_blocks.1", 1 in what is not named; or a list of either, one a prompt of
    the batch: a sweep in one call.

    Raises:
        ValueError: no adapter of that name, a part that the network does not have, a number that is
        not finite, lists of several lengths, a route that is open.
    """
    adapters = _adapters(pipe)
    if not isinstance(strengths, Mapping):
        raise ValueError(f"`strengths` must be a mapping name -> strength, got {strengths!r}")
    for name in strengths:
        _known(name, adapters)
    lists = {name: s for name, s in strengths.items() if isinstance(s, list | tuple)}
    counts = {len(s) for s in lists.values()}
    if len(counts) > 1 or 0 in counts:
        told = ", ".join(f"`{name}` {len(s)}" for name, s in lists.items())
        raise ValueError(f"lists of strengths must have one for each prompt, got {told}")
    bank = _bank(pipe)
    if not lists:
        unused = {name: 0.0 for name, a in adapters.items() if isinstance(a, InjectedAdapter)}
        bank.set({n: _checked(s, pipe, n) for n, s in {**unused, **strengths}.items()})  # type: ignore[dict-item]
    else:
        (count,) = counts
        rows = [
            {
                name: _checked(s[i] if name in lists else s, pipe, name)  # type: ignore[index]
                for name, s in strengths.items()
            }
            for i in range(count)
        ]
        bank.set({}, rows, _copies(pipe))
    if not bank.mix.plain:
        plainly(network_of(pipe))


@contextmanager
def route(pipe: Any, rows: Sequence[Row]) -> Iterator[None]:
    """Inside, each prompt of a batch has an adapter of its own.

    The pipeline's lock is held: calls from other threads wait until the block is over.

    Args:
        rows: one entry a prompt: a name, at strength 1; None for the base; or a mapping name ->
            strength for several, as in `set_adapters`, or a `Region` of the picture that the
            adapter acts in. Images of one prompt have its entry, and so have its rows without the
            prompt under guidance, in one call or in another: of this pipeline, and of others that
            share its network. Of a network given instead of a pipeline, and of a pipeline that
            tells neither its pictures (`latents` in its call) nor its guidance
            (`do_classifier_free_guidance`), they are the rows of the network's batch. A backward
            that computes blocks again (checkpoints) belongs inside.

    Raises:
        ValueError: as `set_adapters`; regions in a network with attentions that are not known to
        attend place by place; a call inside, where the batch does not have these prompts, a mask
        not the aspect of the picture, or an adapter with a region changes a layer without a place.
    """
    adapters = _adapters(pipe)
    if not isinstance(rows, list | tuple) or not rows:
        raise ValueError(f"`rows` must be a list with an entry for each prompt, got {rows!r}")
    found: list[dict[str, Strength]] = []
    for row in rows:
        given = {} if row is None else {row: 1.0} if isinstance(row, str) else row
        if not isinstance(given, Mapping):
            raise ValueError(
                "an entry of `rows` must be a name, None or a mapping name -> strength, got"
                f" {row!r}"
            )
        for name in given:
            _known(name, adapters)
        found.append({name: _placed(s, pipe, name) for name, s in given.items()})
    bank = _bank(pipe)
    with bank.routed(found, _copies(pipe)):
        plainly(network_of(pipe))
        yield


def unload(pipe: Any, name: str) -> None:
    """Takes one out. Raises ValueError where there is none of that name."""
    adapters, network = _adapters(pipe), network_of(pipe)
    _known(name, adapters)
    with ExitStack() as held:
        for bank in owners(network, Bank):
            held.enter_context(bank.lock)  # another thread's forward is over first
        found = adapters[name]
        if isinstance(found, InjectedAdapter):
            found.eject()
        else:
            bank = _bank(pipe)
            bank.take_out(name)
            if not InjectedAdapter.of(network):
                bank.remove_unless_used()


def merge(pipe: Any) -> None:
    """All adapters, at their strengths, into the weights: no more work at each call. What the
    weights were is kept on the CPU; until `unmerge` nothing else can be done with the adapters.

    Raises:
        ValueError: merged already; several changes for rows of a batch, or a strength that depends
        on the timestep; a weight that would not be finite or cannot be written. Then nothing was
        changed.
    """
    adapters, bank = _adapters(pipe), _bank(pipe)
    with bank.lock:
        loaded = [a for a in adapters.values() if isinstance(a, InjectedAdapter)]
        for adapter in loaded:
            adapter.slow_down()
        bank.merge(loaded)


def unmerge(pipe: Any, force: bool = False) -> None:
    """The weights as they were, bit for bit, and the adapters beside them as before `merge`. force:
    also where weights were changed after it, which is lost.

    Raises:
        ValueError: nothing is merged; weights were changed meanwhile.
    """
    network = network_of(pipe)
    banks = [bank for bank in owners(network, Bank) if bank.written is not None]
    if not banks:
        raise ValueError(f"nothing is merged in this `{type(network).__name__}`")
    with banks[0].lock:
        banks[0].unmerge(force)


def _adapters(pipe: Any) -> dict[str, InjectedAdapter | Entry]:
    """Raises ValueError where there is none, or nothing can be done with them."""
    adapters, network = get_adapters(pipe), network_of(pipe)
    if not adapters:
        raise ValueError(
            f"there is no adapter in this `{type(network).__name__}`: `dreamtune.load` brings one,"
            " `dreamtune.load_many` several"
        )
    check_free(network)
    loaded = {n: a for n, a in adapters.items() if isinstance(a, InjectedAdapter)}
    if several := [name for name, adapter in loaded.items() if adapter.slots > 1]:
        raise ValueError(
            f"`{several[0]}` has several slots, which its own `route` gives to rows:"
            " `dreamtune.load` brings each alone"
        )
    return adapters


def _bank(pipe: Any) -> Bank:
    network = network_of(pipe)
    bank = Bank.on(network, lambda: InjectedAdapter.of(network))
    follow_compiled(bank, held_by(pipe))
    return bank


def _known(name: object, adapters: Mapping[str, object]) -> None:
    if name not in adapters:
        listed = ", ".join(f"`{known}`" for known in list(adapters)[:LISTED])
        listed += f" and {len(adapters) - LISTED} more" if len(adapters) > LISTED else ""
        hint = nearest(name, adapters) if isinstance(name, str) else ""
        raise ValueError(f"no adapter `{name}`.{hint} There are {listed}.")


def _placed(strength: Any, pipe: Any, name: str) -> Strength:
    if not isinstance(strength, Region):
        return _checked(strength, pipe, name)
    text = None if strength.prompt is None else encoded(pipe, strength.prompt)
    return replace(strength, strength=_checked(strength.strength, pipe, name), text=text)


def _checked(strength: Any, pipe: Any, name: str) -> float | Mapping[str, float]:
    """With the paths of the parts."""
    if isinstance(strength, Region):
        raise ValueError(f"`{name}` has a region, which is for the rows of `dreamtune.route`")
    if not isinstance(strength, Mapping):
        return _number(strength, name)
    network: nn.Module = network_of(pipe)
    found: dict[str, float] = {}
    adapter = get_adapters(pipe)[name]
    inside = (
        [p for group in adapter.groups for p in group.names]
        if isinstance(adapter, InjectedAdapter)
        else list(adapter.paths)
    )
    for part, value in strength.items():
        path = str(BLOCKS.get(part, part))
        if not any(p == path or p.startswith(f"{path}.") for p in inside):
            there = sorted({".".join(p.split(".")[:2]) for p in inside})
            raise ValueError(
                f"strength of `{name}`: it changes nothing in a part `{part}` of this"
                f" `{type(network).__name__}`; there are {', '.join(f'`{p}`' for p in there)}, and"
                f" {', '.join(f'`{b}`' for b in BLOCKS)} of a UNet"
            )
        if path in found:
            raise ValueError(f"strength of `{name}`: `{path}` is given twice, also as `{part}`")
        found[path] = _number(value, name)
    return found


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"strength of `{name}` must be a finite number, got {value!r}")
    return float(value)


def _copies(pipe: Any) -> Copies | None:
    """See `Bank.copies`: asked while the network is called. None of a network, not a pipeline."""
    if isinstance(pipe, nn.Module):
        return None
    reference = weakref.ref(pipe)  # the network does not hold its pipeline

    def copies(batch: int) -> Sequence[bool] | None:
        call = running_call()
        held = reference() if call is None else call.pipe
        if held is None:
            raise ValueError("rows are routed by a pipeline that is gone: route by the one in use")
        told = _told(held)
        if call is None or not call.pictures or batch % call.pictures:
            return told
        count = batch // call.pictures
        return told if told and len(told) == count else (*(False,) * (count - 1), True)

    return copies


def _told(pipe: Any) -> Sequence[bool] | None:
    """By what the pipeline says of its guidance."""
    if not hasattr(type(pipe), GUIDED):
        return None
    guided = bool(getattr(pipe, GUIDED, False))  # without: it was never called
    if hasattr(type(pipe), "image_guidance_scale"):  # InstructPix2Pix: text, picture, neither
        return (True, False, False) if guided else (True,)
    perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    return (False,) * guided + (True,) * (1 + perturbed)
