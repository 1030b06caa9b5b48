"""`dreamtune serve` under load: a burst of requests for different adapters, prompts and seeds over
loopback, to a server that draws routed batches and to one that draws one adapter at a time.

    python eval/speed/server.py                # the embedded base, adapters that it trains before
    python eval/speed/server.py --model full   # on a GPU: SD 1.5's shapes, random weights and LoRAs
    python eval/speed/server.py --kill         # the process of a training job is killed meanwhile
    python eval/speed/server.py --kill --replicas 2          # and one of two that draw, by Ray

Each server is the command, in a process of its own. Of the embedded base every picture is scored
against the photos of each subject, and compared with the same request's picture of the other
server; of random weights it is compared alone, for there is no subject.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent))

from common import build_unet  # noqa: E402
from load_client import HEAD, RULE, Answer, ask, burst, differences, report  # noqa: E402
from random_models import build_pipeline  # noqa: E402
from serve import write_loras  # noqa: E402
from server_kill import SAME, measure_kill  # noqa: E402

from dreamtune import embedded  # noqa: E402
from dreamtune.config import EMBEDDED  # noqa: E402
from dreamtune.metrics import Dino  # noqa: E402

SUBJECTS = ("fox-3d", "teapot-3d", "robot-cartoon", "rocket-3d")
VARIANTS = (("delora", 0), ("lora", 0), ("ether", 0), ("delora", 1))  # method, seed
SCENES = ("a {}", "a {} in the snow", "a {} on a red background", "a {} under a night sky")
STARTING = 600.0  # seconds for a server to be ready


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
            print(f"{HEAD}\n{RULE}")
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


def measure_killed(args: argparse.Namespace, adapters: Path, work: Path) -> None:
    names = sorted(path.stem for path in adapters.iterdir())
    bodies = requests(args.requests, names)
    photos, jobs = embedded.subject(SUBJECTS[0]).photos, work / "jobs"
    more = ["--replicas", str(args.replicas)] if args.replicas else []
    with server(EMBEDDED, adapters, args.steps, ["--jobs", str(jobs), *more]) as place:
        burst(place, bodies[: 2 * len(names)], args.limit)
        answers = measure_kill(
            place, jobs, photos, bodies, args.job_steps, args.limit, args.replicas
        )
    wrong, count = strangers(answers, bodies)
    print(f"{wrong} of {count} pictures nearest to another subject, by DINO")


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
    parser.add_argument(
        "--kill", action="store_true", help="kill the process of a training job, and nothing else"
    )
    parser.add_argument(
        "--replicas", type=int, default=0, help="with --kill: this many draw, and one is killed too"
    )
    parser.add_argument("--job_steps", type=int, default=240, help="of that job")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a burst")
    args = parser.parse_args()
    if args.kill and args.model != EMBEDDED:
        parser.error(f"--kill trains on the embedded base: leave out --model {args.model}")
    if args.replicas and not args.kill:
        parser.error("--replicas is of --kill")
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
        if args.kill:
            measure_killed(args, adapters, work)
        else:
            measure(args, base, adapters)
    return 0


if __name__ == "__main__":
    sys.exit(main())
