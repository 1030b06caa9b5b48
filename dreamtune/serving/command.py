"""`dreamtune serve` on the command line: its flags, and the server's life."""

from __future__ import annotations

import importlib
import signal
import socket
import threading
import typing
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING
from types import FrameType
from typing import TYPE_CHECKING, Any

from dreamtune.fields import choices, parts
from dreamtune.flags import HelpFormatter, Parser
from dreamtune.serving.settings import FIELDS, HINTS, Settings

if TYPE_CHECKING:
    from dreamtune.serving.backend import Backend

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")  # of the extra `serve`
BACKLOG = 2048  # connections that wait to be accepted


def command(argv: Sequence[str], description: str) -> None:
    """The command line; returns when the server was shut down."""
    given = vars(parser(description).parse_args(argv))
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    check_packages()
    if settings.replicas:
        check_packages(("ray", "ray.serve"), "serve,ray")
    serve(settings)


def parser(description: str) -> Parser:
    found = Parser(
        prog="dreamtune serve",
        description=f"{description[0].upper()}{description[1:]}.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    for name, field in FIELDS.items():
        hint, facts = HINTS[name], field.metadata
        default = field.default if field.default is not MISSING else None
        text = str(facts["help"]).replace("%", "%%")
        if name == "adapters":
            found.add_argument(f"--{name}", required=True, metavar="DIR", help=text)
            continue
        stated = facts["shown"] or default
        words = choices(hint)
        more: dict[str, Any] = {"metavar": "{" + ",".join(words) + "}" if words else "X"}
        if any(typing.get_origin(part) is list for part in parts(hint)):
            more["nargs"] = "+"
        found.add_argument(f"--{name}", help=f"{text} [default: {stated}]", **more)
    return found


def check_packages(names: Sequence[str] = PACKAGES, extra: str = "serve") -> None:
    """Raises ValueError where the extra is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the server needs `{error.name}`, which is not installed: "
                f"pip install 'dreamtune[{extra}]'"
            ) from None


def serve(settings: Settings) -> None:
    """Until a signal ends it, and the requests that were accepted are answered. Raises ValueError,
    before anything is loaded, for an address that cannot be had and for a key that is none.
    """
    import uvicorn

    from dreamtune.serving.app import make_app
    from dreamtune.serving.schema import usual_guidance
    from dreamtune.serving.training import trained
    from dreamtune.training.output import say

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if jobs:
                jobs.stopping.set()  # open streams of events, which it waits for, end
            super().handle_exit(sig, frame)

    key = settings.api_key()
    with (
        unwinding(),
        bound(settings) as listener,
        opened(settings) as engine,
        trained(settings, engine) as jobs,
    ):
        app = make_app(settings, engine, jobs)
        engine.warm_up(usual_guidance(settings, engine))
        host, port = listener.getsockname()[:2]
        count = len(engine.adapters)
        say(f"{count} adapter{'s' * (count != 1)} of {engine.base.id} on {engine.device}")
        if not settings.at_home and key is None:
            say("Warning: whoever reaches this address may ask: there is no API key")
        listener.listen(BACKLOG)  # whoever reads the next line may connect
        say(f"Serving on http://{f'[{host}]' if ':' in host else host}:{port}")
        # no websockets: the guard looks at HTTP alone
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", ws="none"
        )
        Server(config).run(sockets=[listener])


def opened(settings: Settings) -> AbstractContextManager[Backend]:
    """What draws, until the block ends."""
    if settings.replicas:
        from dreamtune.serving.replicas import Replicas

        return Replicas.opened(settings)
    from dreamtune.serving.engine import Engine

    return Engine.opened(settings)


@contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM, which uvicorn raises again once it has shut down, ends what is open in its order."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def bound(settings: Settings) -> socket.socket:
    """A socket on the address, which does not listen yet. Raises ValueError where there is none."""
    place = f"{settings.host}, port {settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"`host`: there is no address {place}: {error.strerror}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ValueError(
            f"the address {place} cannot be had: {error.strerror}. Give another --port (0: a free "
            "one), or end what has it"
        ) from None
    return found
