"""The queue by itself, with a `draw` that waits for the test."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreamtune.serving.backend import Row, Shape
from dreamtune.serving.errors import Refused
from dreamtune.serving.metrics import Metrics
from dreamtune.serving.queue import Queue

A, B = Shape(16, 2, 4.0), Shape(16, 3, 4.0)
PATIENCE = 20.0  # seconds for what takes none


class Drawing:
    """Draws when it is let; a picture's one pixel is its seed. batches: the seeds of each."""

    def __init__(self, held=False):
        self.batches, self.shapes = [], []
        self.begun, self.let = threading.Event(), threading.Event()
        if not held:
            self.let.set()

    def __call__(self, rows, shape):
        self.batches.append([row.seed for row in rows])
        self.shapes.append(shape)
        self.begun.set()
        assert self.let.wait(PATIENCE)
        return [Image.new("L", (1, 1), row.seed) for row in rows]


def queue_of(draw, **more):
    options = {"wait": 0.0, "max_batch": 4, "max_queue": 100, "timeout": PATIENCE}
    return Queue(draw, Metrics(), **{**options, **more})


def put(queue, seeds, shape=A):
    return [queue.submit(Row("a", "", None, seed), shape) for seed in seeds]


def seed_of(ticket):
    return ticket.answer.result(PATIENCE).image.getpixel((0, 0))


def test_what_waits_is_drawn_together_oldest_first_and_shapes_apart():
    draw = Drawing()
    queue = queue_of(draw)
    tickets = put(queue, [1, 2]) + put(queue, [3, 4], B) + put(queue, [5, 6, 7])
    queue.start()
    assert [seed_of(ticket) for ticket in tickets] == [1, 2, 3, 4, 5, 6, 7]
    assert draw.batches == [[1, 2, 5, 6], [3, 4], [7]]
    assert draw.shapes == [A, B, A]
    assert [t.answer.result().batch for t in tickets] == [4, 4, 2, 2, 4, 4, 1]
    queue.close(PATIENCE)
    assert not queue.alive


def test_a_full_batch_does_not_wait_and_one_alone_waits_as_long_as_stated():
    draw = Drawing()
    queue = queue_of(draw, wait=PATIENCE)
    queue.start()
    assert [seed_of(t) for t in put(queue, [1, 2, 3, 4])] == [1, 2, 3, 4]
    queue.wait = 0.2
    began = time.monotonic()
    first, second = put(queue, [5]), put(queue, [6])
    assert (seed_of(second[0]), seed_of(first[0])) == (6, 5)
    assert 0.2 <= time.monotonic() - began < PATIENCE
    assert draw.batches == [[1, 2, 3, 4], [5, 6]]
    assert 0.2 <= first[0].answer.result().waited < PATIENCE
    queue.close(PATIENCE)


def test_while_one_batch_is_drawn_the_next_gathers():
    draw = Drawing(held=True)
    queue = queue_of(draw)
    queue.start()
    tickets = put(queue, [1])
    assert draw.begun.wait(PATIENCE)
    tickets += put(queue, [2, 3])
    assert not queue.cancel(tickets[0])  # it is being drawn
    draw.let.set()
    assert [seed_of(ticket) for ticket in tickets] == [1, 2, 3]
    assert draw.batches == [[1], [2, 3]]
    queue.close(PATIENCE)


def test_who_has_gone_is_not_drawn():
    draw = Drawing()
    queue = queue_of(draw)
    tickets = put(queue, [1, 2, 3])
    assert queue.cancel(tickets[1])
    assert not queue.cancel(tickets[1])
    assert len(queue.waiting) == 2
    queue.start()
    assert (seed_of(tickets[0]), seed_of(tickets[2])) == (1, 3)
    with pytest.raises(CancelledError):
        tickets[1].answer.result(0)
    assert draw.batches == [[1, 3]]
    queue.close(PATIENCE)


def test_an_answer_that_somebody_else_has_cancelled_is_passed_over():
    draw = Drawing()
    queue = queue_of(draw, max_batch=2)
    tickets = put(queue, [1, 2, 3])
    for ticket in tickets[:2]:
        assert ticket.answer.cancel()
    queue.start()
    assert seed_of(tickets[2]) == 3
    queue.close(PATIENCE)
    assert draw.batches == [[3]]


def test_who_is_too_late_is_told_so_and_not_drawn():
    draw = Drawing(held=True)
    queue = queue_of(draw)
    queue.start()
    put(queue, [1])
    assert draw.begun.wait(PATIENCE)
    queue.timeout = 0.0
    (late,) = put(queue, [2])
    draw.let.set()
    with pytest.raises(Refused, match="no picture within 0 seconds") as found:
        late.answer.result(PATIENCE)
    assert found.value.status == 504
    queue.close(PATIENCE)
    assert draw.batches == [[1]]


def test_a_full_queue_says_when_to_come_back():
    queue = queue_of(Drawing(), max_queue=3)
    queue.took = 4.0
    put(queue, [1, 2, 3])
    with pytest.raises(Refused, match="The queue is full: requests that wait: 3") as found:
        put(queue, [4])
    assert (found.value.status, found.value.headers) == (503, {"Retry-After": "4"})
    assert queue.cancel(queue.waiting[0])
    put(queue, [4])


def test_closing_answers_what_was_accepted_and_takes_no_more():
    draw = Drawing(held=True)
    queue = queue_of(draw, wait=PATIENCE)
    queue.start()
    tickets = put(queue, [1, 2, 3, 4]) + put(queue, [5, 6])
    assert draw.begun.wait(PATIENCE)
    closing = threading.Thread(target=queue.close)
    closing.start()
    while not queue.closed:
        time.sleep(0.001)
    with pytest.raises(Refused, match="shut down"):
        put(queue, [7])
    draw.let.set()
    assert [seed_of(ticket) for ticket in tickets] == [1, 2, 3, 4, 5, 6]
    closing.join(PATIENCE)
    assert not queue.alive


def test_closing_does_not_wait_for_ever():
    draw = Drawing(held=True)
    queue = queue_of(draw)
    queue.start()
    put(queue, [1])
    assert draw.begun.wait(PATIENCE)
    (left,) = put(queue, [2])
    queue.close(0.01)
    with pytest.raises(Refused, match="shut down"):
        left.answer.result(0)
    draw.let.set()


def failing(rows, shape):
    raise SystemExit("a fault")


def short(rows, shape):
    return []


@pytest.mark.parametrize("draw", [failing, short])
def test_a_draw_that_is_at_fault_answers_everybody(draw):
    queue = queue_of(draw)
    tickets = put(queue, [1, 2])
    queue.start()
    for ticket in tickets:
        assert isinstance(ticket.answer.exception(PATIENCE), RuntimeError)
    assert queue.alive
    queue.close(PATIENCE)


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.booleans()), max_size=20), st.integers(1, 5))
def test_everybody_is_answered_once_and_nobody_is_passed_over(asked, most):
    draw = Drawing()
    queue = queue_of(draw, max_batch=most)
    tickets = [put(queue, [seed], shape)[0] for seed, (shape, _) in enumerate(asked)]
    for ticket, (_, gone) in zip(tickets, asked):
        assert not gone or queue.cancel(ticket)
    queue.start()
    queue.close(PATIENCE)
    stay = [seed for seed, (_, gone) in enumerate(asked) if not gone]
    assert sorted(seed for batch in draw.batches for seed in batch) == stay
    assert [seed_of(tickets[seed]) for seed in stay] == stay
    done = set()
    for batch, shape in zip(draw.batches, draw.shapes):
        left = [seed for seed in stay if seed not in done]
        same = [seed for seed in left if asked[seed][0] == shape]
        assert batch[0] == left[0]  # the oldest of all
        assert batch == same[:most]
        done |= set(batch)
