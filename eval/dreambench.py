"""A whole benchmark of personalization: subjects x methods x training seeds, each subject's prompts
x images, scored with intervals.

    python eval/dreambench.py --work DIR --photos DREAMBOOTH --methods lora delora \
        --pretrained_model_name_or_path sd15/ --max_train_steps 1000
    python eval/dreambench.py --benchmark emojibench --work DIR --methods lora ether+

dreambooth: the 30 subjects of DreamBooth (a folder a subject, and prompts_and_classes.txt with a
line `name,class` for each), by the prompts of the protocol. emojibench: the 37 reporting subjects
of the embedded base, 25 prompts x 4 images; its numbers compare with nothing else. What is no flag
here is one of `dreamtune train`.

The subjects of a part train stacked. Run again it goes on: what is done is not done again, what is
half done is finished. DIR/results/report.html has all methods, and links each one's own page.
Several processes share the parts:

    accelerate launch --multi_gpu --num_processes 2 eval/dreambench.py ...   # each its own GPU
    python eval/dreambench.py --ray local:2 ...             # N workers; or auto, or an address

A cluster has a worker for each GPU, or, where it has none, for each CPU.
Ray (`pip install dreamtune[ray]`) does the parts of a worker that is lost again; on several hosts
--work and --photos must be on a file system that all see.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]

from benchmark_parts import (  # noqa: E402
    PLAN,
    Plan,
    do_task,
    forget_failures,
    images_by,
    method_flags,
    prepare,
    read_plan,
    sources,
)
from benchmark_photos import fingerprint  # noqa: E402
from benchmark_scores import (  # noqa: E402
    failures,
    finish,
    is_scored,
    mark_of,
    marks_of,
    score_method,
)

from dreamtune.evaluation.protocol_file import find_protocol  # noqa: E402
from dreamtune.fields import nearest  # noqa: E402
from dreamtune.flags import train_config  # noqa: E402
from dreamtune.metrics import METRICS  # noqa: E402

RETRIES = 5  # of a part whose worker was lost
SECONDS = 1.0  # between looks at what other processes have done
EXTRACTORS = tuple(dict.fromkeys(metric.extractor.name for metric in METRICS.values()))
OWN = ("subjects", "output_dir", "resume_from_checkpoint", "method", "seed", "sweep")

# Of the trainer: what the base's images and the held-out photos of all methods depend on.
COMMON = (
    "pretrained_model_name_or_path", "revision", "variant", "prediction_type", "instance_prompt",
    "identifier", "class_prompt", "holdout",
)  # fmt: skip


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(our flags, the trainer's). Raises ValueError for a trainer's flag that is set by us."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--benchmark", choices=("dreambooth", "emojibench"), default="dreambooth")
    add("--work", type=Path, required=True, help="folder of all that is made; goes on where it is")
    add("--photos", type=Path, help="the photos of dreambooth; emojibench has its own")
    add("--methods", nargs="+", required=True, help="such as lora oft,blocks=4")
    add("--seeds", nargs="+", type=int, default=[0], help="of training; each has its own images")
    add("--only", nargs="+", help="subjects [default: all]")
    add("--protocol", default="dreamtune", help="as of `dreamtune score`")
    add("--at_once", type=int, help="subjects of a part [default: an equal share of the processes]")
    add("--ray", metavar="WHERE", help="local:N for N workers here, auto, or a cluster's address")
    for name in EXTRACTORS:
        add(f"--score_{name}", metavar="WEIGHTS", help=f"weights of {name} for the scores")
    args, training = parser.parse_known_args(argv)
    for flag in training:
        if flag.startswith("--") and flag[2:].partition("=")[0] in OWN:
            raise ValueError(
                f"{flag} is set for each part: use --methods, --seeds, --only, --work."
            )
    check(args, training)
    return args, training


def check(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Raises ValueError for what is not understood: here, not in a worker hours later."""
    common = train_config([*training, "--subjects", str(args.work)])
    find_protocol(args.protocol)
    for name in ("methods", "seeds", "only"):
        given = getattr(args, name) or []
        if twice := [x for x in given if given.count(x) > 1]:
            raise ValueError(f"--{name} has `{twice[0]}` twice: two processes would make it.")
    for method in args.methods:
        for option in method.split(",")[1:]:
            if (name := option.partition("=")[0]) in OWN:
                raise ValueError(f"`{method}`: `{name}` is no option of a method, and set for all.")
        if Path(method).name != method:
            raise ValueError(f"`{method}` names folders, and has a separator of paths in it.")
        own = train_config([*training, *method_flags(method), "--subjects", str(args.work)])
        if other := [name for name in COMMON if getattr(own, name) != getattr(common, name)]:
            raise ValueError(
                f"`{method}`: `{other[0]}` must be that of the base's images and of all methods: "
                f"give --{other[0]} once."
            )
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds must be 0 or more, got {min(args.seeds)}.")
    if args.at_once is not None and args.at_once < 1:
        raise ValueError(f"--at_once must be 1 or more, got {args.at_once}.")
    if args.benchmark == "emojibench" and args.photos is not None:
        raise ValueError(
            f"--photos is of dreambooth, got {args.photos}: emojibench has its own photos. Leave "
            "--photos out, or take --benchmark dreambooth."
        )
    if (args.ray or "").startswith("local:") and not re.fullmatch("local:[1-9][0-9]*", args.ray):
        raise ValueError(f"--ray must be local:N of N workers, auto or an address, got {args.ray}.")


def planned(args: argparse.Namespace, training: list[str], workers: int) -> Plan:
    found = sources(args.benchmark, args.photos)
    for name in args.only or ():
        if name not in found:
            raise ValueError(f"no subject `{name}`.{nearest(name, found)}")
    names = [name for name in found if not args.only or name in args.only]
    size = args.at_once or -(-len(names) // workers)
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    path = Path(args.protocol)
    return Plan(
        args.benchmark,
        {name: found[name][1] for name in names},
        parts,
        args.methods,
        args.seeds,
        str(path.resolve()) if path.is_file() else args.protocol,
        training,
        images_by(find_protocol(args.protocol)),
        {name: fingerprint(found[name][0]) for name in names},
    )


def main(argv: Sequence[str] | None = None) -> int:
    args, training = parse(sys.argv[1:] if argv is None else argv)
    # The trainer takes one process a subject, and refuses several: here each has its own subjects.
    world, rank = int(os.environ.pop("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if args.ray and world > 1:
        raise ValueError(
            f"--ray deals the parts itself, and {world} processes of a launcher would each do all: "
            "start it by python."
        )
    if world > 1 and torch.cuda.is_available():  # captured steps run on the current device
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with connected(args.ray) as ray:
        return benchmark(args, training, rank, world, ray)


def benchmark(
    args: argparse.Namespace, training: list[str], rank: int, world: int, ray: Any = None
) -> int:
    """The share of one of `world` processes, the first of which tells of all; or of Ray's workers.
    The exit status."""
    workers = world if ray is None else size_of(ray, args.ray)
    work = args.work.resolve()
    plan = planned(args, training, workers)
    if rank == 0 and not (work / PLAN).is_file():
        prepare(work, plan, sources(args.benchmark, args.photos))
    wait(work / PLAN)
    plan, began = read_plan(work, plan), time.perf_counter()
    weights = {name: w for name in EXTRACTORS if (w := getattr(args, f"score_{name}")) is not None}
    own = plan.tasks()[rank::world]
    forget_failures(work, own)
    _store = meet(rank, world)
    if ray is not None:
        by_ray(ray, work, plan, weights)
    else:
        for task in own:
            print(do_task(work, plan, task), flush=True)
        for method in plan.methods[rank::world]:
            for mark in marks_of(work, plan, method).values():
                wait(mark)
            print(score_method(work, plan, method, weights), flush=True)
    if rank:
        return 0
    for method in plan.methods:
        wait(mark_of(work, method), lambda m=method: is_scored(work, plan, m, weights))
    finish(work, plan)
    seconds = time.perf_counter() - began
    print(f"{seconds:.1f} s of work by {workers} process{'es' if workers > 1 else ''}", flush=True)
    failed = [f"{m}: {s}: {why}" for m in plan.methods for s, why in failures(work, plan, m)]
    print("\n".join(f"failed: {text}" for text in failed))
    return 1 if failed else 0


def meet(rank: int, world: int) -> Any:
    """Until all processes of the launcher are here; alone, and without a launcher, at once. What it
    returns must be kept: it may be where the others ask."""
    if world == 1 or "MASTER_ADDR" not in os.environ:
        return None
    store, *_ = next(torch.distributed.rendezvous("env://", rank, world))
    here = store.add("dreambench", 1)
    while here < world:
        time.sleep(SECONDS / 10)
        here = store.add("dreambench", 0)
    return store


def wait(path: Path, ready: Callable[[], bool] | None = None) -> None:
    """Until another process has written it, and it is `ready`; the launcher ends us if that process
    fails."""
    said = False
    while not (path.is_file() and (ready is None or ready())):
        if not said:
            print(f"waiting for {path.name}", flush=True)
        said = True
        time.sleep(SECONDS)


@contextlib.contextmanager
def connected(where: str | None) -> Iterator[Any]:
    """Ray, on the cluster that was asked for until the block ends; None where none was."""
    if not where:
        yield None
        return
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'dreamtune[ray]'.") from None
    local = where.startswith("local:")
    path = os.pathsep.join([str(ROOT / "eval"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local" if local else where,  # its own, whatever runs here
        num_cpus=int(where[6:]) if local else None,
        include_dashboard=False if local else None,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        yield ray
    finally:
        ray.shutdown()


def gpus_of(ray: Any) -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def size_of(ray: Any, where: str) -> int:
    """How many workers the parts are dealt over: what was asked for here, else as many as the
    cluster runs at once."""
    if where.startswith("local:"):
        return int(where[6:])
    return gpus_of(ray) or max(1, int(ray.cluster_resources().get("CPU", 1)))


def by_ray(ray: Any, work: Path, plan: Plan, weights: dict[str, str]) -> None:
    """All parts, then all scores, by Ray's scheduler; those of a lost worker are done again, from
    their files."""
    part, score = (
        ray.remote(num_cpus=1, num_gpus=min(1, gpus_of(ray)), max_retries=RETRIES)(function)
        for function in (do_task, score_method)
    )
    tell_all(ray, [part.remote(work, plan, task) for task in plan.tasks()])
    tell_all(ray, [score.remote(work, plan, m, weights) for m in plan.methods])


def tell_all(ray: Any, waiting: list[Any]) -> None:
    """Prints what each remote call says, as they end."""
    while waiting:
        ready, waiting = ray.wait(waiting)
        for text in ray.get(ready):
            print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"dreambench: {error}")
