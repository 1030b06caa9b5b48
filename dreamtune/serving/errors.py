"""What a request is answered where it gets no picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """An answer that is an error, as JSON {"error", "got", "allowed", "way_out"}.

    Args:
        status: of HTTP.
        error: what is wrong, a sentence.
        got: what was sent; allowed: what may be; way_out: what to do. None where there is none, or
            where the sentence says it.
    """

    def __init__(
        self,
        status: int,
        error: str,
        *,
        got: Any = None,
        allowed: Any = None,
        way_out: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": error, "got": got, "allowed": allowed, "way_out": way_out}


def full(waiting: int, seconds: float) -> Refused:
    """seconds: until there may be room."""
    return Refused(
        503,
        f"The queue is full: requests that wait: {waiting}.",
        got=waiting + 1,
        allowed=waiting,
        way_out=f"Ask again in {max(1, round(seconds))} seconds.",
        headers={"Retry-After": str(max(1, round(seconds)))},
    )


def closing() -> Refused:
    return Refused(
        503,
        "The server is being shut down and takes no more requests.",
        way_out="Ask again once it is started again.",
        headers={"Retry-After": "10"},
    )


def late(seconds: float) -> Refused:
    return Refused(
        504,
        f"There was no picture within {seconds:g} seconds.",
        allowed=seconds,
        way_out="Ask for fewer steps, or later, when fewer others ask.",
    )
