"""Which adapter a path means, and what its run says of it: one answer for loading, exporting and
generating, from Python and from the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dreamtune.config import EMBEDDED
from dreamtune.configfile import read_run
from dreamtune.fields import UnreadableFile
from dreamtune.files.formats import formats, is_adapter
from dreamtune.files.hub import EXAMPLE, Repository, Where, name_of_folder, parents
from dreamtune.files.tensors import read_keys

CONFIG, STATE, BEST = "config.yaml", "run_state.json", "best"
SETTINGS = ("adapter_config.json", STATE)  # that are read beside an adapter
HERE = Where()


def adapter_file(path: str | Path, where: Where = HERE) -> Path:
    """The file itself, or of a folder: the one in its best/, else its own, in the order of
    `formats`, the native first; else the one adapter under another name, as the tools call them
    that take any.

    A checkpoint-N folder (one with a run_state.json) means its own step, though it keeps a copy of
    best/, which is there to resume from. A string that is no path here and looks like an id of the
    hub means that repository, whose folder is read alike; what is needed of it is downloaded.

    where: a place inside. Raises ValueError where there is none.
    """
    place = Path(path).expanduser()
    if place.exists():
        where.check_here(place)
        return _file_here(place / where.inside())
    found = Repository.named(path, where) if isinstance(path, str) else None
    if found is not None:
        return _file_of(found)
    if place.suffix == ".safetensors":
        raise ValueError(f"no adapter file at `{path}`")
    hint = f". On the hub it would be `hf://{path}`" if str(path).count("/") == 1 else ""
    raise ValueError(
        f"no adapter at `{path}`, where nothing is. Give a file, the folder of a run, or an id of"
        f" the hub such as {EXAMPLE}{hint}"
    )


def _file_here(path: Path) -> Path:
    if path.is_file():
        return path
    if path.suffix == ".safetensors" and not path.is_dir():
        raise ValueError(f"no adapter file at `{path}`")
    names = [p.relative_to(path).as_posix() for p in files(path, "*") + files(path / BEST, "*")]
    found = meant(names, lambda name: is_adapter(path / name))
    if not found:
        raise ValueError(
            f"no adapter at `{path}`: no {_patterns_in_words(names)}, and no LoRA under another"
            " name. Give such a file, or the folder of a run"
        )
    return path / only((path / found[0]).parent, found)


def _file_of(repository: Repository) -> Path:
    """Of a repository of the hub, in the cache."""
    id, inside = repository.id, repository.where.inside()
    names = repository.files()
    if inside in names:
        if not inside.endswith(".safetensors"):
            raise ValueError(
                f"`{inside}` of `{id}` is no .safetensors file: others are not downloaded, a"
                f" pickle may run code when it is read. {_tensors_in_words(names)}"
            )
        chosen = inside
    else:
        root = f"{inside}/" if inside else ""
        below = [name.removeprefix(root) for name in names if name.startswith(root)]
        found = meant(below)
        if not found:
            missing = f"no `{inside}`" if inside and not below else "no adapter"
            at = f", `{inside}`" if inside and below else ""
            raise ValueError(f"{missing} in `{id}`{at}. {_tensors_in_words(names)}")
        if len(found) > 1:
            raise ValueError(
                f"`{id}` holds several adapters: give one of"
                f" {', '.join(f'`{root}{name}`' for name in found)} as `weight_name`, or as"
                f" `hf://{id}/{root}{found[0]}`"
            )
        chosen = root + found[0]
    above = [f"{folder}{CONFIG}" for folder in parents(chosen, 3)]
    beside = [f"{parents(chosen, 1)[0]}{name}" for name in SETTINGS]
    wanted = [chosen, *(name for name in (*above, *beside) if name in names)]
    return repository.fetch(wanted) / chosen


def meant(names: Collection[str], reads: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Of the files of a folder those that it means, by their names in it: one where all is well.
    reads: whether some format reads a file of any name.
    """
    places = [""] if STATE in names else [f"{BEST}/", ""]
    patterns = [f.file_name.format(name="*") for f in formats().values() if f.file_name]
    for place in places:
        for pattern in patterns:
            if found := _in_folder(names, place, pattern):
                return found
    for place in places:
        if found := [n for n in _in_folder(names, place, "*.safetensors") if reads(n)]:
            return found
    return []


def _in_folder(names: Collection[str], place: str, pattern: str) -> list[str]:
    """Without hidden ones, which file managers and archives lay beside."""
    own = sorted(n for n in names if n.startswith(place) and "/" not in n[len(place) :])
    return [n for n in own if fnmatchcase(n[len(place) :], pattern) and n[len(place)] != "."]


def _patterns_in_words(names: Collection[str]) -> str:
    patterns = [f.file_name.format(name="*") for f in formats().values() if f.file_name]
    also = "" if STATE in names else " or in its best/"
    return f"{' or '.join(f'`{p}`' for p in patterns)} in it{also}"


def _tensors_in_words(names: Collection[str]) -> str:
    tensors = sorted(name for name in names if name.endswith(".safetensors"))
    if not tensors:
        return "It holds no .safetensors file"
    more = f" and {len(tensors) - 20} more" if len(tensors) > 20 else ""
    return f"Its .safetensors files are {', '.join(f'`{n}`' for n in tensors[:20])}{more}"


def files(place: Path, pattern: str) -> list[Path]:
    """Of a folder, by name."""
    return [p for p in sorted(place.glob(pattern)) if p.is_file()]


def only(place: Path, found: Sequence[str]) -> str:
    """Raises ValueError where there are several."""
    if len(found) > 1:
        names = ", ".join(name.rpartition("/")[2] for name in found)
        raise ValueError(f"`{place}` holds several adapters: give one of {names}")
    return found[0]


def run_of(file: Path) -> Path | None:
    """The folder of the run that a file lies in, or a link to it, as the hub's cache has them."""
    places = (file.resolve(), file.parent.resolve() / file.name)
    folders = [folder for place in places for folder in list(place.parents)[:3]]
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def run_settings(file: Path) -> dict[str, Any]:
    """config.yaml of the run that a file lies in, its fields checked, or {}."""
    folder = run_of(file)
    return read_run(folder / CONFIG) if folder else {}


def name_of(file: Path) -> str:
    """What tells an adapter from others in one folder: its run's name, and the step of a
    checkpoint; outside a run the file's own name, or its repository's where all files of its format
    are called so.
    """
    folder, own = run_of(file), name_of_folder(file.parent.absolute())
    if folder is not None:
        inner = [p for p in (file.resolve().parent.name, own) if p.startswith("checkpoint-")]
        return "-".join([name_of_folder(folder), *inner[:1]])
    if file.name not in [f.file_name for f in formats().values()]:
        return file.stem
    return "adapter" if own == file.parent.absolute().name else own


def base_of_run(file: Path) -> str:
    """The base of the run that a file lies in; outside a run the package's, if the file says that
    it is of that. Raises ValueError for another, with what the file says: that may be anyone's, and
    nothing is downloaded for it unasked.
    """
    base = run_settings(file).get("pretrained_model_name_or_path")
    if base is not None:
        return str(base)
    said = stated_base(file)
    if said == EMBEDDED:
        return EMBEDDED
    hint = f" (the file says `{said}`)" if said else ""
    raise ValueError(
        f"`{file}` does not lie in the folder of a run: name its base{hint} with "
        "--pretrained_model_name_or_path."
    )


def stated_base(file: Path) -> str:
    """What the header of a file of ours says of its base; "" where it says nothing."""
    try:
        metadata = read_keys(file).about.get("metadata")
    except UnreadableFile:
        return ""
    base = metadata.get("base") if isinstance(metadata, dict) else None
    return base if isinstance(base, str) else ""
