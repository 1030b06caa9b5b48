"""Engines in processes of their own, by Ray Serve."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from dreamtune.serving.backend import Backend, Known, Row, Shape
from dreamtune.serving.folder import look
from dreamtune.serving.replica import Facts, Replica, Reply
from dreamtune.serving.resend import Lost, Pictures, drawn, no_picture
from dreamtune.serving.settings import NO_JOBS, Settings
from dreamtune.serving.training import writing
from dreamtune.training.output import say

HEALTH = 2.0  # seconds between looks at a replica
STORE = 256 << 20  # bytes a replica for what is on its way, here; pictures are small
DEPLOYMENT = "Replica"
LOST = (RayError, RayServeException)


@dataclass
class Named:
    id: str


class Replicas(Backend):
    """Batches go to whichever replica is free.

    Args:
        handle: of the deployment. app: its name in the cluster. timeout: seconds of a batch, after
            which nobody waits for it.
    """

    def __init__(
        self,
        handle: Any,
        app: str,
        count: int,
        timeout: float,
        tell: Callable[[str], None] = say,
    ) -> None:
        """Raises ValueError for what an engine cannot be opened with."""
        super().__init__(tell)
        self.handle, self.app, self.workers, self.timeout = handle, app, count, timeout
        facts: Facts = handle.facts.remote().result()
        if facts.refused is not None:
            raise ValueError(facts.refused)
        self.base, self.sizes, self.max_batch = Named(facts.base_id), facts.sizes, facts.max_batch
        self.empty_is_none = facts.empty_is_none
        self.takes_negatives = facts.takes_negatives
        self.scale, self.kind = facts.guidance_scale, facts.device
        self.adapters, self.left_out = dict(facts.adapters), dict(facts.left_out)
        self.paths = dict(facts.paths)
        self.memories: dict[tuple[str, int], dict[str, int]] = {}

    @classmethod
    @contextmanager
    def opened(cls, settings: Settings, tell: Callable[[str], None] = say) -> Iterator[Replicas]:
        """By the settings, on their cluster, else on one of this machine that ends with the block.
        Raises ValueError for a folder that is not there, here or where a replica is, for what an
        engine cannot be opened with and for a cluster that cannot be had.
        """
        settings = placed(settings)
        look(Path(settings.adapters))
        if jobs := settings.jobs_folder:
            with writing(jobs):
                jobs.mkdir(parents=True, exist_ok=True)  # before the replicas look for it
        count = settings.replicas or 1
        here = f"{platform.node()}-{settings.port or os.getpid()}"
        app = f"dreamtune-{here}"  # a server that is started again at its place replaces the last
        quiet = {"enable_access_log": False, "log_level": "WARNING"}
        with cluster(settings.ray_address, count) as options:
            tell(f"{count} replicas are started")
            deployment: Any = serve.deployment(
                Replica,
                name=DEPLOYMENT,
                num_replicas=count,
                max_ongoing_requests=1,
                health_check_period_s=HEALTH,
                graceful_shutdown_timeout_s=5,
                logging_config=quiet,  # a line a batch otherwise
                ray_actor_options=options,
            )
            serve.start(proxy_location="Disabled", logging_config=quiet)
            try:
                handle = serve.run(deployment.bind(settings), name=app, route_prefix=None)
                yield cls(handle, app, count, settings.timeout_s, tell)
            finally:
                serve.delete(app)

    @property
    def guidance_scale(self) -> float:
        return self.scale

    @property
    def device(self) -> str:
        return f"{self.workers} x {self.kind}"

    def warm_up(self, guidance_scale: float) -> None:
        """Each replica did, before it said that it was there."""

    def running(self) -> int:
        try:
            found = serve.status().applications[self.app].deployments[DEPLOYMENT]
        except (*LOST, KeyError, TimeoutError):  # of a cluster that is gone
            return 0
        return sum(n for state, n in found.replica_states.items() if state == "RUNNING")

    def memory(self) -> dict[str, int]:
        """Of all together, as each said with its last batch."""
        found = {"allocated": 0, "reserved": 0, "peak": 0}
        for one in list(self.memories.values()):
            found = {kind: found[kind] + one[kind] for kind in found}
        return found

    def add(self, name: str, path: str | Path) -> Known:
        """One replica looks at it now, the others with the first batch that has it."""
        if name in self.adapters:
            raise ValueError(f"there is an adapter `{name}` already")
        place = str(Path(path).expanduser().absolute())
        for last in (False, True):
            try:
                found: Known | Exception = self.handle.add.remote(name, place).result()
                break
            except LOST as error:
                if last:
                    raise OSError(f"no replica could look at it: {kind_of(error)}") from error
        if isinstance(found, Exception):
            raise found
        if found.warning:
            self.tell(f"Warning, `{name}`: {found.warning}")
        self.paths = {**self.paths, name: place}
        self.adapters = {**self.adapters, name: found}
        return found

    def draw(self, rows: Sequence[Row], shape: Shape) -> Pictures:
        """As an engine; what is sent to a replica that is lost is sent again."""
        names = {name for row in rows for name in row.names}
        paths = {name: self.paths[name] for name in names if name in self.paths}
        return drawn(rows, lambda part: self.send(part, shape, paths), lambda: self.on_resend())

    def send(self, rows: Sequence[Row], shape: Shape, paths: Mapping[str, str]) -> Pictures:
        """To whichever replica is free. Raises Lost."""
        response = self.handle.draw.remote(list(rows), shape, paths)
        try:
            reply: Reply = response.result(timeout_s=self.timeout)
        except TimeoutError:
            response.cancel()
            return [no_picture(f"no replica drew it in {self.timeout:g} seconds")] * len(rows)
        except LOST as error:
            self.memories.clear()  # also of the one that is no more
            raise Lost(kind_of(error)) from error
        self.memories[reply.process] = reply.memory
        return reply.drawn


def kind_of(error: BaseException) -> str:
    return type(error).__name__


def placed(settings: Settings) -> Settings:
    """With the places of files as processes in other folders find them; without the key's file,
    which is the routes' own.
    """
    base, jobs = Path(settings.base).expanduser(), settings.jobs_folder
    return replace(
        settings,
        adapters=str(Path(settings.adapters).expanduser().absolute()),
        jobs=NO_JOBS if jobs is None else str(jobs.absolute()),
        base=str(base.absolute()) if base.exists() else settings.base,
        api_key_file=None,
    )


@contextmanager
def cluster(address: str | None, count: int) -> Iterator[dict[str, Any]]:
    """What each replica takes of a cluster: a GPU where it has some. address: None for one of this
    machine, with as many processes as replicas, which ends with the block.

    Raises ValueError for a cluster that cannot be reached, or has GPUs for fewer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    if address is None:
        cores = max(1, (os.cpu_count() or 1) // count)  # torch's threads too
        options: dict[str, Any] = {
            "num_cpus": cores * count,
            "object_store_memory": STORE * count,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        cores, options = 1, {}
    try:
        ray.init(address=address or "local", logging_level=logging.WARNING, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`ray_address`: no Ray cluster could be had at {address or 'this machine'}: "
            f"{str(error).splitlines()[0]}. `ray start --head` starts one; one that asks for a "
            "token needs RAY_AUTH_MODE=token in the environment; without --ray_address the "
            "replicas are on this machine."
        ) from error
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if 0 < gpus < count:
            raise ValueError(f"`replicas`: {count} need a GPU each, and the cluster has {gpus}.")
        yield {"num_cpus": cores, "num_gpus": 1 if gpus else 0}
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()
