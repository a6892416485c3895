"""The parts of a running dev server, and how they are put together and taken apart."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from comfy_executors.devserver.catalogue import Catalogue
from comfy_executors.devserver.engine import Engine
from comfy_executors.devserver.execution import Setting
from comfy_executors.devserver.faults import Faults
from comfy_executors.devserver.files import Folders
from comfy_executors.devserver.hub import FEATURES, Hub
from comfy_executors.devserver.listener import Listener
from comfy_executors.devserver.middleware import Gate, drop_type_of_nothing
from comfy_executors.devserver.painting import paint
from comfy_executors.devserver.png import png
from comfy_executors.devserver.records import Journal
from comfy_executors.devserver.routes import Routes
from comfy_executors.devserver.versions import Behaviour

_CLOSING_SECONDS = 5.0


@dataclass(frozen=True)
class Options:
    """What a dev server was set up with; see `DevServer`."""

    behaviour: Behaviour
    host: str
    port: int
    prefix: str
    headers: Mapping[str, str]
    ssl_context: ssl.SSLContext | None
    checkpoints: tuple[str, ...]
    step_seconds: float
    directory: Path | None


class Machine:
    """A server from its start to its stop; it accepts connections once constructed.

    Args:
        options: What it was set up with.
        journal: Where it is kept what happened.
        faults: The faults that are switched on.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, options: Options, journal: Journal, faults: Faults) -> None:
        self._journal = journal
        if options.directory is not None:
            # A directory that cannot be used is an error before the port is taken.
            Folders(options.directory)
        self._listener = Listener(options.host, options.port, options.ssl_context)
        self.port = self._listener.port
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        directory = options.directory
        if directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="comfy-devserver-")
            directory = Path(self._temporary.name)
        self.folders = Folders(directory)
        self._add_example()
        self._hub = Hub(self._listener.loop, faults, journal, options.behaviour)
        catalogue = Catalogue(options.checkpoints, self.folders)
        self._setting = Setting(
            options.behaviour,
            catalogue,
            self.folders,
            faults,
            journal,
            self._hub,
            options.step_seconds,
        )
        self._engine = Engine(self._setting)
        self._routes = Routes(self._setting, lambda: self._engine)
        self._gate = Gate(options.prefix, options.headers, faults, journal)
        self._listener.start(self._application(options.prefix))
        self._listener.open()

    def _application(self, prefix: str) -> web.Application:
        app = web.Application(
            middlewares=[self._gate.handle], client_max_size=FEATURES["max_upload_size"]
        )
        app.on_response_prepare.append(drop_type_of_nothing)
        app.add_routes(
            web.RouteDef(route.method, prefix + route.path, route.handler, {})
            for route in self._routes.table()
        )
        return app

    def _add_example(self) -> None:
        # The real server comes with this file, so that LoadImage has something to offer.
        example = self.folders.path("input") / "example.png"
        if not example.exists():
            example.write_bytes(png(paint(0, 0, "example", 256, 256)))

    def refuse_connections(self, refuse: bool) -> None:
        """Refuse new connections and close the idle ones, or accept them again."""
        if refuse:
            self._listener.shut()
            self._listener.close_idle_connections(self._gate.is_idle)
        else:
            self._listener.open()

    def drop_websockets(self) -> int:
        """Reset the websockets and return how many there were."""
        return self._listener.call(self._hub.drop())

    def crash(self) -> None:
        """Refuse connections, reset the open ones, and lose what is in memory."""
        self._listener.shut()
        self._gate.restart()
        self._listener.reset_connections()
        self._wait_for_websockets()
        self._engine.close()
        self._routes.restart()

    def boot(self) -> None:
        """Begin with nothing in memory, and accept connections."""
        self._engine = Engine(self._setting)
        self._listener.open()

    def renew(self) -> None:
        """Lose what is in memory, the websockets, and the files of a temporary directory."""
        self.drop_websockets()
        self._wait_for_websockets()
        self._gate.restart()
        self._engine.close()
        self._routes.restart()
        if self._temporary is not None:
            self.folders.empty()
            self._add_example()
        self._engine = Engine(self._setting)

    def _wait_for_websockets(self) -> None:
        # Their handlers end a moment after their connections.
        self._journal.wait_for(lambda: self._journal.open_websockets == 0, _CLOSING_SECONDS)

    def close(self) -> None:
        """Stop it all."""
        # As a process that ends: nobody hears that the prompt which runs is interrupted by it.
        self._listener.shut()
        self._listener.reset_connections()
        self._wait_for_websockets()
        self._engine.close()
        self._listener.close()
        if self._temporary is not None:
            self._temporary.cleanup()
