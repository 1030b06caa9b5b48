"""A burst of requests in the middle of which the process that trains is killed (SIGKILL), and with
replicas one of those that draw; what became of the requests and of the job. That a resumed run is
the run that was never stopped, bit for bit, is a test's (`tests/serving/test_jobs.py`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from load_client import HEAD, RULE, Answer, Form, ask, burst, differences, report

from dreamtune.serving.jobs.process import Child
from dreamtune.serving.jobs.store import ENDED, RUN, WAVES
from dreamtune.training.run_folder import checkpoints, step_of

NAME = "killed"  # of the job's adapter
SAME = 1.0  # mean difference in 8 bits, up to which two pictures are of one request
POLL = 0.1  # seconds
BACK = 120.0  # seconds in which a replica must have been replaced
REPLICA = "ray::ServeReplica:dreamtune-"  # what Ray calls its process

Place = tuple[str, int]


class Kill(NamedTuple):
    """answered: requests of the burst that were; saved: the job's step that a process goes on from,
    at least; replica: the process that drew and was killed too, 0 for none.
    """

    pid: int
    answered: int
    saved: int
    replica: int = 0


def form(fields: Mapping[str, str], photos: Sequence[Path]) -> Form:
    """As `multipart/form-data`."""
    mark = secrets.token_hex(16)
    parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
    parts += [(f'name="photos"; filename="{p.name}"', p.read_bytes()) for p in photos]
    lines = [
        f"--{mark}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    ]
    return Form(b"".join([*lines, f"--{mark}--\r\n".encode()]), mark)


def submit(place: Place, photos: Sequence[Path], prompt: str, steps: int, limit: float) -> str:
    """The id of a new job."""
    fields = {"prompt": prompt, "steps": str(steps), "name": NAME}
    answer = ask(place, "POST", "/train", form(fields, photos), limit)
    if answer.status != 202:
        raise SystemExit(f"the job was refused: {answer.body}")
    return str(answer.body["id"])


def process_of(jobs: Path, id: str) -> Child | None:
    """The one that trains the job now."""
    found = (Child.again(folder) for folder in (jobs / WAVES).glob("*"))
    return next((c for c in found if c and id in c.record["jobs"] and c.alive()), None)


def kill_replica() -> int:
    """The number of one that draws on this machine, which is no more."""
    for process in psutil.process_iter(["cmdline"]):
        if "".join(process.info["cmdline"] or ()).startswith(REPLICA):
            os.kill(process.pid, signal.SIGKILL)
            return int(process.pid)
    raise SystemExit(f"there is no process `{REPLICA}...`: are there replicas?")


def replaced(place: Place, replicas: int, limit: float) -> tuple[int, int]:
    """How many draw again, once it is all of them or BACK has passed; and batches sent again."""
    until = time.monotonic() + BACK
    running = 0
    while running < replicas and time.monotonic() < until:
        time.sleep(POLL)
        running = ask(place, "GET", "/health", None, limit).body.get("replicas", 0)
    told = ask(place, "GET", "/metrics", None, limit).body.get("text", "")
    found = re.search(r"^dreamtune_resends_total (\S+)", told, re.MULTILINE)
    return running, int(float(found[1])) if found else 0


def saved_before_the_end(place: Place, jobs: Path, id: str, limit: float) -> int:
    """The job's last saved step, 0 before the first. Raises SystemExit once it has ended."""
    state = ask(place, "GET", f"/jobs/{id}", None, limit).body.get("state")
    if state in ENDED:
        raise SystemExit(f"the job was {state} before the kill: more --job_steps")
    return max(map(step_of, checkpoints(jobs / id / RUN)), default=0)


def kill_under_load(
    place: Place, jobs: Path, id: str, bodies: Sequence[Any], limit: float, replicas: int = 0
) -> tuple[Kill, list[Answer], float]:
    """The burst once the job has saved a step, and the kill once a quarter of it is answered.
    Raises SystemExit where there is nothing to kill in time.
    """
    answered, until = 0, time.monotonic() + limit
    counting = threading.Lock()

    def count() -> None:
        nonlocal answered
        with counting:
            answered += 1

    while not saved_before_the_end(place, jobs, id, limit):
        if time.monotonic() > until:
            raise SystemExit(f"the job had saved no step within {limit:g} s: more --limit")
        time.sleep(POLL)
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(burst, place, bodies, limit, count)
        while True:
            time.sleep(POLL)
            saved = saved_before_the_end(place, jobs, id, limit)
            child = process_of(jobs, id)
            if 4 * answered >= len(bodies) and child:
                child.kill()
                drew = kill_replica() if replicas else 0
                kill = Kill(child.pid, answered, saved, drew)
                break
            if load.done():
                raise SystemExit("the load was over before a kill: more --requests")
        return (kill, *load.result())


def events_of(place: Place, id: str, limit: float) -> list[dict[str, Any]]:
    """All, once the job is over."""
    text = ask(place, "GET", f"/jobs/{id}/events", None, limit).body.get("text", "")
    lines = (line.partition("data: ") for line in text.splitlines())
    return [json.loads(data) for before, mark, data in lines if mark and not before]


def faults_of(kill: Kill, events: Sequence[dict[str, Any]]) -> list[str]:
    """What of the job's course is not as it should be."""
    kinds = [event["kind"] for event in events]
    found = []
    if kinds.count("retried") != 1:
        found.append(f"the job was tried again {kinds.count('retried')} times, not once")
    began = [event["step"] for event in events if event["kind"] == "started"]
    if len(began) != 2 or began[1] < kill.saved:
        found.append(f"it was started from steps {began}, where step {kill.saved} was saved")
    if not kinds or kinds[-1] != "done":
        found.append(f"its last event is {events[-1] if events else None}, not `done`")
    return found


def measure_kill(
    place: Place, jobs: Path, photos: Sequence[Path], bodies: Sequence[Any], steps: int,
    limit: float, replicas: int = 0,
) -> list[Answer]:  # fmt: skip
    """Prints what became of it; the answers of the burst. Raises SystemExit where one was lost."""
    began = time.monotonic()
    id = submit(place, photos, "a sks fox", steps, limit)
    kill, answers, seconds = kill_under_load(place, jobs, id, bodies, limit, replicas)
    events = events_of(place, id, limit)
    whole = time.monotonic() - began
    body = {"prompt": "a sks fox", "adapter": NAME, "seed": 0}
    drawn = ask(place, "POST", "/generate", body, limit)
    again, plain = burst(place, bodies, limit)
    print(f"{HEAD}\n{RULE}")
    report("the process that trains is killed", bodies, answers, seconds)
    report("the same once more, nothing trains", bodies, again, plain)
    print(
        f"process {kill.pid} was killed after {kill.answered} of {len(bodies)} answers; the job had"
        f" saved step {kill.saved} of {steps}"
    )
    faults = faults_of(kill, events)
    if replicas:
        running, resends = replaced(place, replicas, limit)
        print(f"replica {kill.replica} was killed too: {resends} batches were sent again")
        if running < replicas:
            faults.append(f"{running} of {replicas} replicas draw again")
    if any(answer.status != 200 for answer in (*answers, *again)):
        faults.append("not all requests were answered by a picture")
    elif (apart := differences(answers, again)).max() > SAME:
        faults.append(f"pictures differ by {apart.max():.3f} of 255 from those without a kill")
    else:
        print(f"the pictures of the two: mean difference at most {apart.max():.3f} of 255")
    if drawn.status != 200:
        faults.append(f"its adapter draws nothing: {drawn.body}")
    if faults:
        raise SystemExit("; ".join(faults))
    went_on = [event["step"] for event in events if event["kind"] == "started"][1]
    print(
        f"the job went on from step {went_on} and was done after {whole:.0f} s, best step"
        f" {events[-1]['best_step']}; its adapter is served"
    )
    return answers
