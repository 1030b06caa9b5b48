"""The floors of the package: which may import which, and that nothing imports in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dreamtune

ROOT = Path(dreamtune.__file__).parent
# In building order: a module imports its own floor and those before it, at whatever place.
FLOORS = (
    "ground", "adapters", "injection", "models", "fast", "data", "files", "metrics", "evaluation",
    "training", "pipeline", "serving", "roof",
)  # fmt: skip
GROUND = {"version", "embedded", "fields", "config", "configfile", "flags", "textfile", "explained"}
ROOF = {"dreamtune", "cli"}


def module_of(path: Path) -> str:
    parts = ("dreamtune", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> str:
    name = (module.split(".") + [""])[1]
    if name in GROUND:
        return "ground"
    return "roof" if not name or name in ROOF else name


def imports_of(path: Path, modules: set[str]) -> list[tuple[int, str]]:
    """(line, module of ours) of every import, those in functions and for type checkers too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative imports hide their floor"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in inner]
        else:
            continue
        found += [(node.lineno, name) for name in names if name.split(".")[0] == "dreamtune"]
    return found


@pytest.fixture(scope="module")
def edges() -> dict[str, list[tuple[int, str]]]:
    paths = {module_of(path): path for path in ROOT.rglob("*.py")}
    return {name: imports_of(path, set(paths)) for name, path in paths.items()}


def test_every_module_stands_on_a_floor(edges: dict[str, list[tuple[int, str]]]) -> None:
    assert {floor_of(module) for module in edges} == set(FLOORS)
    assert all((ROOT / floor / "__init__.py").is_file() for floor in FLOORS[1:-1])


def test_no_import_runs_up(edges: dict[str, list[tuple[int, str]]]) -> None:
    up = [
        f"{module}:{line} imports {target}"
        for module, found in edges.items()
        for line, target in found
        if FLOORS.index(floor_of(target)) > FLOORS.index(floor_of(module))
        or (floor_of(target) == "roof" and module.count("."))
    ]
    assert not up


def test_no_circle(edges: dict[str, list[tuple[int, str]]]) -> None:
    """Type checkers' imports count as well: two such modules cannot be understood apart."""
    waiting = {module: {t for _, t in found} - {module} for module, found in edges.items()}
    while free := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {module: needs for module, needs in waiting.items() if module not in free}
    assert not waiting


@pytest.mark.parametrize(
    "floor", ["data", "metrics", "evaluation", "training", "pipeline", "serving"]
)
def test_no_floor_above_the_models_knows_a_family(floor: str) -> None:
    """Its parts and its networks' arguments are the family's own."""
    words = (
        "text_encoder", "encoder_hidden_states", "vae", "latent_channels", "in_channels",
        "prompt_embeds", "StableDiffusion", "text_encoder_2", "pooled_prompt_embeds", "time_ids",
    )  # fmt: skip
    for path in (ROOT / floor).glob("*.py"):
        names = {
            getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None)
            for node in ast.walk(ast.parse(path.read_text()))
        }
        assert not names & set(words), path.name
