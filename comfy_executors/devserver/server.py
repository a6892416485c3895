"""The dev server as its users see it."""

from __future__ import annotations

import inspect
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from comfy_executors.devserver.faults import Faults
from comfy_executors.devserver.machine import Machine, Options
from comfy_executors.devserver.records import Journal, PromptRecord, RequestRecord
from comfy_executors.devserver.versions import behaviour_of

_CHECKPOINTS = ("sd_xl_base_1.0.safetensors", "v1-5-pruned-emaonly.safetensors")


class DevServer:
    """A small ComfyUI-compatible server in threads of its own, for demos and tests.

    It needs neither a GPU nor models: its pictures are placeholders. ::

        with DevServer() as server:
            requests.post(f"{server.url}/prompt", json={"prompt": graph})

    Args:
        port: The TCP port; 0 takes a free one.
        host: The address to listen on.
        version: The ComfyUI version whose behaviour is imitated: 0.33.0, 0.8.0, 0.3.40 or
            0.0.8.
        path_prefix: What is in front of every path, such as `/comfy`.
        headers: Request headers without which the answer is 401, for HTTP and websockets.
        ssl_context: Serve https and wss with this.
        checkpoints: The names that `CheckpointLoaderSimple` offers.
        step_seconds: How long a step of a sampler node takes, in seconds.
        directory: Where the input, output and temp folders live; by default a temporary
            directory that goes when the server stops.

    Raises:
        ValueError: The version is unknown.
    """

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        *,
        version: str = "0.33.0",
        path_prefix: str = "",
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        checkpoints: Sequence[str] = _CHECKPOINTS,
        step_seconds: float = 0.0,
        directory: str | Path | None = None,
    ) -> None:
        prefix = path_prefix.strip("/")
        self._port = port
        self._host = host
        self._journal = Journal()
        self._lifecycle = threading.RLock()
        self._stopping = threading.Event()
        self._machine: Machine | None = None
        self.faults = Faults(self._refuse_connections)
        self._options = Options(
            behaviour=behaviour_of(version),
            host=host,
            port=port,
            prefix=f"/{prefix}" if prefix else "",
            headers=dict(headers or {}),
            ssl_context=ssl_context,
            checkpoints=tuple(checkpoints),
            step_seconds=step_seconds,
            directory=None if directory is None else Path(directory),
        )

    def start(self) -> DevServer:
        """Start the server and return it; it accepts connections then.

        Raises:
            OSError: The port is taken.
            RuntimeError: The server runs already.
        """
        with self._lifecycle:
            if self._machine is not None:
                raise RuntimeError(f"the dev server already runs at {self.url}")
            self._stopping.clear()
            self._machine = Machine(self._options, self._journal, self.faults)
            self._port = self._machine.port
            self._refuse_connections(self.faults.refuse_connections)
        return self

    def stop(self) -> None:
        """Stop the server; its threads have ended and its sockets are closed when this returns.

        Stopping a server that does not run has no effect. It can be started again.
        """
        self._stopping.set()
        with self._lifecycle:
            machine, self._machine = self._machine, None
            if machine is not None:
                machine.close()

    def __enter__(self) -> DevServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self._machine is not None else "stopped"
        return f"<DevServer {self.url} {state}>"

    @property
    def port(self) -> int:
        """The TCP port; 0 before the start of a server that takes a free one."""
        return self._port

    @property
    def address(self) -> str:
        """Host and port: `127.0.0.1:8188`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    @property
    def url(self) -> str:
        """Where the server is, with its prefix and without a slash at the end."""
        scheme = "http" if self._options.ssl_context is None else "https"
        return f"{scheme}://{self.address}{self._options.prefix}"

    @property
    def directory(self) -> Path:
        """Where the input, output and temp folders live.

        Raises:
            RuntimeError: The server does not run.
        """
        return self._require_machine().folders.root

    @property
    def prompts(self) -> list[PromptRecord]:
        """Every prompt that was accepted, in order, as it is now."""
        return self._journal.prompts

    @property
    def requests(self) -> list[RequestRecord]:
        """Every request that was answered or cut off on purpose, in order."""
        return self._journal.requests

    @property
    def node_runs(self) -> Counter[str]:
        """How often nodes of each class really ran, instead of coming from the cache."""
        return self._journal.node_runs

    @property
    def open_websockets(self) -> int:
        """How many websockets are open."""
        return self._journal.open_websockets

    def wait_for(self, predicate: Callable[[DevServer], bool], timeout: float = 10.0) -> None:
        """Wait until something holds; it is looked at whenever something happens.

        What happens: a prompt is accepted, starts or ends, a node starts, takes a step or ends, a
        websocket opens or closes, a request has been processed.

        Args:
            predicate: Called with the server.
            timeout: How long to wait at most, in seconds.

        Raises:
            TimeoutError: It did not come to hold in time.
        """
        if not self._journal.wait_for(lambda: predicate(self), timeout):
            raise TimeoutError(
                f"waited {timeout:g} s in vain for {_describe(predicate)}; {self._summary()}"
            )

    def drop_websockets(self) -> int:
        """Reset every open websocket now and return how many there were."""
        with self._lifecycle:
            return self._require_machine().drop_websockets()

    def restart(self, *, downtime: float = 0.0) -> None:
        """Restart on the same port, with amnesia, as a crash does.

        Queue, history and cache are gone, the prompt that ran is dead, and every connection was
        reset; the files stay. The records of the prompts survive: what had not ended is `lost`.

        Args:
            downtime: How long connections are refused in between, in seconds.

        Raises:
            RuntimeError: The server does not run.
        """
        with self._lifecycle:
            machine = self._require_machine()
            machine.crash()
            self._stopping.wait(downtime)
            machine.boot()
            self._refuse_connections(self.faults.refuse_connections)

    def reset(self) -> None:
        """Make the server as good as new: for the next test of a fixture that is shared.

        Faults are switched off; records, queue, history and cache are forgotten; websockets are
        closed; a temporary directory is emptied.

        Raises:
            RuntimeError: The server does not run.
        """
        with self._lifecycle:
            self.faults.clear()
            self._require_machine().renew()
            self._journal.clear()

    def _require_machine(self) -> Machine:
        if self._machine is None:
            raise RuntimeError("the dev server does not run: start it, or use it in a with block")
        return self._machine

    def _refuse_connections(self, refuse: bool) -> None:
        with self._lifecycle:
            if self._machine is not None:
                self._machine.refuse_connections(refuse)

    def _summary(self) -> str:
        statuses = Counter(record.status for record in self.prompts)
        prompts = ", ".join(f"{count} {status}" for status, count in statuses.items()) or "none"
        return f"prompts: {prompts}; open websockets: {self.open_websockets}"


def _describe(predicate: Callable[[DevServer], bool]) -> str:
    try:
        return " ".join(inspect.getsource(predicate).split())
    except (OSError, TypeError):
        return repr(predicate)
