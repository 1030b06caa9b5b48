"""The bars of the embedded base, measured on the exported folders and printed with their n.

Everything is on held-out seeds; prompts are judged by the image-text scorer, which was trained
apart from the base and is itself checked on composed scenes with the same near-misses.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from . import networks, stages
from .captions import GROUNDS, Scene, Wording
from .prompts import test_prompts
from .scenes import Scenes
from .subjects import image

SEEDS = 2


def said(scenes: Scenes, s: Scene) -> list[str]:
    """Captions that name style and ground."""
    yes = torch.ones(len(s), dtype=torch.bool, device=scenes.device)
    no = torch.zeros_like(yes)
    return scenes.grammar.strings(scenes.grammar.slots(s, Wording(yes, yes, yes, no, no.long())))


def interval(hits: torch.Tensor) -> str:
    """Share in per cent with its 95% Wilson interval and n."""
    n, p, z = len(hits), hits.double().mean().item(), 1.96
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((centre + s * spread) / (1 + z * z / n) for s in (-1, 1))
    return f"{100 * p:.1f}% (95% {100 * low:.1f} to {100 * high:.1f}, n = {n})"


class Scorers:
    """The two scorers through the product's own loading code."""

    def __init__(self, out: Path, device):
        from dreamtune.metrics import Scorers as Product

        self.product = Product.load(
            {"dino": str(out / "dino"), "clip": f"local-dir:{out / 'clip'}"}, device=device
        )

    def images(self, pictures: list[Image.Image], which: str) -> torch.Tensor:
        return self.product.extractors[which].images(pictures).cpu()

    def texts(self, captions: list[str]) -> torch.Tensor:
        return self.product.extractors["clip"].texts(captions).cpu()


def autoencoder_psnr(scenes: Scenes, vae, n: int = 256) -> float:
    """dB from the mean squared error over n scenes of held-out subjects."""
    torch.manual_seed(11)
    s = scenes.sample(n)
    held = torch.tensor(list(scenes.subjects.values()), device=scenes.device)
    s.first = held[torch.randint(len(held), (n,), device=scenes.device)]
    x = scenes.render(s)
    with torch.no_grad():
        y = torch.cat([vae.decode(vae.encode(part).latents).sample for part in x.split(32)]).clamp(
            -1, 1
        )
    return -10 * ((x - y) / 2).square().mean().log10().item()


def prompts_followed(pipe, scorers: Scorers, folder: Path) -> torch.Tensor:
    """(96,) whether the scorer picks the prompt among its 8 near-misses; verdicts in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, hits, verdicts = test_prompts(), [], []
    for seed in range(SEEDS):
        for start in range(0, len(rows), 12):
            part = rows[start : start + 12]
            generators = [
                torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(part))
            ]
            pictures = pipe(
                [r["caption"] for r in part], generator=generators, **networks.SAMPLING
            ).images
            for i, (row, picture) in enumerate(zip(part, pictures, strict=True)):
                picture.save(folder / f"{start + i:02}-{seed}.png")
                captions = [row["caption"], *row["near_captions"]]
                best = int((scorers.images([picture], "clip") @ scorers.texts(captions).T).argmax())
                hits.append(best == 0)
                verdicts.append(
                    {
                        "prompt": start + i,
                        "seed": seed,
                        "asked": captions[0],
                        "picked": captions[best],
                    }
                )
    (folder / "verdicts.json").write_text(json.dumps(verdicts, indent=1) + "\n")
    return torch.tensor(hits)


def judge_on_scenes(scenes: Scenes, scorers: Scorers, repeats: int = 4) -> torch.Tensor:
    """The same choice on composed scenes of the same prompts: how far to trust the judge."""
    torch.manual_seed(12)
    hits = []
    for row in test_prompts():
        pictures = [
            image(x) for x in scenes.render(Scene.of([row["scene"]] * repeats, scenes.device))
        ]
        texts = scorers.texts([row["caption"], *row["near_captions"]])
        hits += ((scorers.images(pictures, "clip") @ texts.T).argmax(1) == 0).tolist()
    return torch.tensor(hits)


def caption_retrieval(scenes: Scenes, scorers: Scorers, n: int = 300) -> torch.Tensor:
    """Right caption among 100; 10 share the first concept, 15 share the ground and its colours."""
    torch.manual_seed(13)
    target, hits = scenes.sample(n), []
    features = scorers.images([image(x) for x in scenes.render(target)], "clip")
    for i in range(n):
        other = scenes.sample(99)
        kin = torch.arange(99, device=scenes.device) < 10
        near = ~kin & (torch.arange(99, device=scenes.device) < 25)
        other.first = torch.where(kin, target.first[i] // 3 * 3 + other.first % 3, other.first)
        for name in ("ground", "color", "color2"):
            value = getattr(other, name)
            setattr(other, name, torch.where(near, getattr(target, name)[i], value))
        right = said(scenes, target[i : i + 1])
        wrong = [c for c in said(scenes, other) if c != right[0]]
        hits.append(int((features[i] @ scorers.texts(right + wrong).T).argmax()) == 0)
    return torch.tensor(hits)


def triples(
    scenes: Scenes, scorers: Scorers, repeats: int = 12
) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out subject nearer to itself than to its concept in another style (a), to kin (b)."""
    torch.manual_seed(14)
    rows = []
    for sprite in scenes.subjects.values():
        word, style = divmod(sprite, 3)
        kin = [w for w, g in enumerate(scenes.groups) if g == scenes.groups[word] and w != word]
        for k in range(repeats):
            rows += [
                sprite,
                sprite,
                word * 3 + (style + 1 + k % 2) % 3,
                kin[k % len(kin)] * 3 + style,
            ]
    s = scenes.sample(len(rows))
    s.first = torch.tensor(rows, device=scenes.device)
    s.kind, s.look, s.size, s.place = (torch.zeros_like(s.kind) for _ in range(4))
    column = torch.arange(len(rows), device=scenes.device) % 4
    anchor = s.ground[::4].repeat_interleave(4)
    s.ground = (anchor + column) % len(GROUNDS)  # four different grounds
    pictures = torch.cat([scenes.render(s[i : i + 256]) for i in range(0, len(rows), 256)])
    f = scorers.images([image(x) for x in pictures], "dino").unflatten(0, (-1, 4))
    same, style, kin = (F.cosine_similarity(f[:, 0], f[:, i]) for i in (1, 2, 3))
    return same > style, same > kin


def cpu_times(out: Path) -> dict[str, float]:
    """CPU seconds, 2 threads, float32: load, a picture of 25 guided steps, a training step."""
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(2)
    begin = time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(out / "model", dtype=torch.float32)
    load = time.perf_counter() - begin
    pipe.set_progress_bar_config(disable=True)
    pipe("a fox", **networks.SAMPLING)
    begin = time.perf_counter()
    for _ in range(3):
        pipe("a fox", **networks.SAMPLING)
    picture = (time.perf_counter() - begin) / 3

    import dreamtune

    adapter = dreamtune.inject(pipe.unet, "lora", rank=8)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    z, text = torch.randn(1, networks.LATENT_CHANNELS, 16, 16), torch.randn(1, 32, 192)
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        pipe.unet(z, torch.tensor([500]), text).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return {"load": load, "picture": picture, "training step": sorted(times)[6]}


def measure(args: argparse.Namespace) -> None:
    """Print every bar; tunability, which trains five adapters, last."""
    from diffusers import StableDiffusionPipeline
    from embedded_subjects import tunability

    from dreamtune.embedded import subjects
    from dreamtune.models.load import load_base

    scenes = stages.scenes_for(args.work / "sprites.npz", args.work / "tokenizer", "cpu")
    scorers, out = Scorers(args.out, "cpu"), args.out
    pipe = StableDiffusionPipeline.from_pretrained(out / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    print(f"autoencoder: {autoencoder_psnr(scenes, pipe.vae):.2f} dB (bar 28, n = 256)", flush=True)
    print(f"caption among 100: {interval(caption_retrieval(scenes, scorers))} (bar 75)", flush=True)
    style, kin = triples(scenes, scorers)
    print(f"subject nearer than its concept in another style: {interval(style)} (bar 90)")
    print(f"subject nearer than its kin in the same style: {interval(kin)} (bar 90)", flush=True)
    print(f"the judge on composed scenes: {interval(judge_on_scenes(scenes, scorers))}", flush=True)
    followed = prompts_followed(pipe, scorers, args.work / "judged")
    print(f"prompts followed: {interval(followed)} (bar 85)", flush=True)
    for name, seconds in cpu_times(out).items():
        print(f"CPU, 2 threads, {name}: {seconds:.3f} s")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"size: {size / 1e6:.2f} MB (bar 34)", flush=True)
    base = str(out / "model")
    with load_base(base).sampling() as sampled:
        tunability(subjects("dev"), args.work, scorers.product, sampled, base)
