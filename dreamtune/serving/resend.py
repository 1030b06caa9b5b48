"""Batches of a process that was lost are sent again.

A row has its seed before it is sent, and so its picture is the same whoever draws it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from PIL import Image

from dreamtune.serving.backend import Row
from dreamtune.serving.errors import Refused

SENDS = 2  # of a batch as it is, then of each of its rows alone: one of them may end replicas
Pictures = list[Image.Image | Exception]
log = logging.getLogger("dreamtune")


class Lost(Exception):
    """Whoever was to draw a batch ended before. Its text says how."""


def drawn(
    rows: Sequence[Row],
    send: Callable[[Sequence[Row]], Pictures],
    on_resend: Callable[[], None] = lambda: None,
) -> Pictures:
    """A picture or an error a row. A row that ends every replica is at last the only one without a
    picture.

    Args:
        send: draws rows somewhere. Raises Lost.
        on_resend: called before each time that rows are sent again.
    """
    for left in reversed(range(SENDS)):
        try:
            return send(rows)
        except Lost as error:
            if not left and len(rows) == 1:
                return [no_picture(f"each replica that drew it was lost: {error}")]
            log.warning("A batch of %d is sent again: %s", len(rows), error)
            on_resend()
    return [picture for row in rows for picture in drawn([row], send, on_resend)]


def no_picture(why: str) -> Refused:
    return Refused(502, f"There is no picture: {why}.", way_out="The server's log says more.")
