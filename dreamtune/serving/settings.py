"""What a server is started with. Nothing heavy is imported: wrong flags answer at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import Field

from dreamtune.config import EMBEDDED, Prediction
from dreamtune.fields import Above0, AtLeast0, Count, Pixels, checker, opt, validated
from dreamtune.textfile import read_text

API_KEY = "DREAMTUNE_API_KEY"
SHORTEST_KEY = 8  # characters; a shorter one is guessed, or a file that was meant to hold one
NO_JOBS = "none"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Port = Annotated[int, Field(ge=0, le=65535)]
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


@dataclass(frozen=True)
class Settings:
    """Of a server. `None` means the default that `--help` states. Raises ValueError for a value out
    of its range.
    """

    adapters: str = opt(
        "", "folder of adapters: files, runs and folders, each served by its name", ""
    )
    jobs: str | None = opt(
        None,
        f"folder of training jobs, made where there is none; '{NO_JOBS}': no training",
        "",
        "beside the adapters' folder, by its name with -jobs",
    )
    base: str = opt(EMBEDDED, "base: a folder, single .safetensors file, hub id, or 'embedded'", "")
    revision: str | None = opt(None, "revision of a hub id", "", "the main branch")
    variant: str | None = opt(None, "weight variant, for instance fp16", "", "none")
    prediction_type: Prediction | None = opt(
        None, "what the base predicts, where its files do not say", "", "the base's own"
    )
    host: str = opt("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's", "")
    port: Port = opt(8000, "port; 0: a free one", "")
    api_key_file: str | None = opt(
        None,
        "file whose one line every request must bring as its key",
        "",
        f"${API_KEY}, else no key",
    )
    wait_ms: AtLeast0 = opt(50.0, "longest that a request waits for others to be drawn with", "")
    max_batch: Count | None = opt(
        None, "most pictures drawn at once", "", "16 on a GPU, 4 on the CPU"
    )
    max_queue: Count = opt(256, "requests that may wait; one more is told to come later", "")
    timeout_s: Above0 = opt(120.0, "seconds after which a request is given up", "")
    replicas: Count | None = opt(
        None,
        "processes that draw, each with the base on a GPU of its own, by Ray",
        "",
        "this process draws",
    )
    ray_address: str | None = opt(
        None,
        "cluster of the replicas, such as auto; they find base and adapters at the same paths",
        "",
        "one of this machine, started for them",
    )
    num_inference_steps: Count = opt(25, "sampling steps of a request that does not say", "")
    max_steps: Count = opt(100, "most sampling steps that a request may ask for", "")
    guidance_scale: Guidance | None = opt(
        None, "guidance of a request that does not say", "", "4 up to 256 px, else 7.5"
    )
    resolution: list[Pixels] = opt(
        [], "sides of pictures that may be asked for, the usual one first", "", "the base's own"
    )
    max_prompt: Count = opt(1000, "most characters of a prompt", "")
    max_body_kb: Count = opt(64, "most kilobytes of a request's body", "")

    def __post_init__(self) -> None:
        found = validated(_RULES, {f.name: getattr(self, f.name) for f in fields(self)})
        for name, value in found.items():
            object.__setattr__(self, name, value)
        if not self.adapters:
            raise ValueError("`adapters` is missing: name the folder of the adapters.")
        if self.num_inference_steps > self.max_steps:
            raise ValueError(
                f"`num_inference_steps` is {self.num_inference_steps}, more than `max_steps`, "
                f"{self.max_steps}: lower the one or raise the other."
            )
        if self.ray_address is not None and self.replicas is None:
            raise ValueError(
                "`ray_address` is of replicas, and there are none: say how many with --replicas."
            )

    @property
    def at_home(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK

    @property
    def jobs_folder(self) -> Path | None:
        """None where nothing is trained."""
        if self.jobs == NO_JOBS:
            return None
        if self.jobs is not None:
            return Path(self.jobs).expanduser()
        adapters = Path(self.adapters).expanduser().absolute()
        return adapters.with_name(f"{adapters.name}-jobs")

    def api_key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """The key: of the file, else of the environment; never a flag's value, which every user of
        the machine could read. None where there is none. Raises ValueError for one that is short.
        """
        place, key = f"${API_KEY}", environment.get(API_KEY)
        if self.api_key_file is not None:
            place = f"`{self.api_key_file}`"
            key = read_text(Path(self.api_key_file).expanduser()).strip()
        if key is None:
            return None
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"the API key in {place} must be one word of at least {SHORTEST_KEY} printable "
                f"ASCII characters, got {len(key)}: `openssl rand -hex 32` makes one."
            )
        return key


HINTS: dict[str, Any] = get_type_hints(Settings, include_extras=True)
FIELDS = {f.name: f for f in fields(Settings)}
_RULES = checker(HINTS)
