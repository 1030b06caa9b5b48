"""The page's files as the server gives them: which, under which policy, and that they ask no other
server. What it does in a browser: `test_browser.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from test_app import HOME, KEY, Blank

from dreamtune.adapters import METHODS
from dreamtune.serving.app import make_app
from dreamtune.serving.jobs.jobs import Jobs
from dreamtune.serving.page_routes import FILES, FOLDER, PATHS
from dreamtune.serving.settings import API_KEY, Settings

TEXTS = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


@pytest.fixture
def client() -> TestClient:
    app = make_app(Settings(adapters="a"), Blank())
    return TestClient(app, base_url=HOME, raise_server_exceptions=False)


@pytest.mark.parametrize("path", PATHS)
def test_each_file_is_served_under_the_policy(client: TestClient, path: str) -> None:
    answer = client.get(path)
    name = PATHS[path]
    assert (answer.status_code, answer.text) == (200, TEXTS[name])
    assert answer.headers["content-type"] == FILES[name]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["object-src"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert not {"script-src", "style-src", "connect-src"} & policy.keys()  # those of default-src
    assert client.post(path).status_code == 405


def test_every_file_of_the_folder_is_one_of_the_page() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)
    assert set(PATHS.values()) == set(FILES)


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/none.js", "/page/../page_routes.py", "/page/..%2fpage_routes.py",
     "/page/%2e%2e/page_routes.py", "/page_routes.py", "/index.html", "/page/index.html"],
)  # fmt: skip
def test_nothing_beside_them_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "text/html" not in answer.headers["content-type"]


def test_no_other_server_is_named() -> None:
    for name, text in TEXTS.items():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w[\w./-]*", text))
        assert found <= {"http://www.w3.org/2000/svg"}, name  # the name of SVG, which is no request


def test_no_script_or_style_stands_in_the_page() -> None:
    page = TEXTS["index.html"]
    assert re.findall(r"<script[^>]*>[^<]*", page) == ['<script type="module" src="/page/main.js">']
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)


def test_no_text_becomes_html() -> None:
    makers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function"
    for name, text in SCRIPTS.items():
        assert not re.search(makers, text), name


def test_every_import_is_a_file_and_every_name_is_in_the_page() -> None:
    ids = set(re.findall(r'\sid="([\w-]+)"', TEXTS["index.html"]))
    for name, text in SCRIPTS.items():
        assert {path for path in re.findall(r'from "\./([\w.]+)"', text)} <= set(FILES), name
        assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= ids, name
    labels = set(re.findall(r'\sfor="([\w-]+)"', TEXTS["index.html"]))
    fields = set(re.findall(r'<(?:input|select)\s+id="([\w-]+)"', TEXTS["index.html"]))
    assert fields - labels == {"photos"} and labels <= fields  # `photos` is in its label


def test_the_page_needs_no_key_and_all_that_it_asks_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    client = TestClient(make_app(Settings(adapters="a"), Blank()), base_url=HOME)
    assert [client.get(path).status_code for path in PATHS] == [200] * len(PATHS)
    for path in ("/about", "/adapters", "/jobs", "/page/", "/page/none.js"):
        assert client.get(path).status_code == 401, path
    assert client.get("/about", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_what_the_server_offers(client: TestClient, tmp_path: Path) -> None:
    found = client.get("/about").json()
    assert found == {
        "base": "blank", "sizes": [16, 32], "steps": 25, "max_steps": 100, "guidance_scale": 4.0,
        "max_prompt": 1000, "adapters_in_a_picture": 8, "training": None,
    }  # fmt: skip
    jobs = Jobs(tmp_path, "embedded", lambda *done: None, settings={"method": "oft"})
    other = make_app(Settings(adapters="a", guidance_scale=2.0), Blank(), jobs)
    found = TestClient(other, base_url=HOME).get("/about").json()
    assert found["guidance_scale"] == 2.0
    assert found["training"] == {
        "methods": sorted(METHODS), "method": "oft", "photos": 32, "max_steps": 4000, "prompt": 300,
    }  # fmt: skip
    jobs.stop()
