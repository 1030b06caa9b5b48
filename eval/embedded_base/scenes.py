"""Scenes composed on the device from packed sprites: pictures (B, 3, 128, 128) and their captions.

Pictures are in [-1, 1].
"""

from __future__ import annotations

import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .captions import COLORS, NONCES, PATTERNS, SCENERY, Grammar, Scene, Wording
from .sources import SIZE, STYLES, vocabulary


def read_sprites(path: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """(N, 4, 128, 128) uint8 with straight alpha, and rows [word, category, subcategory]."""
    packed = np.load(path)
    blob, offset = packed["blob"].tobytes(), packed["offset"]

    def decode(i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(blob[offset[i] : offset[i + 1]])).convert("RGBA"))

    with ThreadPoolExecutor(16) as pool:
        sprites = np.stack(list(pool.map(decode, range(len(offset) - 1))))
    return torch.from_numpy(sprites).permute(0, 3, 1, 2).contiguous(), json.loads(
        packed["concepts"].tobytes()
    )


def subject_sprite(name: str, words: list[str]) -> int:
    """Sprite index of a held-out subject named "<style> <word>"."""
    style, word = name.split(" ", 1)
    return words.index(word) * len(STYLES) + STYLES.index(style)


class Scenes:
    """Sampler and renderer. Every random draw is a device tensor: a step with it is capturable.

    Held-out subjects are never drawn by `sample` or `any_sprite`; `forbid` excludes the
    combinations of the fixed test prompts as well.
    """

    def __init__(self, sprites: Path, device="cpu", tokenizer=None):
        atlas, table = read_sprites(sprites)
        self.device = torch.device(device)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.atlas = torch.empty(atlas.shape, dtype=dtype, device=device)
        for i in range(0, len(atlas), 512):
            part = atlas[i : i + 512].to(device).float() / 255
            part[:, :3] *= part[:, 3:]
            self.atlas[i : i + 512] = part.to(dtype)
        self.words = [row[0] for row in table]
        self.groups = [row[2] for row in table]
        self.grammar = Grammar(self.words, tokenizer, device)
        subjects = vocabulary()["subjects"]
        names = [
            n
            for split in ("dev", "report")
            for n in subjects[split]
            if n.split(" ", 1)[1] in self.words
        ]
        self.held = {subject_sprite(name, self.words) for name in names}
        self.subjects = {
            name: subject_sprite(name, self.words)
            for name in names
            if name not in subjects["withdrawn"]
        }
        known = len(self.words) * len(STYLES)
        self.allowed = torch.tensor([i for i in range(known) if i not in self.held], device=device)
        self.everything = torch.tensor(
            [i for i in range(len(atlas)) if i not in self.held], device=device
        )
        self.rgb = torch.tensor(list(COLORS.values()), device=device).float() / 255
        self._colors: dict[tuple[float, float, float], torch.Tensor] = {}
        self.white = list(COLORS).index("white")
        count = len(self.words)
        self.banned = torch.zeros(
            count, len(PATTERNS) + len(SCENERY), len(COLORS), dtype=torch.bool, device=device
        )
        self.banned_pair = torch.zeros(count, count, dtype=torch.bool, device=device)
        axis = (torch.arange(SIZE, device=device).float() + 0.5) / SIZE
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")

    def forbid(self, scenes: Scene) -> None:
        """Never sample these (concept, ground, colour) and (concept, concept) pairings again."""
        for s in (scenes[i : i + 1] for i in range(len(scenes))):
            if int(s.kind) < 2:
                color = s.color if int(s.ground) < len(PATTERNS) else slice(None)
                self.banned[s.first // 3, s.ground, color] = True
            else:
                self.banned_pair[s.first // 3, s.second // 3] = True

    def _int(self, high: int, n: int) -> torch.Tensor:
        return torch.randint(high, (n,), device=self.device)

    def _rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=self.device)

    def _color(self, rgb: tuple[float, float, float]) -> torch.Tensor:
        """(1, 3, 1, 1) in [0, 1], made once: a captured step may not copy from the host."""
        if rgb not in self._colors:
            self._colors[rgb] = (
                torch.tensor(rgb, device=self.device)[None, :, None, None] / 255
            ).to(self.atlas.dtype)
        return self._colors[rgb]

    def any_sprite(self, n: int) -> torch.Tensor:
        """(n,) sprites of the whole packages, named by a concept or not."""
        return self.everything[self._int(len(self.everything), n)]

    def sample(self, n: int) -> Scene:
        """n random scenes of the training distribution."""
        first = self.allowed[self._int(len(self.allowed), n)]
        second = self.allowed[self._int(len(self.allowed), n)]
        u = self._rand(n)
        kind = (u > 0.70).long() + (u > 0.78).long() + (u > 0.92).long()
        second = torch.where(self.banned_pair[first // 3, second // 3] & (kind >= 2), first, second)
        v = self._rand(n)
        look = (v > 0.85).long() + (v > 0.91).long() + (v > 0.955).long()
        u = self._rand(n)
        size = torch.where(kind == 0, (u < 0.2).long() + 2 * (u > 0.87).long(), 0)
        place = torch.where(size == 1, self._int(7, n), 0)
        place = torch.where(place < 5, place, 0)
        u = self._rand(n)
        ground = ((u > 0.52).long() + (u > 0.60).long() + (u > 0.66).long() + (u > 0.72).long()
                  + (u > 0.78).long() * (1 + self._int(len(SCENERY), n)))  # fmt: skip
        color = torch.where(self._rand(n) < 0.14, self.white, self._int(len(COLORS), n))
        for _ in range(2):  # no concept has more than two banned grounds of a sort
            blocked = self.banned[first // 3, ground, color] & (kind < 2)
            color = torch.where(blocked, (color + 7) % len(COLORS), color)
            next_scenery = len(PATTERNS) + (ground - len(PATTERNS) + 1) % len(SCENERY)
            ground = torch.where(blocked & (ground >= len(PATTERNS)), next_scenery, ground)
        color2 = (color + 1 + self._int(len(COLORS) - 1, n)) % len(COLORS)
        return Scene(kind, first, second, look, size, place, ground, color, color2)

    def wording(self, s: Scene) -> Wording:
        n = len(s)
        r = self._rand(5, n)
        unsaid = torch.where((s.ground == 0) & (s.color == self.white), 0.4, 0.9)
        nonce = torch.where(r[4] < 0.08, 1 + self._int(len(NONCES), n), 0)
        return Wording(r[0] < 0.6, r[1] < 0.6, r[2] < unsaid, r[3] < 0.06, nonce)

    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """n training pairs: pictures (n, 3, 128, 128) and token ids (n, 32)."""
        s = self.sample(n)
        return self.render(s), self.grammar.encode(self.grammar.slots(s, self.wording(s)))

    def background(self, s: Scene) -> torch.Tensor:
        """(B, 3, 128, 128) in [0, 1]."""
        n = len(s)
        x, y = self.x[None], self.y[None]
        jitter = (self._rand(2, n, 3) - 0.5) * 0.06
        base = (self.rgb[s.color] + jitter[0] * (s.color != self.white)[:, None]).clamp(0, 1)[
            :, :, None, None
        ]
        other = (self.rgb[s.color2] + jitter[1]).clamp(0, 1)[:, :, None, None]
        f = (3.0 + self._int(4, n).float())[:, None, None]
        phase = self._rand(n)[:, None, None]
        angle = (self._int(4, n).float() * (math.pi / 4))[:, None, None]

        def wave(
            t: torch.Tensor, f: torch.Tensor
        ) -> torch.Tensor:  # antialiased square wave, period 1/f
            return (torch.sin(2 * math.pi * t) * (SIZE / (2 * math.pi * f)) + 0.5).clamp(0, 1)

        stripe = wave((x * torch.cos(angle) + y * torch.sin(angle)) * f + phase, f)
        dx, dy = (x * f + phase) % 1 - 0.5, (y * f + phase * 2) % 1 - 0.5
        dots = ((0.28 - (dx * dx + dy * dy).sqrt()) * (SIZE / f) + 0.5).clamp(0, 1)
        g = f / 1.3
        check = (wave(x * g + phase, g) * 2 - 1) * (wave(y * g + phase * 2, g) * 2 - 1) * 0.5 + 0.5
        masks = torch.stack([torch.zeros_like(stripe), y.expand(n, -1, -1), stripe, dots, check], 1)
        row = torch.arange(n, device=self.device)
        mask = masks[row, s.ground.clamp(max=len(PATTERNS) - 1)][:, None]
        mask, base, other = (v.to(self.atlas.dtype) for v in (mask, base, other))
        flat = base * (1 - mask) + other * mask
        scenery = self._scenery(s, phase, f)
        return torch.where((s.ground >= len(PATTERNS))[:, None, None, None], scenery, flat)

    def _scenery(self, s: Scene, phase: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        """Horizon pictures: sky, ground, one detail each (tufts, waves, flakes, stars, sun)."""
        x, y = self.x[None], self.y[None]

        def mix(a, b, t):
            lo, hi = self._color(a), self._color(b)
            return lo + (hi - lo) * t[:, None].clamp(0, 1).to(lo.dtype)

        def over(image, color, mask):
            return image + (self._color(color) - image) * mask[:, None].clamp(0, 1).to(image.dtype)

        horizon = 0.52 + 0.16 * (phase - 0.5)
        below = ((y - horizon) * SIZE + 0.5).clamp(0, 1)
        up, down = y / horizon, (y - horizon) / (1 - horizon)
        tufts = torch.sin(2 * math.pi * (x * 9 + phase + torch.sin(y * 70) * 0.4)) * torch.sin(
            y * 46 + phase * 9
        )
        grass = over(mix((120, 196, 250), (205, 234, 255), up), (104, 190, 82), below)
        grass = over(grass, (72, 160, 62), below * (tufts > 0.45).float())
        sea = ((y - horizon + 0.16) * SIZE + 0.5).clamp(0, 1)
        foam = (y - horizon - 0.012 * torch.sin(2 * math.pi * (x * 3 + phase))).abs() < 0.014
        beach = over(mix((92, 180, 246), (190, 230, 254), up), (36, 128, 200), sea)
        beach = over(over(beach, (242, 214, 152), below), (250, 250, 250), foam.float())
        fx, fy = (
            (x * f * 1.6 + phase * 3) % 1 - 0.5,
            (y * f * 1.6 + torch.floor(x * f * 1.6 + phase * 3) * 0.37) % 1 - 0.5,
        )
        flakes = ((0.09 - (fx * fx + fy * fy).sqrt()) * (SIZE / (f * 1.6)) + 0.5).clamp(0, 1)
        snow = over(mix((150, 176, 214), (214, 226, 244), up), (246, 249, 253), below)
        snow = over(snow, (255, 255, 255), flakes * (1 - below))
        cx, cy = 0.2 + 0.6 * ((phase * 7) % 1), 0.16 + 0.05 * ((phase * 13) % 1)
        disc = ((0.085 - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()) * SIZE + 0.5).clamp(0, 1)
        bite = ((0.075 - ((x - cx - 0.04) ** 2 + (y - cy + 0.02) ** 2).sqrt()) * SIZE + 0.5).clamp(
            0, 1
        )
        night = over(
            mix((12, 16, 50), (48, 54, 120), up), (250, 246, 214), flakes * 0.9 * (y < 0.95).float()
        )
        night = over(night, (255, 236, 160), disc * (1 - bite))
        sun = ((0.17 - ((x - cx) ** 2 + (y - horizon) ** 2).sqrt()) * SIZE + 0.5).clamp(0, 1)
        glow = over(mix((112, 60, 140), (255, 150, 80), up), (255, 226, 110), sun)
        sunset = over(glow, (70, 40, 92), below)
        sunset = over(
            sunset,
            (255, 170, 96),
            below
            * ((x - cx).abs() < 0.12 * (1 - down)).float()
            * (torch.sin(y * 130) > 0.2).float(),
        )
        row = torch.arange(len(s), device=self.device)
        return torch.stack([grass, beach, snow, night, sunset], 1)[
            row, (s.ground - len(PATTERNS)).clamp(min=0)
        ]

    def layer(self, image, sprite, look, cx, cy, scale, turn, shown) -> torch.Tensor:
        """Paste one sprite an image: centre (cx, cy) and `scale` in widths, `turn` in radians."""
        cos, sin = torch.cos(turn) / scale, torch.sin(turn) / scale
        tx, ty = 2 * cx - 1, 2 * cy - 1
        theta = torch.stack(
            [
                torch.stack([cos, sin, -(cos * tx + sin * ty)], 1),
                torch.stack([-sin, cos, sin * tx - cos * ty], 1),
            ],
            1,
        )
        grid = F.affine_grid(
            theta.to(self.atlas.dtype), [len(sprite), 4, 2 * SIZE, 2 * SIZE], align_corners=False
        )
        paste = F.avg_pool2d(F.grid_sample(self.atlas[sprite], grid, align_corners=False), 2)

        def where(i: int) -> torch.Tensor:
            return (look == i)[:, None, None, None]

        luma = (paste[:, :3] * self._color((76.2, 149.7, 29.1))).sum(1, True)
        paste = torch.where(
            where(1), torch.cat([luma.expand(-1, 3, -1, -1), paste[:, 3:]], 1), paste
        )
        outline = F.max_pool2d(paste[:, 3:], 7, 1, 3)
        sticker = torch.cat([paste[:, :3] + outline - paste[:, 3:] * outline, outline], 1)
        paste = torch.where(where(2), sticker, paste)
        blocks = F.avg_pool2d(paste, 4)
        solid = (blocks[:, 3:] > 0.5).to(blocks.dtype)
        blocks = torch.cat([blocks[:, :3] / blocks[:, 3:].clamp(min=0.25) * solid, solid], 1)
        paste = torch.where(
            where(3), F.interpolate(blocks, scale_factor=4.0, mode="nearest"), paste
        )
        paste = paste * shown[:, None, None, None].to(paste.dtype)
        return image * (1 - paste[:, 3:]) + paste[:, :3]

    def render(self, s: Scene, turns: float = 0.25) -> torch.Tensor:
        """Pictures (B, 3, 128, 128) in [-1, 1] of the scenes; random positions and shades."""
        n = len(s)
        r = self._rand(10, n) - 0.5
        ones = torch.ones(n, device=self.device)
        small, big, double = s.size == 1, s.size == 2, s.kind >= 1
        scale = torch.where(
            small, 0.33 + 0.12 * r[0], torch.where(big, 0.94 + 0.12 * r[0], 0.66 + 0.26 * r[0])
        )
        scale = torch.where(double, 0.42 + 0.10 * r[0], scale)
        scale2 = torch.where(s.kind == 1, scale, 0.42 + 0.10 * r[1])
        free = (1 - scale).clamp(min=0) * torch.where(small, 0.9, 0.5)
        cx, cy = 0.5 + r[2] * free, 0.5 + r[3] * free
        cx = torch.where(
            s.place == 1, 0.22 + 0.06 * r[2], torch.where(s.place == 2, 0.78 + 0.06 * r[2], cx)
        )
        cy = torch.where(
            s.place == 3, 0.22 + 0.06 * r[3], torch.where(s.place == 4, 0.78 + 0.06 * r[3], cy)
        )
        above = s.kind == 3
        near, far, cross = 0.26 + 0.05 * r[4], 0.74 + 0.05 * r[5], 0.5 + 0.28 * r[6]
        cx, cy = (
            torch.where(double, torch.where(above, cross, near), cx),
            torch.where(double, torch.where(above, near, cross), cy),
        )
        cx2, cy2 = (
            torch.where(above, cross + 0.08 * r[7], far),
            torch.where(above, far, cross + 0.08 * r[7]),
        )
        turn = torch.where(r[8] > 0.2, r[9] * 2 * turns, 0.0)
        image = self.layer(self.background(s), s.first, s.look, cx, cy, scale, turn, ones)
        # a fixed-size subset holds the second subjects: two fifths covers the 30% that have one
        k = double.float().topk(max(1, math.ceil(0.4 * n)) if n > 64 else n).indices
        other = torch.where(s.kind == 1, s.first, s.second)[k]
        pasted = self.layer(
            image[k], other, s.look[k], cx2[k], cy2[k], scale2[k], -turn[k], double[k].float()
        )
        return (image.index_copy(0, k, pasted).float() * 2 - 1).clamp(-1, 1)
