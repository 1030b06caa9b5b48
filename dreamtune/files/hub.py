"""A repository of the Hugging Face hub that holds adapters: its files, by `huggingface_hub`, in its
cache and by its environment (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from dreamtune.models.folder import hub_answers, hub_errors, looks_like_a_path

URI = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
EXAMPLE = "`user/repo`, or `hf://user/repo@revision/folder/file.safetensors`"


class Where(NamedTuple):
    """Where in a repository or folder, as `load_lora_weights` of diffusers calls it.

    weight_name: the file. subfolder: that it is in. revision: a branch, tag or commit. token: for a
    private or gated repository; by default the one of `hf auth login` or HF_TOKEN. cache_dir:
    instead of the hub's cache. local_files_only: take what is in the cache, and ask nobody.
    """

    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def check_here(self, path: Path) -> None:
        """Raises ValueError for what has no meaning of a path on this machine."""
        for name in ("revision", "token", "cache_dir"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` is for the hub, and `{path}` is on this machine: leave it out, or"
                    f" give an id such as {EXAMPLE}"
                )

    def inside(self) -> str:
        """The place asked for, "" where nothing is. Raises ValueError for one that is outside."""
        found = "/".join(x.strip("/") for x in (self.subfolder, self.weight_name) if x)
        if not is_inside(found):
            raise ValueError(
                "`weight_name` and `subfolder` must name a place inside the repository or folder,"
                f" got `{found}`"
            )
        return found


def is_inside(name: str) -> bool:
    """Whether a relative name stays below the folder that it is joined to."""
    parts = name.split("/") if name else []
    return not any(p in ("", ".", "..") or "\\" in p or not p.isprintable() for p in parts)


@dataclass(frozen=True)
class Repository:
    """Attributes: id: "user/repo". where: `weight_name` and `subfolder` are for the caller."""

    id: str
    where: Where

    @classmethod
    def named(cls, name: str, where: Where) -> Repository | None:
        """Of an id or a hf:// address; None for what looks like a path, and where the id's first
        part is a folder here, which it is then a path in. Raises ValueError for an address that is
        malformed, or says otherwise than `where`.
        """
        from huggingface_hub.utils import validate_repo_id

        found = URI.fullmatch(name)
        if name.startswith("hf://") and found is None:
            raise ValueError(f"`{name}` is no address on the hub: such is {EXAMPLE}")
        if found is None and (looks_like_a_path(name) or Path(name.split("/")[0]).is_dir()):
            return None
        id, revision, file = (name, None, None) if found is None else found.groups()
        try:
            validate_repo_id(id)
        except ValueError:
            if found is None:
                return None
            raise ValueError(f"`{id}` is no id on the hub: such is {EXAMPLE}") from None
        if revision is not None:
            if where.revision not in (None, unquote(revision)):
                raise ValueError(f"`revision` is {where.revision!r}, and `{name}` has another")
            where = where._replace(revision=unquote(revision))
        if where.revision is not None and not is_inside(where.revision or "/"):
            raise ValueError(
                f"`revision` must be a branch, tag or commit of `{id}`, got {where.revision!r}"
            )
        if file := (file or "").strip("/"):
            if where.subfolder or where.weight_name:
                raise ValueError(
                    f"`{name}` names a place inside, and so do `subfolder` or `weight_name`: give"
                    " it once"
                )
            where = where._replace(subfolder=unquote(file))
        return cls(id, where)

    def files(self) -> list[str]:
        """The names of all its files; of those in the cache where nobody is to be asked, or nobody
        answers. Raises ValueError.
        """
        from huggingface_hub import list_repo_files

        w = self.where
        if self.offline:
            return self._cached()
        try:
            with explained(self):
                names = list_repo_files(self.id, revision=w.revision, token=w.token)
        except Unanswered:
            with suppress(ValueError):
                return self._cached()
            raise
        if outside := [name for name in names if not is_inside(name)]:
            raise ValueError(
                f"`{self.id}` lists a file `{outside[0]}`, which would lie outside its folder:"
                " nothing of it was downloaded"
            )
        return names

    def fetch(self, names: Collection[str]) -> Path:
        """The folder with these of its files, all of one revision. Raises ValueError."""
        folder = self._snapshot(names, self.offline)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"`{missing[0]}` of `{self.id}` could not be had: try again")
        return folder

    @property
    def offline(self) -> bool:
        """Whether the cache alone is read."""
        from huggingface_hub import constants

        return self.where.local_files_only or constants.HF_HUB_OFFLINE or not hub_answers()

    def _cached(self) -> list[str]:
        folder = self._snapshot((), alone=True)
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return [path.relative_to(folder).as_posix() for path in found]

    def _snapshot(self, names: Collection[str], alone: bool) -> Path:
        """The folder in the cache, with these files. alone: as the cache has it."""
        from huggingface_hub import snapshot_download

        w = self.where
        with explained(self):
            return Path(
                snapshot_download(
                    self.id,
                    revision=w.revision,
                    token=w.token,
                    cache_dir=w.cache_dir,
                    local_files_only=alone,
                    allow_patterns=[glob.escape(name) for name in names],
                )
            )


class Unanswered(ValueError):
    """The hub did not say, for a cause that has nothing to do with the repository."""


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """What the hub's client raises -> a ValueError that says what to do."""
    from huggingface_hub import errors

    id, revision = repository.id, repository.where.revision or "main"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(
            f"`{id}` is gated: accept its terms on its page, then `hf auth login`, or give `token`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"`{id}` is no file or folder here, and the hub shows no such model repository: check"
            " the name; for a private one `hf auth login`, or give `token`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"`{id}` has no revision `{revision}`: give a branch, a tag or a commit of it"
        ) from error
    except hub_errors() as error:
        missing = isinstance(error, errors.LocalEntryNotFoundError) and repository.offline
        reason = str(error).strip().split("\n")[0]
        raise Unanswered(
            f"`{id}` is no file or folder here, and revision `{revision}` of it is not in the hub's"
            f" cache, {_why_offline(repository)}: run once with network, name the cache that holds"
            f" it with HF_HOME, or `hf download {id} --local-dir FOLDER` elsewhere and give that"
            if missing
            else f"`{id}` is no file or folder here, and could not be had from the hub"
            f" ({type(error).__name__}: {reason}): try again, or `hf download {id} --local-dir"
            " FOLDER` and give that"
        ) from error


def _why_offline(repository: Repository) -> str:
    from huggingface_hub import constants

    if repository.where.local_files_only:
        return "which alone is read by `local_files_only`"
    if constants.HF_HUB_OFFLINE:
        return "which alone is read as HF_HUB_OFFLINE is set"
    return "and the hub cannot be reached"


def name_of_folder(folder: Path) -> str:
    """Its name; of a repository in the hub's cache, whose folder is called by a commit, the
    repository's without its owner.
    """
    above = folder.parent
    if above.name == "snapshots" and above.parent.name.startswith("models--"):
        return above.parent.name.rpartition("--")[2]
    return folder.name


def parents(name: str, most: int) -> list[str]:
    """Of a file's name in a repository, the folders that it is in, the nearest first; "" is the
    repository's own.
    """
    found = [p.as_posix() for p in PurePosixPath(name).parents][:most]
    return ["" if p == "." else f"{p}/" for p in found]
