"""The stages of the rebuild: autoencoder, latent diffusion, image-text scorer, image scorer.

Each function trains one stage for at most `seconds`, leaves its state in the folder, and returns
whether it is finished. Sizes come from `Plan`, so that the smoke form runs the same code.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import networks
from .captions import BOS, EOS, LENGTH, Scene
from .prompts import test_prompts
from .scenes import Scenes
from .training import Pool, Run, autocast, restore


@dataclass(frozen=True)
class Plan:
    """Steps and batches of every stage; the defaults take one H100 about half an hour."""

    autoencoder_steps: int = 4000
    autoencoder_batch: int = 64
    base_steps: int = 20000
    base_batch: int = 512
    pool: int = 98304  # latents kept on the device; `refresh` of them are replaced in each step
    refresh: int = 64
    clip_steps: int = 6000
    clip_batch: int = 384
    dino_steps: int = 8000
    dino_batch: int = 160


SMOKE = Plan(2, 2, 2, 2, 8, 2, 2, 2, 2, 2)


def scenes_for(sprites: Path, tokenizer: Path, device: str) -> Scenes:
    from transformers import CLIPTokenizer

    made = Scenes(sprites, device, CLIPTokenizer.from_pretrained(tokenizer))
    known = len(made.words) * 3
    prompts = [row["scene"] for row in test_prompts()]
    made.forbid(
        Scene.of([s for s in prompts if s["first"] < known and s["second"] < known], device)
    )
    return made


def _edges(x: torch.Tensor) -> list[torch.Tensor]:
    """Horizontal and vertical differences at three scales."""
    out = []
    for _ in range(3):
        out += [x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]]
        x = F.avg_pool2d(x, 2)
    return out


def train_autoencoder(scenes: Scenes, plan: Plan, folder: Path, seconds: float, fit: bool) -> bool:
    """L1 + 4 MSE + 0.5 edge differences, noise on the latents; sprites of the whole packages."""
    device = scenes.device
    vae = networks.autoencoder().to(device, memory_format=torch.channels_last)
    n = plan.autoencoder_batch

    def loss() -> torch.Tensor:
        with torch.no_grad():
            s = scenes.sample(n)
            s.first, s.second = scenes.any_sprite(n), scenes.any_sprite(n)
            x = scenes.render(s, turns=0.5).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            z = vae.encoder(x)
            y = vae.decoder(z + 0.05 * torch.randn_like(z))
        y, z = y.float(), z.float()
        edges = sum(F.l1_loss(a, b) for a, b in zip(_edges(y), _edges(x), strict=True)) / 6
        return F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + 0.5 * edges + 0.002 * z.square().mean()

    run = Run(
        "autoencoder",
        {"vae": (vae, 1.5e-3)},
        loss,
        steps=plan.autoencoder_steps,
        folder=folder,
        average=0.998,
    )
    return run.train(seconds, fit)


def load_autoencoder(scenes: Scenes, folder: Path) -> nn.Module:
    """The trained autoencoder; `scaling_factor` is 1 / deviation of its latents on scenes."""
    vae = networks.autoencoder().to(scenes.device)
    restore("autoencoder", {"vae": vae}, folder)
    torch.manual_seed(1)
    with torch.no_grad():
        n = 512 if scenes.device.type == "cuda" else 4
        latents = vae.encode(scenes.render(scenes.sample(n))).latents
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    return vae


class Base:
    """UNet and text encoder, trained together on a pool of latents, refreshed in every step."""

    def __init__(self, scenes: Scenes, plan: Plan):
        self.scenes, self.plan, self.device = scenes, plan, scenes.device
        self.unet, self.text = (
            networks.unet().to(self.device),
            networks.text_encoder().to(self.device),
        )
        self.alphas = networks.scheduler().alphas_cumprod.to(self.device)
        self.empty = torch.full((LENGTH,), EOS, device=self.device)
        self.empty[0] = BOS

    def predict(self, z: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(z, t, self.text(ids)[0], return_dict=False)[0]

    def diffusion_loss(self, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """v-prediction error of latents z (B, C, 16, 16), captions ids (B, 32), a tenth empty."""
        ids = torch.where(torch.rand(len(z), 1, device=self.device) < 0.1, self.empty, ids)
        noise, t = torch.randn_like(z), torch.randint(1000, (len(z),), device=self.device)
        a = self.alphas[t][:, None, None, None]
        with autocast(self.device):
            v = self.predict(a.sqrt() * z + (1 - a).sqrt() * noise, t, ids)
        return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * z)

    def warm_up(self) -> None:
        """Compile on random latents: needs no autoencoder, so it can run beside that stage."""
        if self.device.type == "cuda":
            self.predict = torch.compile(self.predict, dynamic=False)
            n = self.plan.base_batch
            z = torch.randn(n, networks.LATENT_CHANNELS, 16, 16, device=self.device)
            self.diffusion_loss(z, self.empty.repeat(n, 1)).backward()
            torch.cuda.synchronize()

    def train(self, vae: nn.Module, folder: Path, seconds: float, fit: bool) -> bool:
        begin = time.time()
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        encoder = copy.deepcopy(vae.encoder).to(dtype=dtype, memory_format=torch.channels_last)
        scale = vae.config.scaling_factor

        @torch.no_grad()
        def encoded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, ids = self.scenes.batch(len(rows))
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
            return encoder(x).float() * scale, ids

        pool = Pool(encoded, self.plan.pool, self.plan.refresh, self.device)
        modules = {"unet": (self.unet, 1e-3), "text": (self.text, 5e-4)}
        run = Run(
            "base",
            modules,
            lambda: self.diffusion_loss(*pool.draw(self.plan.base_batch)),
            steps=self.plan.base_steps,
            folder=folder,
            average=0.9985,
            after=pool.refresh,
        )
        return run.train(seconds - (time.time() - begin), fit)


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as uint8, to be kept in a pool."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


def to_pictures(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 127.5 - 1


def train_clip(scenes: Scenes, plan: Plan, folder: Path, seconds: float, fit: bool) -> bool:
    """The image-text scorer, with open_clip's loss."""
    import open_clip

    device = scenes.device
    model, contrast = networks.clip().to(device), open_clip.ClipLoss()
    model.visual.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def pairs(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, ids = scenes.batch(len(rows))
        return to_bytes(x), ids

    pool = Pool(pairs, min(plan.pool, 32768), plan.refresh, device)

    def loss() -> torch.Tensor:
        x, ids = pool.draw(plan.clip_batch)
        with torch.no_grad():
            x = _blurred(to_pictures(x)).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            image, text, scale = model(x, ids)
        return contrast(image.float(), text.float(), scale.clamp(max=100.0))

    run = Run(
        "clip",
        {"clip": (model, 1.5e-3)},
        loss,
        steps=plan.clip_steps,
        folder=folder,
        weight_decay=0.05,
        average=0.998,
        after=pool.refresh,
    )
    return run.train(seconds, fit)


def _blurred(x: torch.Tensor) -> torch.Tensor:
    """A random part of the softness that an autoencoder leaves, on every image."""
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    return torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1, device=x.device) ** 2)


def _crops(x: torch.Tensor, size: int, least: float) -> torch.Tensor:
    """Random square crops, side `least` to 1 of the image, resized to `size`, shade varied."""
    n, device = len(x), x.device
    side = least + (1 - least) * torch.rand(n, device=device)
    cx, cy = (2 * torch.rand(2, n, device=device) - 1) * (1 - side)
    zero = torch.zeros_like(side)
    theta = torch.stack([torch.stack([side, zero, cx], 1), torch.stack([zero, side, cy], 1)], 1)
    y = F.grid_sample(
        x, F.affine_grid(theta, [n, 3, size, size], align_corners=False), align_corners=False
    )
    gain = 1 + 0.2 * (torch.rand(n, 1, 1, 1, device=device) - 0.5)
    return (y * gain + 0.1 * (torch.rand(n, 1, 1, 1, device=device) - 0.5)).clamp(-1, 1)


class DINO:
    """Self-distillation (arXiv 2104.14294) with lightly's loss, open_clip's loss between the views.

    A view is one sprite of the packages on a random ground: no concept, style or caption is used.
    """

    def __init__(self, scenes: Scenes, plan: Plan):
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from open_clip import ClipLoss

        class InPlaceCentre(DINOLoss):
            """lightly rebinds the centre in each step, which a captured step cannot see."""

            @torch.no_grad()
            def update_center(self, teacher_out: torch.Tensor) -> None:
                self.center.lerp_(teacher_out.mean((0, 1), keepdim=True), 1 - self.center_momentum)

        device = scenes.device
        self.scenes, self.n, self.device = scenes, plan.dino_batch, device
        width = networks.dino_vit().config.hidden_size

        def network() -> nn.ModuleList:
            return nn.ModuleList(
                [networks.dino_vit(), DINOProjectionHead(width, 512, 128, 2048)]
            ).to(device)

        student, self.teacher = network(), network().requires_grad_(False)
        self.vit, self.head = student
        self.pair = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 128)).to(device)
        self.distil = InPlaceCentre(2048, teacher_temp=0.05, warmup_teacher_temp=0.05).to(device)
        self.contrast = ClipLoss()

    @torch.no_grad()
    def view(self, rows: torch.Tensor) -> tuple[torch.Tensor]:
        """Row i of the pool shows sprite i modulo the number of sprites, on a random ground."""
        n, sprites = len(rows), self.scenes.everything
        s = self.scenes.sample(n)
        s.first, s.second = sprites[rows % len(sprites)], self.scenes.any_sprite(n)
        s.look = s.look * (s.look == 2)
        s.kind = torch.where(torch.rand(n, device=self.device) < 0.85, 0, 2 + (s.kind > 2).long())
        return (to_bytes(self.scenes.render(s, turns=0.4)),)

    def loss(self) -> torch.Tensor:
        with torch.no_grad():
            count = len(self.scenes.everything)
            sprite = torch.randint(count, (self.n,), device=self.device)
            copies = self.pool.size // count
            first = torch.randint(copies, (self.n,), device=self.device)
            second = (first + torch.randint(1, copies, (self.n,), device=self.device)) % copies
            one, two = (
                _blurred(to_pictures(self.pool.rows(k * count + sprite)[0]))
                for k in (first, second)
            )
            wide = torch.cat([_crops(one, 128, 0.75), _crops(two, 128, 0.75)])
            local = torch.cat([_crops(one, 64, 0.4), _crops(two, 64, 0.4)])
            with autocast(self.device):
                vit, head = self.teacher
                target = head(vit(pixel_values=wide).last_hidden_state[:, 0]).float()
        with autocast(self.device):
            feature = self.vit(pixel_values=wide).last_hidden_state[:, 0]
            small = self.vit(pixel_values=local, interpolate_pos_encoding=True).last_hidden_state[
                :, 0
            ]
            out = self.head(torch.cat([feature, small])).float()
            a, b = F.normalize(self.pair(feature).float(), dim=1).chunk(2)
        distilled = self.distil(list(target.chunk(2)), list(out.chunk(4)))
        direct = self.contrast(*(F.normalize(f.float(), dim=1) for f in feature.chunk(2)), 10.0)
        return distilled + self.contrast(a, b, 10.0) + 0.5 * direct

    def follow(self) -> None:
        """The teacher is the average of the student."""
        self.pool.refresh()
        student = [*self.vit.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), student, 0.004)

    def train(self, plan: Plan, folder: Path, seconds: float, fit: bool) -> bool:
        begin = time.time()
        copies = max(2, min(plan.pool, 40000) // len(self.scenes.everything))
        self.pool = Pool(self.view, copies * len(self.scenes.everything), plan.refresh, self.device)
        modules = {"vit": (self.vit, 1e-3), "head": (self.head, 1e-3), "pair": (self.pair, 1e-3)}
        run = Run(
            "dino",
            modules,
            self.loss,
            steps=plan.dino_steps,
            folder=folder,
            weight_decay=0.04,
            after=self.follow,
            flat=0.2,
            average=0.998,
        )
        self.teacher.load_state_dict(
            nn.ModuleList([self.vit, self.head]).state_dict()
        )  # also after a restart
        return run.train(seconds - (time.time() - begin), fit)
