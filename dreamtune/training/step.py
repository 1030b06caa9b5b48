"""One training step: draws, noise, network, loss per slot, backward, clipping, optimizer.

S slots train at once on a batch of S contiguous blocks. A step is a function of static tensors and
one generator a slot, reseeded from (slot seed, k): no host sync and no shape that depends on data,
so that it runs eagerly or in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dreamtune.models.base import Process
from dreamtune.models.conditioning import Conditioning
from dreamtune.training.cache import Cache, Pool
from dreamtune.training.loss import slot_losses
from dreamtune.training.optim import SlotAdamW, clip_factors, slot_norms

MASK64 = (1 << 64) - 1
GROWTH_INTERVAL = 2000  # steps without overflow until the loss scale is doubled, as torch has it


def mix(seed: int, k: int) -> int:
    """A generator seed of 63 bits from (seed, k), by splitmix64: neighbours differ in about half
    their bits, and no two of a run's are the same but by chance.

    A GPU's generator takes all bits. The CPU's takes the lower 32: of N steps about N^2 / 2^33
    pairs have the same draws, one pair in 90,000 steps.
    """
    z = (seed * 0x9E3779B97F4A7C15 + k * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return (z ^ (z >> 31)) >> 1


@dataclass(frozen=True)
class Draw:
    """What a step takes at random; rows are S blocks of photos, then class images."""

    entry: Tensor  # (S * n,) rows of the cache
    timestep: Tensor  # (S * n,)
    noise: Tensor  # (S * n, ...), shaped like latents
    latent_noise: Tensor | None  # the same, where latents have a spread


def draw(
    cache: Cache,
    pools: Sequence[Pool],
    generators: Sequence[torch.Generator],
    batch: int,
    process: Process,
) -> Draw:
    """The random part of a step. A slot's draws come from its own generator alone.

    A batch is drawn from a pool without putting back, as long as there is enough: an entry that
    stands there w times is drawn w times as often, and is in a batch up to w times. Timesteps of a
    batch are stratified: each is uniform, together they cover the range, which takes variance out
    of the gradient; with one row it is plain uniform.
    """
    device, shape = cache.mean.device, cache.mean.shape[1:]
    spread = torch.arange(batch, device=device)
    entries, times, noises, latent_noises = [], [], [], []
    for slot, generator in enumerate(generators):
        for pool in pools:
            tickets = pool[slot]
            order = torch.rand(len(tickets), generator=generator, device=device).argsort()
            entries.append(tickets[order[spread % len(tickets)]])
            u = torch.rand(1, generator=generator, device=device)
            times.append(process.timesteps((u + spread / batch) % 1))
        n = batch * len(pools)
        noises.append(
            torch.randn(n, *shape, generator=generator, device=device, dtype=cache.mean.dtype)
        )
        if cache.std is not None:
            latent_noises.append(
                torch.randn(n, *shape, generator=generator, device=device, dtype=cache.mean.dtype)
            )
    return Draw(
        torch.cat(entries),
        torch.cat(times),
        torch.cat(noises),
        torch.cat(latent_noises) if latent_noises else None,
    )


@dataclass(frozen=True)
class StepSettings:
    """The constants of a step, by the names that a config has for them."""

    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    prior_loss_weight: float = 1.0
    max_grad_norm: float = 1.0
    # A power of two that keeps small gradients above fp16's smallest number; halved when a step
    # overflows, doubled up to this again after GROWTH_INTERVAL steps in a row that did not.
    loss_scale: float = 1.0

    @classmethod
    def of(cls, config: object, loss_scale: float) -> StepSettings:
        """The config's values of the same names."""
        names = [f.name for f in fields(cls) if f.name != "loss_scale"]
        return cls(**{name: getattr(config, name) for name in names}, loss_scale=loss_scale)


class Step:
    """`step(k, multiplier)` is optimizer step k, with the learning rates times `multiplier`.

    Returns nothing: read `loss`.

    loss (S,): of the last step; loss_sum, loss_count (S,): since `forget_mean_loss`; skipped (S,):
    steps whose loss or gradient was not finite, which changed nothing; skipped_now (S,): how many
    in a row; loss_scale, good (S,): the scale, and how many steps in a row it has held.

    Args:
        predict: the network's prediction for (noisy latents, timesteps, conditioning), each with
            a row an image.
        pools: photos, and class images if the prior is preserved.
        process: noise and target.
        seeds: one a slot.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Conditioning], Tensor],
        optimizer: SlotAdamW,
        cache: Cache,
        pools: Sequence[Pool],
        process: Process,
        seeds: Sequence[int],
        settings: StepSettings,
    ) -> None:
        self.predict, self.optimizer, self.cache, self.pools = predict, optimizer, cache, pools
        self.process, self.seeds, self.settings = process, seeds, settings
        device, slots = cache.mean.device, len(seeds)
        assert slots == optimizer.slots == len(pools[0])
        self.generators = [torch.Generator(device) for _ in seeds]
        kind = optimizer.count.dtype
        self.loss = torch.zeros(slots, device=device, dtype=kind)
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss), torch.zeros_like(self.loss)
        self.skipped, self.skipped_now = torch.zeros_like(self.loss), torch.zeros_like(self.loss)
        self.loss_scale = torch.full_like(self.loss, settings.loss_scale)
        self.good = torch.zeros_like(self.loss)

    def __call__(self, k: int, multiplier: float) -> None:
        self.prepare(k, multiplier)
        self.body()

    def prepare(self, k: int, multiplier: float) -> None:
        """The part that talks to the host: seeds and schedule."""
        for generator, seed in zip(self.generators, self.seeds, strict=True):
            generator.manual_seed(mix(seed, k))
        self.optimizer.schedule.fill_(multiplier)

    def body(self) -> None:
        """The part on the device, the same work every time."""
        settings, params = self.settings, self.optimizer.params
        loss = torch.zeros_like(self.loss)
        gradients: list[Tensor] = []
        for _ in range(settings.gradient_accumulation_steps):
            part = self.losses(
                draw(
                    self.cache, self.pools, self.generators, settings.train_batch_size, self.process
                )
            )
            scaled = part * self.loss_scale / settings.gradient_accumulation_steps
            # A thread that multiplies has a workspace of its own, 32 MiB a stream on a large GPU:
            # the backward uses that of the forward.
            with torch.autograd.set_multithreading_enabled(False):
                new = torch.autograd.grad(scaled.sum(), params)
            gradients = [a.add_(b) for a, b in zip(gradients, new)] if gradients else list(new)
            loss += part.detach() / settings.gradient_accumulation_steps
        flats = self.optimizer.gather(gradients)
        norms = slot_norms(flats) / self.loss_scale
        ok = norms.isfinite() & loss.isfinite()
        scale = clip_factors(norms, settings.max_grad_norm) / self.loss_scale
        self.optimizer.step(flats, scale, ok)
        self.account(loss, ok)

    def losses(self, drawn: Draw) -> Tensor:
        """(S,) for one batch."""
        cache, settings, t = self.cache, self.settings, drawn.timestep
        latents = cache.mean[drawn.entry]
        if cache.std is not None and drawn.latent_noise is not None:
            latents = latents + cache.std[drawn.entry] * drawn.latent_noise
        noisy = self.process.noised(latents, drawn.noise, t)
        prediction = self.predict(noisy, t, cache.conditioning(drawn.entry))
        target = self.process.target(latents, drawn.noise, t)
        weight = self.process.weight(t)
        return slot_losses(
            prediction,
            target,
            weight,
            len(self.seeds),
            settings.train_batch_size,
            settings.prior_loss_weight,
        )

    @torch.no_grad()
    def account(self, loss: Tensor, ok: Tensor) -> None:
        self.loss.copy_(loss)
        self.loss_sum += loss.masked_fill(~ok, 0.0)
        self.loss_count += ok
        self.skipped += ~ok
        self.skipped_now.add_(1).masked_fill_(ok, 0.0)
        if self.settings.loss_scale != 1.0:
            self.good.add_(1).masked_fill_(~ok, 0.0)
            grown = self.good == GROWTH_INTERVAL
            self.good.masked_fill_(grown, 0.0)
            scale = torch.where(ok, self.loss_scale * (1 + grown), self.loss_scale / 2)
            self.loss_scale.copy_(scale.clamp(1.0, self.settings.loss_scale))

    def mean_loss(self) -> list[float]:
        """Of each slot since `forget_mean_loss` (nan without a step). A host sync."""
        return (self.loss_sum / self.loss_count).tolist()

    def forget_mean_loss(self, slot: int) -> None:
        """Apart from reading it: what was read may never have been written down."""
        self.loss_sum[slot] = 0.0
        self.loss_count[slot] = 0.0

    def reads(self) -> list[Tensor]:
        """Tensors that a step reads and does not change."""
        pools = [tickets for pool in self.pools for tickets in pool]
        return [*self.cache.tensors(), *pools, *self.process.constants()]

    def changes(self) -> list[Tensor]:
        """Tensors that a step changes."""
        return [*self.optimizer.params, *self.state_dict().values()]

    def state_dict(self, slot: int | None = None) -> dict[str, Tensor]:
        """Everything that a step changes, but the adapter; of one slot as if it were alone."""
        first, length = (0, len(self.seeds)) if slot is None else (slot, 1)
        names = ["loss", "loss_sum", "loss_count", "skipped", "skipped_now", "loss_scale", "good"]
        own = {k: getattr(self, k).narrow(0, first, length) for k in names}
        return {f"step.{k}": v for k, v in own.items()} | {
            f"optimizer.{k}": v for k, v in self.optimizer.state_dict(slot).items()
        }

    def load_state_dict(self, state: dict[str, Tensor], slot: int | None = None) -> None:
        mine = self.state_dict(slot)
        for key, tensor in state.items():
            if key.startswith("step."):
                mine[key].copy_(tensor)
        self.optimizer.load_state_dict(
            {k[10:]: v for k, v in state.items() if k.startswith("optimizer.")}, slot
        )
