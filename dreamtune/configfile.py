"""Configs from YAML files, flags and earlier runs; the methods there are, and their options."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from dreamtune.config import EMBEDDED, FIELDS, Config, plain_default, rules
from dreamtune.fields import (
    UnreadableFile,
    checker,
    from_file,
    nearest,
    shown,
    validated,
)
from dreamtune.textfile import read_text

METHODS_GROUP = "dreamtune.methods"
# What a method's annotations may come from: modules that are imported here anyway.
LIGHT = {"typing", "typing_extensions", "pydantic", "annotated_types", "dreamtune.fields"}
NOT_OPTIONS = ("slots", "generator")
PICTURES = ("instance_data_dir", "class_data_dir")
PLACES = ("pretrained_model_name_or_path", "dino", "clip", *PICTURES)  # of files on this machine
LOCAL, WORDS = "local-dir:", (EMBEDDED, "none")
MAX_VALUES = 10_000  # of a config file, aliases written out
Signature = dict[str, tuple[Any, Any]]  # option -> type with its range, default


def entry_points() -> dict[str, EntryPoint]:
    """name -> entry point of the methods that other packages offer: their group is
    `dreamtune.methods`, each is named like its method, its value is `module:Class`.

    Raises ValueError for one without a class, or a second of one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=METHODS_GROUP):
        if not point.attr:
            raise wrong(point, "it must name `module:Class`")
        if found.get(point.name, point).value != point.value:
            raise wrong(point, f"`{found[point.name].value}` has that name too")
        found[point.name] = point
    return found


def wrong(point: EntryPoint, why: str) -> ValueError:
    """What is wrong with an entry point, and whose it is."""
    owner = f" of `{point.dist.name}`" if point.dist is not None else ""
    return ValueError(
        f"the entry point `{point.name} = {point.value}`{owner} in {METHODS_GROUP} gives no "
        f"method: {why}. Mend that package, or uninstall it."
    )


def signatures() -> dict[str, Signature]:
    """The options of every method that `find_method` knows.

    Parsed, not imported: importing a method costs a second of torch, which `--help` must not take.
    What this process has registered by itself is asked directly.
    """
    found = dict(packaged())
    for name, point in entry_points().items():
        if name in found:
            raise wrong(point, "dreamtune has a method of that name")
        node, source = class_of(point)
        found[name] = source.signature(node)
    adapters = sys.modules.get("dreamtune.adapters")
    return found if adapters is None else found | adapters.registered_signatures()


@functools.cache
def packaged() -> dict[str, Signature]:
    """The methods of the package, from adapters/*.py; read once a process."""
    files = map(Source, sorted((Path(__file__).parent / "adapters").glob("*.py")))
    named = [(name_of(node), node, file) for file in files for node in file.classes.values()]
    return {name: file.signature(node) for name, node, file in named if name is not None}


def class_of(point: EntryPoint) -> tuple[ast.ClassDef, Source]:
    """The class that an entry point names, from the file of its module."""
    top, *inner = point.module.split(".")
    spec = importlib.util.find_spec(top)  # of a top-level name: it imports nothing
    for name in inner:
        places = spec.submodule_search_locations if spec else None
        spec = PathFinder.find_spec(name, places) if places else None
    if spec is None:
        raise wrong(point, f"there is no module `{point.module}`")
    if not str(spec.origin).endswith(".py"):
        raise wrong(point, f"`{point.module}` has no source file")
    source = Source(Path(str(spec.origin)))
    if point.attr not in source.classes:
        raise wrong(point, f"`{source.path.name}` defines no class `{point.attr}`")
    node = source.classes[point.attr]
    if name_of(node) != point.name:
        raise wrong(point, f"the `name` of `{point.attr}` is {name_of(node)!r}")
    return node, source


class Source:
    """A parsed file: its classes, and what their annotations may be made of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        body = ast.parse(path.read_text(encoding="utf-8")).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        light = [n for n in body if modules_of(n) and modules_of(n) <= LIGHT]
        self.names: dict[str, Any] = {}
        exec(compile(ast.Module(light, []), str(path), "exec"), self.names)  # type: ignore[arg-type]

    def signature(self, node: ast.ClassDef) -> Signature:
        """Of the class's `__init__`, or of the one that it has from a class in its file."""
        inits = (s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__")
        init = next(inits, None)
        if init is None:
            parents = [b.id for b in node.bases if isinstance(b, ast.Name) and b.id in self.classes]
            return self.signature(self.classes[parents[0]]) if parents else {}
        pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
        options = {a.arg: (a.annotation, d) for a, d in pairs if a.arg not in NOT_OPTIONS}
        return {
            name: (self.value(kind, Any), self.value(default, None))
            for name, (kind, default) in options.items()
        }

    def value(self, node: ast.expr | None, otherwise: Any) -> Any:
        """Otherwise: what is made of other names. The class itself knows, when it is imported."""
        if node is None:
            return otherwise
        try:
            return eval(compile(ast.Expression(node), str(self.path), "eval"), self.names)
        except NameError:
            return otherwise


def modules_of(node: ast.stmt) -> set[str | None]:
    """What an import statement imports from; nothing for another statement."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module} if isinstance(node, ast.ImportFrom) else set()


def name_of(node: ast.ClassDef) -> str | None:
    """What the class sets `name` to."""
    for statement in node.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name("name")], value=ast.Constant(str(name)))
                | ast.AnnAssign(target=ast.Name("name"), value=ast.Constant(str(name)))
            ):
                return name
    return None


def from_mapping(values: Mapping[str, Any], methods: Mapping[str, Signature]) -> Config:
    """A config from YAML or flags. Keys that are options of the method go to `options`, and are
    checked there. methods: what `signatures` gives.
    """
    values = dict(values)
    first: dict[str, Any] = {k: values[k] for k in ("method", "options") if k in values}
    values |= validated(rules(), first)  # what the others depend on
    options = dict(values.pop("options", {}))
    options |= {k: values.pop(k) for k in [k for k in values if k not in FIELDS]}
    method = values.get("method", FIELDS["method"].default)
    known = methods.get(method, {})
    if method not in methods:
        there = f"There are {', '.join(methods)}."
        raise ValueError(f"unknown method `{method}`.{nearest(str(method), methods)} {there}")
    for key in options:
        if key not in known:
            owners = [m for m, o in methods.items() if key in o]
            if owners:
                raise ValueError(f"`{key}` is an option of {', '.join(owners)}, not of {method}.")
            raise ValueError(f"unknown option `{key}`.{nearest(key, [*FIELDS, *known])}")
    own = checker({name: kind for name, (kind, _) in known.items()})
    return Config(**values, options=validated(own, options))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A config file, its fields checked; what else it has may be options of the method. Raises
    UnreadableFile, which names the file and the field.
    """
    if not Path(path).exists():
        raise UnreadableFile(f"there is no config file `{path}`.")
    loaded = parse_yaml(read_text(path), f"`{path}`") or {}
    if not isinstance(loaded, dict):
        raise UnreadableFile(
            f"`{path}` must hold `name: value` lines, got {type(loaded).__name__}."
        )
    for name in loaded:
        if not isinstance(name, str):
            raise UnreadableFile(f"`{path}`: a name must be a word, got {shown(name)}.")
    return from_file(rules(others=True), loaded, f"`{path}`")


def read_run(path: Path) -> dict[str, Any]:
    """config.yaml of a run. What lay in the run's folder lies where the folder is now."""
    values = read_yaml(path)
    old, new = values.get("output_dir"), os.path.abspath(path.parent)
    if old is not None:
        for name in PLACES:
            kind, place = kind_and_place(values.get(name) or "")
            if place == old or place.startswith(old + os.sep):
                values[name] = kind + new + place[len(old) :]
    return values


def kind_and_place(value: str) -> tuple[str, str]:
    """open_clip writes a kind before a folder: `local-dir:models/clip`."""
    kind = LOCAL if value.startswith(LOCAL) else ""
    return kind, value[len(kind) :]


def absolute(config: Config) -> Config:
    """Places on this machine as absolute paths: the run may go on from another folder."""
    found: dict[str, Any] = {}
    for name in PLACES:
        kind, place = kind_and_place(getattr(config, name) or "none")
        if place in WORDS or place.startswith(f"{EMBEDDED}:"):
            continue
        path = os.path.abspath(os.path.expanduser(place))
        # another name of a base or a scorer is one of the hub
        if name in PICTURES or kind or os.path.exists(path):
            found[name] = kind + path
    return dataclasses.replace(config, **found)  # type: ignore[arg-type]


def parse_yaml(text: str, place: str) -> Any:
    """Raises UnreadableFile, which names the place, for what is no YAML, or has a name twice."""
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        weigh(root)
        if isinstance(root, yaml.MappingNode):
            names = [key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise ValueError(f"it has `{twice[0]}` twice.")
        return yaml.safe_load(text)
    except RecursionError:
        raise UnreadableFile(f"{place} is not YAML: it is nested too deeply.") from None
    except Exception as error:  # what a tag makes of a value raises whatever it likes
        raise UnreadableFile(f"{place} is not YAML: {str(error)[:500]}") from None


def fixed(saved: Mapping[str, Any]) -> list[str]:
    """The fields that a continuation must leave as they are in the settings of a run."""
    free = {name: f.metadata["resume"] for name, f in FIELDS.items()}
    return [n for n, may in free.items() if not (may(saved) if callable(may) else may)]


def weigh(node: Any) -> None:
    """Raises ValueError for YAML that is small as a text and endless once it is read: each alias
    stands for all that its anchor holds, and a number takes the square of its digits.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in open_nodes:
            raise ValueError(f"what line {node.start_mark.line + 1} begins holds itself.")
        if isinstance(node.value, str) and not node.tag.endswith(":str") and len(node.value) > 400:
            raise ValueError(f"line {node.start_mark.line + 1} has a number of too many digits.")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            inner = node.value if isinstance(node.value, list) else []
            parts = [x for i in inner for x in (i if isinstance(i, tuple) else (i,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
            open_nodes.remove(id(node))
        return sizes[id(node)]

    if node is not None and size(node) > MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {MAX_VALUES} values.")


def continued(config: Config, saved_file: Path) -> Config:
    """The config of a resumed run: what is left at its default comes from the run; what differs
    must be free to.

    Raises ValueError that names every field that would change the run.
    """
    if not saved_file.is_file():
        raise ValueError(
            f"there is no `{saved_file}`: {saved_file.parent} is not the folder of a run."
        )
    saved = from_file(rules(), read_run(saved_file), f"`{saved_file}`")
    default = {name: plain_default(name) for name in FIELDS}
    merged, clashes, bound = {}, [], fixed(saved)
    for key in FIELDS:
        now = getattr(config, key)
        old = saved.get(key, default[key])
        merged[key] = old if now == default[key] and key != "resume_from_checkpoint" else now
        if key == "options":
            merged[key] = {**old, **now}
        # of a mapping the first that fits a layer decides, so that its order counts too
        ordered = key != "target_modules" or list(merged[key] or ()) == list(old or ())
        if (merged[key] != old or not ordered) and key in bound:
            clashes.append(f"`{key}` was {old!r}, is {now!r}")
    if clashes:
        raise ValueError(
            f"the run in {saved_file.parent} was started otherwise: {'; '.join(clashes)}. "
            "Leave them out to continue it, or start a new run with another --output_dir."
        )
    return Config(**merged)
