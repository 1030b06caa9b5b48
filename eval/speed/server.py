"""`dreamtune serve` under load: a burst of requests for different adapters, prompts and seeds over
loopback, to a server that draws routed batches and to one that draws one adapter at a time.

    python eval/speed/server.py                # the embedded base, adapters that it trains before
    python eval/speed/server.py --model full   # on a GPU: SD 1.5's shapes, random weights and LoRAs

Each server is the command, in a process of its own. Of the embedded base every picture is scored
against the photos of each subject, and compared with the same request's picture of the other
server; of random weights it is compared alone, for there is no subject.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from common import build_unet  # noqa: E402
from random_models import build_pipeline  # noqa: E402
from serve import write_loras  # noqa: E402

from dreamtune import embedded  # noqa: E402
from dreamtune.config import EMBEDDED  # noqa: E402
from dreamtune.metrics import Dino  # noqa: E402

SUBJECTS = ("fox-3d", "teapot-3d", "robot-cartoon", "rocket-3d")
VARIANTS = (("delora", 0), ("lora", 0), ("ether", 0), ("delora", 1))  # method, seed
SCENES = ("a {}", "a {} in the snow", "a {} on a red background", "a {} under a night sky")
SAME = 1.0  # mean difference in 8 bits, up to which two pictures are of one request
HEAD = "| | requests | errors | lost | mixed up | p50 s | p99 s | all s | a second | batch |"
STARTING = 600.0  # seconds for a server to be ready


class Answer(NamedTuple):
    """status: of HTTP, 0 where there was none; seconds: until it was there."""

    status: int
    seconds: float
    body: dict[str, Any]

    @property
    def pixels(self) -> np.ndarray:
        data = base64.b64decode(self.body["image"])
        return np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16)


def train_adapters(folder: Path, work: Path, steps: int) -> None:
    """Four subjects by each of the variants, the subjects of one at once."""
    photos = work / "subjects"
    for name in SUBJECTS:
        subject = embedded.subject(name)
        shutil.copytree(subject.folder, photos / name, ignore=shutil.ignore_patterns("reference"))
        (photos / name / "prompt.txt").write_text(f"a {subject.name}\n")
    for method, seed in VARIANTS:
        out = work / f"{method}-{seed}"
        flags = {
            "subjects": photos, "method": method, "seed": seed, "max_train_steps": steps,
            "validation_steps": 0, "num_inference_steps": 1, "validation_prompt": "a {}",
            "dino": "none", "clip": "none", "output_dir": out,
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "dreamtune.cli", "train", *words], check=True)
        for name in SUBJECTS:
            shutil.copy(
                out / name / "adapter.safetensors", folder / f"{name}_{method}-{seed}.safetensors"
            )


@contextmanager
def server(base: str, adapters: Path, steps: int, more: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Host and port of one, once it serves; ended by SIGTERM, which it must obey."""
    words = ["--base", base, "--adapters", str(adapters), "--port", "0"]
    words += ["--num_inference_steps", str(steps), "--max_queue", "4096", "--timeout_s", "3600"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dreamtune.cli", "serve", *words, *more],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    alarm = threading.Timer(STARTING, process.kill)
    alarm.start()
    try:
        for line in process.stdout:
            print(f"    {line.rstrip()}", flush=True)
            if line.startswith("Serving on http://"):
                alarm.cancel()
                host, _, port = line.split("//")[1].strip().rpartition(":")
                yield host, int(port)
                break
        else:
            raise SystemExit(f"the server ended with {process.wait()}")
    finally:
        alarm.cancel()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def ask(place: tuple[str, int], method: str, path: str, body: Any, limit: float) -> Answer:
    began = time.perf_counter()
    connection = http.client.HTTPConnection(*place, timeout=limit)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        told = json.loads(data) if path != "/metrics" else {"text": data.decode()}
        return Answer(answer.status, time.perf_counter() - began, told)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(0, time.perf_counter() - began, {"error": repr(error)})
    finally:
        connection.close()


def burst(
    place: tuple[str, int], bodies: Sequence[Any], limit: float
) -> tuple[list[Answer], float]:
    """All at once, and the seconds until the last is answered."""
    ready = threading.Barrier(len(bodies) + 1)

    def one(body: Any) -> Answer:
        ready.wait()
        return ask(place, "POST", "/generate", body, limit)

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(one, body) for body in bodies]
        ready.wait()
        began = time.perf_counter()
        found = [answer.result() for answer in answers]
    return found, time.perf_counter() - began


def requests(count: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """By turns over the adapters, with prompts of their subjects and a seed of their own."""
    found = []
    for number in range(count):
        name = names[number % len(names)]
        of = name.split("_")[0]
        subject = embedded.subject(of).name if of in SUBJECTS else "sks dog"
        scene = SCENES[number // len(names) % len(SCENES)]
        found.append({"prompt": scene.format(subject), "adapter": name, "seed": number})
    return found


def report(name: str, bodies: Sequence[Any], answers: Sequence[Answer], seconds: float) -> float:
    """A row of the table; pictures a second."""
    done = [a for a in answers if a.status == 200]
    taken = sorted(a.seconds for a in done)
    cuts = quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else taken * 99
    mixed = sum(
        (a.body["adapter"], a.body["seed"]) != (b["adapter"], b["seed"])
        for a, b in zip(answers, bodies)
        if a.status == 200
    )
    lost = sum(a.status == 0 for a in answers)
    batch = sum(a.body["batch"] for a in done) / max(1, len(done))
    print(
        f"| {name} | {len(answers)} | {len(answers) - len(done) - lost} | {lost} | {mixed} |"
        f" {cuts[49]:.2f} | {cuts[98]:.2f} | {seconds:.1f} | {len(done) / seconds:.2f} |"
        f" {batch:.1f} |",
        flush=True,
    )
    return len(done) / seconds


def differences(a: Sequence[Answer], b: Sequence[Answer]) -> np.ndarray:
    """(n,) mean absolute difference of two servers' pictures of each request, in 8 bits."""
    return np.array([np.abs(x.pixels - y.pixels).mean() for x, y in zip(a, b, strict=True)])


def strangers(answers: Sequence[Answer], bodies: Sequence[Any]) -> tuple[int, int]:
    """(pictures nearest to another subject's photos than their own, pictures), by DINO."""
    dino = Dino(EMBEDDED)
    photos = {
        name: dino.images([Image.open(p).convert("RGB") for p in embedded.subject(name).photos])
        for name in SUBJECTS
    }
    images = [Image.fromarray(a.pixels.astype(np.uint8)) for a in answers]
    features = dino.images(images)
    means = torch.stack([(features @ own.T).mean(1) for own in photos.values()], 1)
    nearest = [SUBJECTS[i] for i in means.argmax(1).tolist()]
    wrong = sum(n != b["adapter"].split("_")[0] for n, b in zip(nearest, bodies, strict=True))
    return wrong, len(images)


def measure(args: argparse.Namespace, base: str, adapters: Path) -> None:
    names = sorted(path.stem for path in adapters.iterdir())
    bodies = requests(args.requests, names)
    shown = f"{len(bodies)} requests at once, {len(names)} adapters, {args.steps} steps"
    modes = {"routed batches": [], "one adapter at a time": ["--max_batch", "1"]}
    found, rates, rows = {}, {}, []
    for mode, flags in modes.items():
        print(f"\n{mode}, {shown}", flush=True)
        with server(base, adapters, args.steps, flags) as place:
            health = ask(place, "GET", "/health", None, 60).body
            burst(place, bodies[: 2 * len(names)], args.limit)  # not timed: all have been used once
            found[mode], seconds = burst(place, bodies, args.limit)
            print(HEAD)
            print("|---|---|---|---|---|---|---|---|---|---|")
            rates[mode] = report(mode, bodies, found[mode], seconds)
            if mode == "routed batches":  # what the check below can tell: the next one's adapter
                few = range(0, len(bodies), max(1, len(bodies) // 16))
                others = [{**bodies[i], "adapter": bodies[i - 1]["adapter"]} for i in few]
                other, _ = burst(place, others, args.limit)
                rows = list(few)
            text = ask(place, "GET", "/metrics", None, 60).body["text"]
            print(*(x for x in text.splitlines() if x.startswith("dreamtune_gpu_memory")), sep="\n")
    routed, single = found.values()
    print(f"\n{health['device']}, {os.cpu_count()} cores, torch {torch.__version__}; {shown}")
    print(f"routed / one adapter at a time: {rates['routed batches'] / rates[mode]:.2f}")
    if any(a.status != 200 for a in (*routed, *single, *other)):
        raise SystemExit("not all requests were answered by a picture")
    same = differences(routed, single)
    apart = differences(other, [single[i] for i in rows])
    print(
        f"a request's picture by the two servers: mean difference {same.mean():.3f} of 255, at most"
        f" {same.max():.3f}; with another's adapter at least {apart.min():.3f}:"
        f" {(same > SAME).sum()} of {len(same)} above {SAME:g}, {(apart > SAME).sum()} of"
        f" {len(apart)} with another's"
    )
    if args.model == EMBEDDED:
        for mode, answers in found.items():
            wrong, count = strangers(answers, bodies)
            print(f"{mode}: {wrong} of {count} pictures nearest to another subject, by DINO")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, choices=(EMBEDDED, "full", "small", "tiny"))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--adapters", type=int, default=16, help="of random weights")
    parser.add_argument(
        "--trained", type=Path, help="adapters made here before, of the embedded base"
    )
    parser.add_argument("--train_steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8, help="sampling steps")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a burst")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work, adapters = Path(place), Path(place) / "adapters"
        adapters.mkdir()
        base = EMBEDDED
        if args.model != EMBEDDED:
            cuda = torch.cuda.is_available()
            device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
            base = str(work / "base")
            build_pipeline(Path(base), args.model, device=device, dtype=dtype)
            write_loras(adapters, build_unet(args.model, device="meta"), args.adapters)
        elif args.trained:
            adapters = args.trained
        else:
            train_adapters(adapters, work, args.train_steps)
        measure(args, base, adapters)
    return 0


if __name__ == "__main__":
    sys.exit(main())
