"""A client of `dreamtune serve`: one request, a burst of them, and what became of each."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import nan
from statistics import quantiles
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

HEAD = "| | requests | errors | lost | mixed up | p50 s | p99 s | all s | a second | batch |"
RULE = "|---" * 10 + "|"


class Answer(NamedTuple):
    """status: of HTTP, 0 where there was none; seconds: until it was there."""

    status: int
    seconds: float
    body: dict[str, Any]

    @property
    def pixels(self) -> np.ndarray:
        data = base64.b64decode(self.body["image"])
        return np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16)


class Form(NamedTuple):
    """A body of `multipart/form-data`, and what its parts are told apart by."""

    body: bytes
    boundary: str


def ask(place: tuple[str, int], method: str, path: str, body: Any, limit: float) -> Answer:
    """body: a `Form`, what becomes JSON, or None. What is no JSON in the answer is its `text`."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(*place, timeout=limit)
    if isinstance(body, Form):
        data, kind = body.body, f"multipart/form-data; boundary={body.boundary}"
    else:
        data, kind = None if body is None else json.dumps(body).encode(), "application/json"
    try:
        connection.request(method, path, data, {"Content-Type": kind})
        answer = connection.getresponse()
        read = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        told = json.loads(read) if is_json else {"text": read.decode()}
        return Answer(answer.status, time.perf_counter() - began, told)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(0, time.perf_counter() - began, {"error": repr(error)})
    finally:
        connection.close()


def burst(
    place: tuple[str, int],
    bodies: Sequence[Any],
    limit: float,
    answered: Callable[[], None] = lambda: None,
) -> tuple[list[Answer], float]:
    """All at once, and the seconds until the last is answered. answered: called for each."""
    ready = threading.Barrier(len(bodies) + 1)

    def one(body: Any) -> Answer:
        ready.wait()
        answer = ask(place, "POST", "/generate", body, limit)
        answered()
        return answer

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(one, body) for body in bodies]
        ready.wait()
        began = time.perf_counter()
        found = [answer.result() for answer in answers]
    return found, time.perf_counter() - began


def report(name: str, bodies: Sequence[Any], answers: Sequence[Answer], seconds: float) -> float:
    """A row of the table; pictures a second."""
    done = [a for a in answers if a.status == 200]
    taken = sorted(a.seconds for a in done)
    cuts = quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else (taken or [nan]) * 99
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
