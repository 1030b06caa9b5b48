"""The page in a browser: Chromium, driven by playwright (`pip install 'dreamtune[browser]'`).

The browser is `$DREAMTUNE_CHROMIUM`, else the `chromium` of the system.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from job_children import Children
from test_app import KEY, PATIENCE, Blank, until
from tiny import disturb

import dreamtune
from dreamtune import embedded
from dreamtune.serving.app import make_app
from dreamtune.serving.command import bound
from dreamtune.serving.engine import Engine, Known
from dreamtune.serving.jobs.jobs import Jobs
from dreamtune.serving.settings import API_KEY, Settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("DREAMTUNE_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
EVIL = "<img src=x onerror=document.title='evil'>"
SLOW = 120e3  # milliseconds for a training of few steps
READY = "body[data-ready]"
PHONE = {"width": 360, "height": 740}


@contextlib.contextmanager
def served(engine: Any, jobs: Jobs | None = None, port: int = 0) -> Iterator[str]:
    """The address of a server of it."""
    settings = Settings(adapters="a", port=port, num_inference_steps=1, timeout_s=60.0)
    app = make_app(settings, engine, jobs)
    with bound(settings) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            if jobs is not None:
                jobs.stopping.set()
            server.should_exit = server.force_exit = True  # pages poll: no waiting for them
            thread.join(PATIENCE)


def import_scorers() -> None:
    """What a training imports at its first scoring and its end; a fork of this process has it."""
    import matplotlib.figure  # noqa: F401
    import open_clip  # noqa: F401


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    beside = threading.Thread(target=import_scorers)  # while Chromium starts
    beside.start()
    with playwright.sync_playwright() as found:
        chromium = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        beside.join()
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose every error, refused script and request to others fails the test."""
    wrong: list[str] = []
    context = browser.new_context(reduced_motion="reduce")
    found = context.new_page()
    found.set_default_timeout(PATIENCE * 1e3)
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda said: wrong.append(said.text) if "Policy" in said.text else None)
    found.on("request", lambda r: None if is_own(r.url) else wrong.append(r.url))
    yield found
    context.close()
    assert not wrong


def is_own(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:"))


def opened(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector(READY)


def bodies(page: Any) -> list[dict[str, Any]]:
    """What is sent to be drawn, from now on."""
    sent: list[dict[str, Any]] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if "/generate" in r.url else None)
    return sent


def no_side_scroll(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def is_text(page: Any, text: str) -> bool:
    """Shown as it was written, and nowhere taken for HTML."""
    there = page.get_by_text(text, exact=True).filter(visible=True)
    return there.count() > 0 and page.title() != "evil" and not page.query_selector("img[src=x]")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """The embedded base with an adapter of a name that is not nice."""
    (tmp_path / "adapters").mkdir()
    settings = Settings(adapters=str(tmp_path / "adapters"))
    with Engine.opened(settings, tell=lambda text: None) as found:
        adapter = dreamtune.inject(copy.deepcopy(found.pipe.unet), "lora", rank=1)
        disturb(adapter)
        found.add(EVIL, adapter.save(tmp_path / "evil", metadata={"prompt": "a sks cat"}))
        yield found


@pytest.fixture
def jobs(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    Children().into(monkeypatch)
    settings = {
        "validation_prompt": ["a {}"], "validation_steps": 2, "num_inference_steps": 1,
        "train_batch_size": 1, "options": {"rank": 2}, "device": "cpu", "checkpointing_steps": 0,
    }  # fmt: skip
    taken = lambda: list(engine.adapters)  # noqa: E731
    folder = tmp_path / "jobs"
    quick = {"gather": 0, "poll": 0.02}
    with Jobs(folder, "embedded", engine.add, settings=settings, taken=taken, **quick) as found:
        yield found


def test_from_photos_to_pictures(page: Any, engine: Engine, jobs: Jobs, tmp_path: Path) -> None:
    photos = sorted(embedded.subject("robot-cartoon").folder.glob("*.jpg"))[:4]
    (tmp_path / "notes.jpg").write_text("no picture")
    with served(engine, jobs) as url:
        opened(page, url)
        page.fill("#train-prompt", "a sks robot")
        page.set_input_files("#photos", [*photos, tmp_path / "notes.jpg"])
        page.wait_for_selector("#crops li:nth-child(4) img")
        assert "notes.jpg: it is not an image" in page.text_content("#crops li.bad")
        page.wait_for_function("document.getElementById('train-name').value === 'robot'")
        assert "sks robot (identifier sks, class robot)" in page.text_content("#words")
        page.click("text=More settings")
        page.fill("#train-steps", "4")
        page.click("button:text-is('Train')")
        page.wait_for_selector(".job")
        page.fill(".row .prompt", "a sks cat in the snow")  # while it trains
        page.fill(".row .seed", "7")
        page.click("text=Add a row")
        second = page.locator(".row").nth(1)
        assert second.locator(".prompt").input_value() == "a sks cat in the snow"
        second.locator(".prompt").fill("")
        second.locator("select").select_option(EVIL)
        assert second.locator(".prompt").input_value() == "a sks cat"
        second.locator("input[type=range]").fill("0.5")
        second.locator(".prompt").fill(EVIL)
        assert is_text(page, EVIL)
        page.wait_for_selector(
            ".job[data-state=done] .samples figure:nth-child(3) img", timeout=SLOW
        )
        legend = page.text_content(".legend")
        assert "DINO 0." in legend and "CLIP-I 0." in legend
        assert len(page.query_selector_all(".job circle.dino")) == 3  # steps 0, 2 and 4
        page.wait_for_selector("text=robot can be drawn now")

        sent = bodies(page)
        page.select_option(".row select", "robot")
        assert page.input_value(".row .prompt") == "a sks robot in the snow"
        page.click("text=Draw 2 pictures")
        page.wait_for_selector("#results .tile:nth-child(2) img", timeout=SLOW)
        page.wait_for_selector("#past .tile:nth-child(2) img")
        assert sorted(sent, key=lambda body: body["prompt"]) == [
            {"prompt": EVIL, "adapter": {EVIL: 0.5}, "seed": 7, "size": engine.sizes[0]},
            {
                "prompt": "a sks robot in the snow",
                "adapter": "robot",
                "seed": 7,
                "size": engine.sizes[0],
            },
        ]
        width = "document.querySelector('#results img').naturalWidth"
        assert page.evaluate(width) == engine.sizes[0]
        assert "2 at once" in page.text_content("#results .facts")

        page.reload()
        page.wait_for_selector("#past .tile:nth-child(2) img")
        page.wait_for_selector(".job[data-state=done]")
        assert is_text(page, EVIL)
        page.set_viewport_size(PHONE)
        assert no_side_scroll(page)
        page.click("#past .tile:last-child .picture")
        assert page.locator(".row").count() == 3


class Named(Blank):
    """Also with an adapter of a long name that would be HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters[EVIL] = Known(EVIL, "lora", 4, None, None, None)


def test_by_keyboard_on_a_phone(page: Any) -> None:
    page.set_viewport_size(PHONE)
    with served(Named()) as url:
        opened(page, url)
        assert page.is_visible("#no-training")
        sent = bodies(page)
        press, write = page.keyboard.press, page.keyboard.type
        press("Tab")  # the link that skips to the rows
        press("Enter")
        press("Tab")
        write(EVIL)
        press("Tab")
        write("cat")
        press("Tab")
        write("3")
        press("Tab")
        for _ in range(4):
            press("ArrowLeft")
        for _ in range(2):  # past the button that takes the subject out
            press("Tab")
        press("Enter")  # a row more, which has the focus
        write("!")
        press("Enter")  # in a prompt: all are drawn
        page.wait_for_selector("#past .tile:nth-child(2) img")
        assert sorted(sent, key=lambda body: len(body["prompt"])) == [
            {"prompt": EVIL, "adapter": {"cat": 0.8}, "seed": 3, "size": 16},
            {"prompt": f"{EVIL}!", "adapter": None, "seed": 3, "size": 16},
        ]
        page.select_option(".row select >> nth=1", EVIL)
        assert is_text(page, EVIL) and no_side_scroll(page)
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("text=Clear the history")
        page.wait_for_selector("text=Nothing has been drawn yet")
        assert not page.query_selector_all("#past .tile")


def test_a_key_is_asked_for_once_and_an_end_is_told(
    page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    page.clock.install()
    with served(Blank()) as url:
        page.goto(url)
        page.wait_for_selector("#key-dialog[open]")
        for key, after in (("wrong-wrong", "text=That key was not taken."), (KEY, READY)):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            page.wait_for_selector(after)
        page.reload()
        page.wait_for_selector(READY)
        page.fill(".prompt", "x" * 2000)  # no more than the server takes
        assert len(page.input_value(".prompt")) == 1000
        page.click("text=Settings of all rows")
        page.fill("#steps", "1000")
        page.click("button:text-is('Draw')")
        assert "`steps` is too large. Got 1000." in page.text_content("#results .tile.bad")
    page.evaluate("document.getElementById('steps').value = ''")
    page.click("button:text-is('Draw')")
    page.wait_for_selector("#offline:visible")
    assert "The server cannot be reached." in page.text_content("#results .tile.bad")
    with served(Blank(), port=int(url.rpartition(":")[2])):
        page.clock.fast_forward(5000)  # it looks for the server of itself
        page.wait_for_selector("#offline", state="hidden")
        page.click("button:text-is('Draw')")
        page.wait_for_selector("#results .tile img")
