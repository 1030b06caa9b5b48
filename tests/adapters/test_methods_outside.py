"""Methods of other packages and of this process: there for YAML, flags, sweeps and Python alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import PositiveInt
from tiny import tiny_unet

import dreamtune
from dreamtune.adapters import METHODS, Adapter, find_method, register
from dreamtune.adapters.base import _REGISTRY
from dreamtune.cli import main
from dreamtune.config import Config
from dreamtune.configfile import from_mapping, read_yaml, signatures
from dreamtune.flags import train_config
from dreamtune.training.sweep import expand

SOURCE = '''
import torch
from dreamtune.adapters import Adapter, WeightChange


class Scaled(Adapter):
    """`W' = diag(1 + s) W`."""

    name = "scaled"
    paper = "https://example.org"
    identity_at_start = True
    low_rank = False
    depends_on_weight = True
    learning_rate = 1e-3

    def __init__(self, weight, *, slots=1, generator=None, by: float = 0.0):
        super().__init__(weight, slots, generator, {"by": by})
        self.s = torch.nn.Parameter(self.constant(weight, (weight.shape[-2],), by))

    def change(self, weight, *constants):
        return WeightChange(gain=self.s)
'''


def install(site: Path, entry: str, file: str = "outside_pkg/methods.py") -> Path:
    """A package `outside-pkg` in `site` as pip leaves it, with one entry point."""
    (site / file).parent.mkdir(parents=True, exist_ok=True)
    (site / file).write_text(SOURCE)
    info = site / "outside_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dreamtune.methods]\n{entry}\n")
    return site


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    site = install(tmp_path / "site", "scaled = outside_pkg.methods:Scaled")
    monkeypatch.syspath_prepend(site)
    yield site
    _REGISTRY.pop("scaled", None)
    for name in [n for n in sys.modules if n.startswith("outside_pkg")]:
        del sys.modules[name]


@pytest.fixture
def registered() -> Iterator[None]:
    @register
    class Toy(Adapter):
        name = "toy"
        learning_rate = 1e-3

        def __init__(self, weight, *, slots=1, generator=None, by=0.0):  # type: ignore[no-untyped-def]
            super().__init__(weight, slots, generator, {"by": by})

    yield
    del _REGISTRY["toy"]


def assert_known(method: str, folder: Path) -> None:
    """By flags, YAML and sweep."""
    config = train_config(["--method", method, "--by", "0.5"])
    assert (config.method, config.options) == (method, {"by": 0.5})
    file = folder / "c.yaml"
    file.write_text(f"method: {method}\nby: 0.25\n")
    assert train_config(["--config", str(file)]).options == {"by": 0.25}
    assert from_mapping(read_yaml(file), signatures()).method == method
    runs = expand(Config(method=method, sweep=["by=0.5,1"]))
    assert [c.options for c in runs.values()] == [{"by": 0.5}, {"by": 1.0}]
    runs = expand(Config(sweep=[f"method=lora,{method}"]))
    assert [c.method for c in runs.values()] == ["lora", method]
    with pytest.raises(
        ValueError, match=f"unknown method `{method[:-1]}`. Did you mean `{method}`"
    ):
        train_config(["--method", method[:-1]])
    with pytest.raises(ValueError, match="`rank` is an option of .*delora, .*lora, .*not of"):
        train_config(["--method", method, "--rank", "4"])


def test_a_method_registered_in_this_process(registered: None, tmp_path: Path) -> None:
    assert_known("toy", tmp_path)


def test_a_method_of_another_package(
    outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_known("scaled", tmp_path)
    assert "outside_pkg.methods" not in sys.modules  # its source was read, not run
    assert "scaled" in METHODS and len(METHODS) == len(set(METHODS))
    adapter = dreamtune.inject(tiny_unet(), "scaled", by=0.5)
    assert {p.mean().item() for p in adapter.parameters()} == {0.5}
    assert find_method("scaled").__module__ == "outside_pkg.methods"
    assert_known("scaled", tmp_path)  # now from the class itself
    assert main(["methods"]) == 0
    assert "scaled         learning rate 0.001    --by 0.0" in capsys.readouterr().out


def test_help_knows_it_without_importing_it(outside: Path) -> None:
    code = (
        "import sys; from dreamtune.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'outside_pkg', 'outside_pkg.methods'} & set(sys.modules)"
    )
    path = os.pathsep.join([str(outside), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "  scaled        --by 0.0" in done.stdout


def test_what_its_source_says_of_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types however they are imported; a constant's value is not known before it is imported; a
    class has the options of the one that it extends.
    """
    site = install(tmp_path / "site", "scaled = outside_pkg:Heir", "outside_pkg/__init__.py")
    (site / "outside_pkg" / "__init__.py").write_text(
        """
import typing as t
import pydantic
from dreamtune.adapters import Adapter
from pydantic import PositiveInt as Count
SIZE = 3
class Parent(Adapter):
    name = "parent"
    def __init__(self, weight, *, slots=1, generator=None, n: Count = 4, bare=1 / 4,
                 side: t.Literal["a", "b"] = "a", size: int = SIZE, far: Adapter = None):
        pass
class Heir(Parent):
    name: str = "scaled"
"""
    )
    monkeypatch.syspath_prepend(site)
    assert signatures()["scaled"] == {
        "n": (PositiveInt, 4),
        "bare": (Any, 0.25),
        "side": (Literal["a", "b"], "a"),
        "size": (int, None),
        "far": (Any, None),
    }
    assert train_config(["--method", "scaled", "--bare", "x"]).options == {"bare": "x"}
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        train_config(["--method", "scaled", "--n", "0"])


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("scaled = no_such_pkg:Scaled", "there is no module `no_such_pkg`"),
        ("scaled = outside_pkg.other:Scaled", "there is no module `outside_pkg.other`"),
        ("scaled = outside_pkg.methods.scaled:Scaled", "no module `outside_pkg.methods.scaled`"),
        ("scaled = outside_pkg.methods:Scald", "`methods.py` defines no class `Scald`"),
        ("scaled = outside_pkg.methods", "it must name `module:Class`"),
        ("scald = outside_pkg.methods:Scaled", "the `name` of `Scaled` is 'scaled'"),
        ("lora = outside_pkg.methods:Scaled", "dreamtune has a method of that name"),
    ],
)
def test_a_wrong_entry_point_is_named(
    entry: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", entry))
    with pytest.raises(ValueError) as caught:
        train_config(["--method", "lora"])
    text = str(caught.value)
    assert f"the entry point `{entry}` of `outside-pkg`" in text and why in text
    assert "Mend that package, or uninstall it." in text


@pytest.mark.parametrize("name", ["scaled", "scald"])
def test_a_wrong_entry_point_is_named_when_it_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = f"{name} = outside_gone.methods:Scaled"
    monkeypatch.syspath_prepend(install(tmp_path / "site", entry))
    with pytest.raises(ValueError, match=f"the entry point `{entry}` of .* No module named"):
        find_method(name)
    assert name not in _REGISTRY


def test_a_taken_name_of_an_entry_point_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install(tmp_path / "site", "lora = outside_pkg.methods:Scaled")
    file = site / "outside_pkg" / "methods.py"
    file.write_text(SOURCE.replace('name = "scaled"', 'name = "lora"'))
    monkeypatch.syspath_prepend(site)
    with pytest.raises(ValueError, match="dreamtune has a method of that name"):
        train_config([])
    assert METHODS["lora"].__module__ == "dreamtune.adapters.lora"
