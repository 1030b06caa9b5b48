"""A judge of pictures: one classifier for what a scene shows, trained on scenes alone, apart from the base.

It names count or relation, both subjects and their styles, ground, colours, size and look; a caption's
score is the sum of the log-probabilities of what the caption says.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .captions import COLORS, GROUNDS, KINDS, LOOKS, PATTERNS, SIZES, Scene
from .scenes import Scenes
from .stages import Plan, _blurred
from .training import Run, autocast, restore


class Judge(nn.Module):
    """ResNet-18 trunk (torchvision, from scratch), one linear head an attribute. Images (B, 3, 128, 128) in [-1, 1]."""

    def __init__(self, concepts: int):
        super().__init__()
        from torchvision.models import resnet18

        self.trunk = resnet18(num_classes=1)
        self.trunk.fc = nn.Identity()
        self.sizes = {"kind": len(KINDS), "word": concepts, "style": 3, "word2": concepts, "style2": 3,
                      "ground": len(GROUNDS), "color": len(COLORS), "color2": len(COLORS),
                      "size": len(SIZES), "look": len(LOOKS)}  # fmt: skip
        self.heads = nn.Linear(512, sum(self.sizes.values()))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Log-probabilities (B, classes) by attribute."""
        logits = self.heads(self.trunk(images)).float().split(list(self.sizes.values()), 1)
        return {k: F.log_softmax(v, 1) for k, v in zip(self.sizes, logits, strict=True)}

    @staticmethod
    def score(said: dict[str, torch.Tensor], s: Scene) -> torch.Tensor:
        """(B,) log-probability of scene b's attributes in picture b; only what its caption mentions counts."""
        plain = s.ground < len(PATTERNS)
        pattern = plain & (s.ground > 0)
        ones = torch.ones_like(plain)
        parts = (
            ("kind", s.kind, ones), ("word", s.first // 3, ones), ("style", s.first % 3, ones),
            ("word2", s.second // 3, s.kind >= 2), ("style2", s.second % 3, s.kind >= 2),
            ("ground", s.ground, ones), ("color", s.color, plain), ("color2", s.color2, pattern),
            ("size", s.size, s.kind == 0), ("look", s.look, ones),
        )  # fmt: skip
        total = torch.zeros(len(s), device=s.kind.device)
        for name, target, counts in parts:
            picked = said[name].gather(1, target[:, None])[:, 0]
            total = total + torch.where(counts, picked, 0.0)
        return total


def train_judge(scenes: Scenes, plan: Plan, folder: Path, seconds: float) -> bool:
    device = scenes.device
    judge = Judge(len(scenes.words)).to(device, memory_format=torch.channels_last)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            s = scenes.sample(plan.judge_batch)
            x = _blurred(scenes.render(s)).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            said = judge(x)
        return -Judge.score(said, s).mean()

    run = Run("judge", {"judge": (judge, 2e-3)}, loss, steps=plan.judge_steps, folder=folder, weight_decay=0.05,
              average=0.998)  # fmt: skip
    return run.train(seconds)


def load_judge(scenes: Scenes, folder: Path) -> Judge:
    judge = Judge(len(scenes.words)).to(scenes.device)
    restore("judge", {"judge": judge}, folder)
    return judge
