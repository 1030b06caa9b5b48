"""The files of configs/serve: no container is run; what they say is held against the server."""

from __future__ import annotations

import fnmatch
import inspect
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from test_app import KEY, Blank
from test_command import served

from dreamtune.serving.app import PATIENCE, make_app
from dreamtune.serving.command import parser
from dreamtune.serving.jobs.jobs import Jobs
from dreamtune.serving.jobs.store import STATES
from dreamtune.serving.settings import API_KEY, Settings

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "configs" / "serve"
COMPOSE = yaml.safe_load((HERE / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
GRAFANA = HERE / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "dreamtune.json").read_text())
SECONDS = {"s": 1, "m": 60}


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: (name, arguments), with continued lines joined."""
    lines = [x for x in (HERE / "Dockerfile").read_text().splitlines() if not x.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    found = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in found]


BUILD = instructions()


def only(name: str) -> str:
    (found,) = (rest for kind, rest in BUILD if kind == name)
    return found


def seconds(text: str) -> int:
    return int(text[:-1]) * SECONDS[text[-1]]


def flags() -> dict[str, Any]:
    """What the server of compose.yaml is started with, as its parser reads it."""
    entry = json.loads(only("ENTRYPOINT"))
    assert entry[:2] == ["dreamtune", "serve"]
    return given_by([*entry[2:], *SERVICES["dreamtune"]["command"]])


def given_by(words: list[str]) -> dict[str, Any]:
    given = vars(parser("serve").parse_args(words))
    return {name: value for name, value in given.items() if value is not None}


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(**flags())


@pytest.fixture
def client(settings: Settings, tmp_path: Path) -> Iterator[TestClient]:
    """Of a server with a key in a file, and with jobs: as Prometheus asks it."""
    (tmp_path / "key").write_text(f"{KEY}\n")
    own = Settings(**{**flags(), "api_key_file": str(tmp_path / "key")})
    jobs = Jobs(tmp_path / "jobs", "embedded", lambda *done: None)
    (target,) = scrape()["static_configs"][0]["targets"]
    yield TestClient(make_app(own, Blank(), jobs), base_url=f"http://{target}")
    jobs.stop()


def scrape() -> dict[str, Any]:
    (found,) = yaml.safe_load((HERE / "prometheus.yml").read_text())["scrape_configs"]
    assert isinstance(found, dict)
    return found


# The image


def test_the_image_is_of_a_python_that_is_supported_and_not_of_root() -> None:
    version = re.fullmatch(r"python:3\.(\d+)-slim-\w+", only("FROM"))  # a tag, no digest
    least = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert version and least and int(version[1]) >= int(least[1])
    names = [name for name, _ in BUILD]
    assert "RUN" not in names[names.index("USER") :]
    uid, gid = only("USER").split(":")
    assert uid == gid and int(uid) > 0
    assert any(f"useradd --uid {uid} " in rest for name, rest in BUILD if name == "RUN")


def test_all_that_is_written_is_in_the_volume(settings: Settings) -> None:
    volume = Path(only("VOLUME"))
    home = dict(pair.split("=") for pair in only("ENV").split())["HF_HOME"]
    made = next(rest for name, rest in BUILD if "install --directory" in rest)
    for place in (settings.adapters, str(settings.jobs_folder), home):
        assert Path(place).parent == volume and f" {place}" in made
    assert any(mount.endswith(f":{volume}") for mount in SERVICES["dreamtune"]["volumes"])


def taken(path: str) -> bool:
    """Whether .dockerignore lets a file or folder of the root into the build: the last that fits
    decides.
    """
    found = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            rule = line.removeprefix("!").removeprefix("**/")
            if any(fnmatch.fnmatch(part, rule) for part in (path, *Path(path).parts)):
                found = line.startswith("!")
    return found


def test_what_is_copied_is_there_and_what_is_installed_is_an_extra() -> None:
    copied = [p for name, rest in BUILD if name == "COPY" for p in rest.split()[:-1]]
    assert {"pyproject.toml", "dreamtune"} <= set(copied)
    assert all((ROOT / path).exists() and taken(path) for path in copied)
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r'(?:readme = |license-files = \[)"([\w.]+)"', project):
        assert name in copied  # the build reads them
    for path in ("configs/serve/.env", ".git", "runs", ".venv", "dreamtune/__pycache__"):
        assert not taken(path), path
    (extra,) = re.findall(r"pip install \S+ '\.\[(\w+)\]'", " ".join(rest for _, rest in BUILD))
    assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def test_flags_and_ports_are_the_server_s(settings: Settings) -> None:
    assert settings.host == "0.0.0.0" and not settings.at_home
    assert only("EXPOSE") == str(settings.port) == str(Settings(adapters="a").port)
    (shown,) = re.findall(rf"-e {API_KEY} dreamtune (.*)", (HERE / "Dockerfile").read_text())
    entry = json.loads(only("ENTRYPOINT"))[2:]
    assert Settings(**given_by([*entry, *shown.split()])).max_batch == 8


def test_the_health_check_asks_the_server() -> None:
    options, command = only("HEALTHCHECK").split(" CMD ")
    words = json.loads(command)
    assert words[:2] == ["python", "-c"] and f"127.0.0.1:{only('EXPOSE')}/health" in words[2]
    timeout = re.search(r"timeout=(\d+)", words[2])
    stated = dict(option.removeprefix("--").split("=") for option in options.split())
    assert timeout and int(timeout[1]) < seconds(stated["timeout"])
    engine = Blank()
    with served(engine) as (_, (host, port), _):
        code = words[2].replace(f"127.0.0.1:{only('EXPOSE')}", f"{host}:{port}")
        for broken, status in ((None, 0), ("CUDA error", 1)):
            engine.broken = broken
            environment = {"http_proxy": "http://127.0.0.1:9"}  # must not be asked
            done = subprocess.run(
                [sys.executable, "-I", "-c", code], env=environment, capture_output=True
            )
            assert done.returncode == status, done.stderr


# What runs together


def test_nothing_listens_beyond_this_machine_and_all_is_there(settings: Settings) -> None:
    for name, service in SERVICES.items():
        assert service["ports"] and all(p.startswith("127.0.0.1:") for p in service["ports"]), name
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (HERE / source).exists(), mount
                assert mount.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"]
        assert {secret["source"] for secret in service["secrets"]} <= set(COMPOSE["secrets"])
        if "image" in service:  # of one version
            assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
    assert SERVICES["dreamtune"]["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    build = SERVICES["dreamtune"]["build"]
    assert (HERE / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == HERE / "Dockerfile"
    more = yaml.safe_load((HERE / "compose.gpu.yaml").read_text())
    assert set(more["services"]) == {"dreamtune"}


def test_it_may_take_as_long_to_end_as_it_does() -> None:
    grace = inspect.signature(Jobs.stop).parameters["grace"].default
    stop = seconds(SERVICES["dreamtune"]["stop_grace_period"])
    assert stop >= PATIENCE + grace
    assert f"--stop-timeout {stop} " in (HERE / "Dockerfile").read_text()


def secret(service: str, name: str) -> dict[str, Any]:
    (found,) = (s for s in SERVICES[service]["secrets"] if s["source"] == name)
    assert found["mode"] == 0o400
    return dict(found)


def test_the_key_is_one_file_of_the_server_and_of_prometheus(settings: Settings) -> None:
    assert COMPOSE["secrets"]["api_key"] == {"environment": API_KEY}
    assert f"{secret('dreamtune', 'api_key')['uid']}:10001" == only("USER")
    assert secret("prometheus", "api_key")["uid"] != "0"
    assert settings.api_key_file == scrape()["authorization"]["credentials_file"]
    assert settings.api_key_file == "/run/secrets/api_key"
    password = secret("grafana", "grafana_password")
    given = SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"]
    assert given == f"/run/secrets/{password['source']}"


def test_prometheus_is_let_in(client: TestClient, settings: Settings) -> None:
    job = scrape()
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in SERVICES and int(port) == settings.port
    headers = {"Authorization": f"{job['authorization']['type']} {KEY}"}
    assert client.get(job["metrics_path"], headers=headers).status_code == 200
    assert client.get(job["metrics_path"]).status_code == 401


# The dashboard


def exposed(client: TestClient) -> dict[str, dict[str, set[str]]]:
    """Names of the samples as Prometheus stores them -> label -> its values."""
    text = client.get("/metrics", headers={"X-API-Key": KEY}).text
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    # of Prometheus itself
    return {**found, "up": {"job": {scrape()["job_name"]}}}


WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "bool", "and", "or"}
SERIES = re.compile(r"([A-Za-z_:][\w:]*)\s*(\{[^}]*\})?(\[[^\]]*\])?(?!\w)(?!\s*\()")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


def series(expression: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """(name, (label, value) of its matchers) of each that an expression reads."""
    plain = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", expression)
    found = []
    for name, matchers, _ in SERIES.findall(plain):
        if name not in WORDS:
            pairs = [
                (label, value)
                for label, how, text in MATCHER.findall(matchers)
                for value in (text.split("|") if "~" in how else [text])
            ]
            found.append((name, pairs))
    return found


def test_series_are_read_from_expressions() -> None:
    text = 'sum by (le, x) (rate(a_b{c="d",e=~"f|g"}[$__rate_interval])) / (h:i > bool 3)'
    assert series(text) == [("a_b", [("c", "d"), ("e", "f"), ("e", "g")]), ("h:i", [])]
    assert series("histogram_quantile(0.5, sum(rate(a_bucket[5m])) by (le))") == [("a_bucket", [])]


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_panel_reads_what_the_server_tells(client: TestClient) -> None:
    known = exposed(client)
    assert known["dreamtune_jobs"]["state"] == set(STATES)
    read = set()
    for expression in expressions():
        found = series(expression)
        assert found, expression
        for name, pairs in found:
            assert name in known, expression
            read.add(name)
            for label, value in pairs:
                assert value in known[name].get(label, ()), expression
        for labels in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {x.strip() for x in labels.split(",")} <= set(known[found[0][0]]), expression
    families = {re.sub("_(bucket|sum|count|total)$", "", name) for name in known}
    families -= {name for name in families if name.endswith("_created")}
    assert {re.sub("_(bucket|sum|count|total)$", "", name) for name in read} == families


def test_the_legends_are_labels_and_the_panels_do_not_overlap(client: TestClient) -> None:
    known = exposed(client)
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            of = known[series(target["expr"])[0][0]]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(of)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(p["x"] + p["w"] <= 24 for p in places)
    for a, b in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in SERVICES
    for panel in DASHBOARD["panels"]:
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": source["type"], "uid": source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards/dreamtune.yaml").read_text())[
        "providers"
    ]
    mounts = dict(mount.split(":")[1::-1] for mount in SERVICES["grafana"]["volumes"])
    assert (HERE / mounts[provider["options"]["path"]]).resolve() == GRAFANA / "dashboards"
    assert (HERE / mounts["/etc/grafana/provisioning"]).resolve() == provisioning
    asked = yaml.safe_load((HERE / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == asked
