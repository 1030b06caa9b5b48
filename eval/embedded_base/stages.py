"""The stages of the rebuild: autoencoder, latent diffusion, image-text scorer, image scorer.

Each function trains one stage for at most `seconds`, leaves its state in the folder, and returns
whether it is finished. Sizes come from `Plan`, so that the smoke form runs the same code.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import networks
from .captions import BOS, EOS, LENGTH, Scene
from .prompts import test_prompts
from .scenes import Scenes
from .training import Run, autocast, restore


@dataclass(frozen=True)
class Plan:
    """Steps and batches of every stage; the defaults fit one H100 in about 20 minutes."""

    autoencoder_steps: int = 4500
    autoencoder_batch: int = 128
    base_steps: int = 20000
    base_batch: int = 512
    pool: int = 98304  # latents kept on the device; `refresh` of them are replaced in each step
    refresh: int = 64
    clip_steps: int = 5000
    clip_batch: int = 768
    dino_steps: int = 5000
    dino_batch: int = 256
    judge_steps: int = 4000
    judge_batch: int = 384


SMOKE = Plan(2, 2, 2, 2, 4, 2, 2, 2, 2, 2, 2, 2)


def scenes_for(sprites: Path, tokenizer: Path, device: str) -> Scenes:
    from transformers import CLIPTokenizer

    made = Scenes(sprites, device, CLIPTokenizer.from_pretrained(tokenizer))
    known = len(made.words) * 3
    prompts = [row["scene"] for row in test_prompts()]
    made.forbid(Scene.of([s for s in prompts if s["first"] < known and s["second"] < known], device))
    return made


def _edges(x: torch.Tensor) -> list[torch.Tensor]:
    """Horizontal and vertical differences at three scales."""
    out = []
    for _ in range(3):
        out += [x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]]
        x = F.avg_pool2d(x, 2)
    return out


def train_autoencoder(scenes: Scenes, plan: Plan, folder: Path, seconds: float) -> bool:
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

    run = Run("autoencoder", {"vae": (vae, 1.5e-3)}, loss, steps=plan.autoencoder_steps, folder=folder, average=0.998)
    return run.train(seconds)


def load_autoencoder(scenes: Scenes, folder: Path) -> nn.Module:
    """The trained autoencoder with `scaling_factor` = 1 / standard deviation of its latents on scenes."""
    vae = networks.autoencoder().to(scenes.device)
    restore("autoencoder", {"vae": vae}, folder)
    torch.manual_seed(1)
    with torch.no_grad():
        n = 512 if scenes.device.type == "cuda" else 4
        latents = vae.encode(scenes.render(scenes.sample(n))).latents
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    return vae


class Base:
    """UNet and text encoder, trained together on a pool of latents that is refreshed in every step."""

    def __init__(self, scenes: Scenes, plan: Plan):
        device = scenes.device
        self.scenes, self.plan, self.device = scenes, plan, device
        self.unet, self.text = networks.unet().to(device), networks.text_encoder().to(device)
        self.alphas = networks.scheduler().alphas_cumprod.to(device)
        self.empty = torch.full((LENGTH,), EOS, device=device)
        self.empty[0] = BOS
        self.latents = torch.randn(plan.pool, networks.LATENT_CHANNELS, 16, 16, device=device)
        self.ids = self.empty.repeat(plan.pool, 1)
        self.at = torch.zeros((), dtype=torch.long, device=device)
        self.vae: nn.Module | None = None

    def predict(self, z: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(z, t, self.text(ids)[0], return_dict=False)[0]

    def diffusion_loss(self) -> torch.Tensor:
        n = self.plan.base_batch
        j = torch.randint(self.plan.pool, (n,), device=self.device)
        dropped = torch.rand(n, 1, device=self.device) < 0.1
        ids = torch.where(dropped, self.empty, self.ids[j])
        z, noise = self.latents[j], torch.randn(n, *self.latents.shape[1:], device=self.device)
        t = torch.randint(1000, (n,), device=self.device)
        a = self.alphas[t][:, None, None, None]
        with autocast(self.device):
            v = self.predict(a.sqrt() * z + (1 - a).sqrt() * noise, t, ids)
        return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * z)

    @torch.no_grad()
    def encode(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, ids = self.scenes.batch(n)
        dtype = next(self.vae.parameters()).dtype
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return self.vae.encoder(x).float() * self.vae.config.scaling_factor, ids

    def refresh(self) -> None:
        n = self.plan.refresh
        rows = self.at + torch.arange(n, device=self.device)
        z, ids = self.encode(n)
        self.latents.index_copy_(0, rows, z.contiguous())
        self.ids.index_copy_(0, rows, ids)
        self.at.copy_((self.at + n) % self.plan.pool)

    def warm_up(self) -> None:
        """Compile on random latents: needs no autoencoder, so it can run beside that stage."""
        if self.device.type == "cuda":
            self.predict = torch.compile(self.predict, dynamic=False)
            self.diffusion_loss().backward()
            torch.cuda.synchronize()

    def fill(self, vae: nn.Module) -> None:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.vae = copy.deepcopy(vae).to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)
        torch.manual_seed(2)
        for start in range(0, self.plan.pool, 512):
            n = min(512, self.plan.pool - start)
            self.latents[start : start + n], self.ids[start : start + n] = self.encode(n)

    def train(self, vae: nn.Module, folder: Path, seconds: float) -> bool:
        self.fill(vae)
        modules = {"unet": (self.unet, 1e-3), "text": (self.text, 5e-4)}
        run = Run("base", modules, self.diffusion_loss, steps=self.plan.base_steps, folder=folder,
                  average=0.9985, after=self.refresh)  # fmt: skip
        return run.train(seconds)


def train_clip(scenes: Scenes, plan: Plan, folder: Path, seconds: float) -> bool:
    """The image-text scorer, with open_clip's loss."""
    import open_clip

    device = scenes.device
    model, contrast = networks.clip().to(device), open_clip.ClipLoss()

    def loss() -> torch.Tensor:
        with torch.no_grad():
            x, ids = scenes.batch(plan.clip_batch)
            x = _blurred(x)
        with autocast(device):
            image, text, scale = model(x, ids)
        return contrast(image.float(), text.float(), scale.clamp(max=100.0))

    run = Run("clip", {"clip": (model, 1.5e-3)}, loss, steps=plan.clip_steps, folder=folder, weight_decay=0.05,
              average=0.998)  # fmt: skip
    return run.train(seconds)


def _blurred(x: torch.Tensor) -> torch.Tensor:
    """A random part of the softness that an autoencoder leaves, on every image."""
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    return torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1, device=x.device) ** 2)


def _crops(x: torch.Tensor, size: int, least: float) -> torch.Tensor:
    """Random square crops of side `least` to 1 of the image, resized to `size`, shade varied a little."""
    n, device = len(x), x.device
    side = least + (1 - least) * torch.rand(n, device=device)
    cx, cy = (2 * torch.rand(2, n, device=device) - 1) * (1 - side)
    zero = torch.zeros_like(side)
    theta = torch.stack([torch.stack([side, zero, cx], 1), torch.stack([zero, side, cy], 1)], 1)
    y = F.grid_sample(x, F.affine_grid(theta, [n, 3, size, size], align_corners=False), align_corners=False)
    gain = 1 + 0.2 * (torch.rand(n, 1, 1, 1, device=device) - 0.5)
    return (y * gain + 0.1 * (torch.rand(n, 1, 1, 1, device=device) - 0.5)).clamp(-1, 1)


class DINO:
    """Self-distillation (arXiv 2104.14294) with lightly's loss, and open_clip's contrastive loss between the views.

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
            return nn.ModuleList([networks.dino_vit(), DINOProjectionHead(width, 512, 128, 2048)]).to(device)

        student, self.teacher = network(), network().requires_grad_(False)
        self.vit, self.head = student
        self.pair = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 128)).to(device)
        self.distil = InPlaceCentre(2048, teacher_temp=0.05, warmup_teacher_temp=0.05).to(device)
        self.contrast = ClipLoss()

    def view(self, sprite: torch.Tensor) -> torch.Tensor:
        s = self.scenes.sample(self.n)
        s.first, s.second = sprite, self.scenes.any_sprite(self.n)
        s.look = s.look * (s.look == 2)
        s.kind = torch.where(torch.rand(self.n, device=self.device) < 0.85, 0, 2 + (s.kind > 2).long())
        return _blurred(self.scenes.render(s, turns=0.4))

    def loss(self) -> torch.Tensor:
        with torch.no_grad():
            sprite = self.scenes.any_sprite(self.n)
            one, two = self.view(sprite), self.view(sprite)
            wide = torch.cat([_crops(one, 128, 0.75), _crops(two, 128, 0.75)])
            local = torch.cat([_crops(v, 64, 0.4) for v in (one, two, one, two)])
            with autocast(self.device):
                vit, head = self.teacher
                target = head(vit(pixel_values=wide).last_hidden_state[:, 0]).float()
        with autocast(self.device):
            feature = self.vit(pixel_values=wide).last_hidden_state[:, 0]
            small = self.vit(pixel_values=local, interpolate_pos_encoding=True).last_hidden_state[:, 0]
            out = self.head(torch.cat([feature, small])).float()
            a, b = F.normalize(self.pair(feature).float(), dim=1).chunk(2)
        distilled = self.distil(list(target.chunk(2)), list(out.chunk(6)))
        direct = self.contrast(*(F.normalize(f.float(), dim=1) for f in feature.chunk(2)), 10.0)
        return distilled + self.contrast(a, b, 10.0) + 0.5 * direct

    def follow(self) -> None:
        """The teacher is the average of the student."""
        student = [*self.vit.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), student, 0.004)

    def train(self, plan: Plan, folder: Path, seconds: float) -> bool:
        modules = {"vit": (self.vit, 1e-3), "head": (self.head, 1e-3), "pair": (self.pair, 1e-3)}
        run = Run("dino", modules, self.loss, steps=plan.dino_steps, folder=folder, weight_decay=0.04,
                  after=self.follow, flat=0.2, average=0.998)  # fmt: skip
        self.teacher.load_state_dict(nn.ModuleList([self.vit, self.head]).state_dict())  # also after a restart
        return run.train(seconds)
