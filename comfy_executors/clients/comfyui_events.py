"""The websocket of a ComfyUI server: one reader thread, events handed to whoever waits for them.

A connection that reconnects under its old client id can go deaf without an error, so each has a
fresh one, and prompts that were posted under a lost id are told so (`ConnectionLost`) and look the
server's queue and history up instead.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import random
import socket
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import websocket
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from comfy_executors.clients.comfyui_frames import (
    ConnectionLost,
    Event,
    EventParser,
    ImageEvent,
    PromptEvent,
)
from comfy_executors.clients.http import CONNECT_SECONDS, HttpClient

logger = logging.getLogger(__name__)

_TICK_SECONDS = 5.0
_READ_BYTES = 65536
_WAKE_SECONDS = 0.1
_EARLY_EVENTS, _EARLY_IMAGES = 1000, 16  # images can be large
_PING_SECONDS = 20.0  # proxies cut websockets that are idle for 60 to 100 s
_IDLE_SECONDS = 30.0  # without prompts the connection is given back
_LONGEST_BACKOFF = 10.0
_DEAF_SECONDS = 60.0  # a connection that stays deaf is made anew, but not more often than this
_FEATURES = json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})

Sink = Callable[[Event], None]


def _load_again(name: str) -> Any:
    """Load a module once more, beside the one that everybody imports."""
    spec: Any = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _NoCookies:
    def add(self, set_cookie: str | None) -> None:
        pass

    def get(self, host: str) -> str:
        return ""


# websocket-client has one jar for all connections of a process, and goes by the domain that a
# server names: one user's session would go out with another's handshake. Ours send the cookies of
# their HttpClient instead, and others' stay as they are.
_handshake, _core = _load_again("websocket._handshake"), _load_again("websocket._core")
_handshake.CookieJar = _NoCookies()
_core.handshake = _handshake.handshake


class _BufferedWebSocket(_core.WebSocket):  # type: ignore[misc, name-defined]
    """Reads what has arrived at once, instead of each frame in three pieces.

    A prompt has twenty frames or more, and with each read the other threads take the
    interpreter's lock.
    """

    _arrived = b""
    _position = 0

    def _recv(self, bufsize: int) -> bytes:
        if self._position == len(self._arrived):
            self._arrived = super()._recv(_READ_BYTES)
            self._position = 0
        start, self._position = self._position, self._position + bufsize
        data = self._arrived[start : self._position]
        self._position = start + len(data)
        return data


class EventStream:
    """The websocket to one server, kept open while somebody is subscribed.

    Args:
        http: The client whose address, headers, auth and certificates are used.
    """

    _changed: threading.Condition
    _subscriptions: dict[str, _Subscription]

    def __init__(self, http: HttpClient) -> None:
        self._http = http
        self.reset()

    def reset(self) -> None:
        """Forget the connection without a goodbye; a forked child leaves it to its parent."""
        self._changed = threading.Condition()
        self._subscriptions = {}
        self._unused_since = time.monotonic()
        # Events that come before their prompt's id is known: old servers choose it themselves.
        self._early: deque[PromptEvent | ImageEvent] = deque(maxlen=_EARLY_EVENTS)
        self._socket: websocket.WebSocket | None = None
        self._client_id: str | None = None
        # Whether the present connection has brought an event about a prompt.
        self._heard = False
        # Since when connections are known to bring none; None again once one does.
        self._deaf_since: float | None = None
        # Of the present connection, or of the first attempt to make one since the last was lost.
        self._attempt: Future[str | None] = Future()
        self._wanted = False
        self._running = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def connect(self) -> Future[str | None]:
        """Make a connection if there is none.

        Returns:
            The id to post prompts under, as soon as it is known; None when no connection can be
            had now.
        """
        with self._changed:
            self._unused_since = time.monotonic()
            if self._client_id is None:
                self._wanted = True
            if not self._running:
                self._attempt = Future()
                if self._closed:
                    self._attempt.set_result(None)
                else:
                    self._start_thread()
            return self._attempt

    def _start_thread(self) -> None:
        # A daemon, because it may be blocked in a read when the interpreter ends; close() wakes
        # and joins it.
        self._thread = threading.Thread(
            target=self._run, name="comfy-executors-websocket", daemon=True
        )
        self._thread.start()
        self._running = True

    def is_live(self, client_id: str) -> bool:
        """Tell whether the connection with this id is one to rely on.

        It is once it has brought an event about one of our prompts: proxies let connections be
        made whose messages they keep to themselves.
        """
        with self._changed:
            return client_id == self._client_id and self._heard

    def is_promising(self, client_id: str) -> bool:
        """Tell whether the connection with this id is open, and none before it was found deaf."""
        with self._changed:
            return client_id == self._client_id and self._deaf_since is None

    def subscribe(
        self, prompt_id: str, client_id: str, sink: Sink, image_nodes: frozenset[str]
    ) -> None:
        """Have a prompt's events handed to a sink.

        Args:
            prompt_id: The prompt.
            client_id: The id it is posted under. When that connection is lost, also already now,
                the sink is told so.
            sink: Called on the reader's thread; must not block.
            image_nodes: The nodes whose images are wanted; others are previews.
        """
        lost = False
        while True:
            with self._changed:
                early = [event for event in self._early if event.prompt_id == prompt_id]
                self._early = deque(
                    (event for event in self._early if event.prompt_id != prompt_id), _EARLY_EVENTS
                )
                if not early:
                    # Only now: what the reader hands out must not overtake what came before.
                    self._subscriptions[prompt_id] = _Subscription(client_id, sink, image_nodes)
                    lost = client_id != self._client_id
                    break
                self._note_heard(client_id)
            for event in early:
                if _is_wanted(event, image_nodes):
                    sink(event)
        if lost:
            sink(ConnectionLost(client_id))

    def unsubscribe(self, prompt_id: str) -> None:
        """Stop handing out a prompt's events."""
        with self._changed:
            self._subscriptions.pop(prompt_id, None)
            self._unused_since = time.monotonic()

    def drop(self, client_id: str) -> None:
        """Give up a connection that is deaf, so that a fresh one is made; say so once an outage."""
        now = time.monotonic()
        with self._changed:
            if client_id != self._client_id:
                return
            self._heard = False
            told = self._deaf_since is not None
            if self._deaf_since is None or now - self._deaf_since >= _DEAF_SECONDS:
                self._deaf_since = now
                _wake_reader(self._socket)
        if not told:
            logger.warning(
                "the websocket to %s is open, but brings no word of our prompts: polling instead",
                self._http.base_url,
            )

    def close(self) -> None:
        """Close the connection and end the thread."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is None or thread is threading.current_thread():
            return
        while thread.is_alive():
            with self._changed:
                _wake_reader(self._socket)
            # Again and again: one that is just being connected has no socket yet to wake it by.
            thread.join(_WAKE_SECONDS)

    # On the reader's thread.

    def _run(self) -> None:
        try:
            failures = 0
            while not self._may_end():
                failures = 0 if self._serve(failures) else failures + 1
                if failures:
                    longest = min(_LONGEST_BACKOFF, 0.25 * 2**failures)
                    self._pause(random.uniform(0.5, 1) * longest)
        finally:
            self._end_thread()

    def _may_end(self) -> bool:
        with self._changed:
            if self._closed or not (self._subscriptions or self._wanted):
                self._running = False
                return True
            return False

    def _end_thread(self) -> None:
        with self._changed:
            if self._thread is not threading.current_thread():
                return  # there is a new one already
            self._running = False
            attempt = self._attempt
        if not attempt.done():
            attempt.set_result(None)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _serve(self, failures: int) -> bool:
        """Connect and read until the connection ends; tell whether there was one."""
        client_id = uuid.uuid4().hex
        connection = _BufferedWebSocket(
            sslopt=_tls_options(self._http.verify),
            # In pure Python it costs more than all the rest; JSON checks the encoding anyway.
            skip_utf8_validation=True,
        )
        connected = False
        try:
            connected = self._connect(connection, client_id, failures)
            if connected:
                self._read(connection)
        except (websocket.WebSocketException, OSError) as error:
            if not self._closed:
                logger.info("the websocket to %s was lost: %s", self._http.base_url, error)
        finally:
            _hang_up(connection)
            if connected:
                self._tell_lost(client_id)
        return connected

    def _connect(self, connection: websocket.WebSocket, client_id: str, failures: int) -> bool:
        with self._changed:
            self._socket = connection  # so that close() can wake it
        try:
            self._open(connection, client_id)
            connected = True
        except Exception as error:
            # Of any kind: it comes of what a server sends, and of what an auth does. Its own text
            # can hold headers of the answer.
            reason = getattr(error, "status_code", None) or type(error).__name__
            if failures == 0 and not self._closed:
                logger.warning(
                    "no websocket to %s (%s): polling instead", self._http.base_url, reason
                )
            connected = False
        with self._changed:
            connected = connected and not self._closed
            self._client_id = client_id if connected else None
            self._heard = False
            self._wanted = False
            if connected and self._attempt.done():
                self._attempt = Future()  # the one before said that there is no connection
            attempt = self._attempt
        if not attempt.done():
            attempt.set_result(client_id if connected else None)
        return connected

    def _open(self, connection: websocket.WebSocket, client_id: str) -> None:
        base = "ws" + self._http.base_url[len("http") :]
        connection.connect(  # type: ignore[no-untyped-call]
            f"{base}/ws?clientId={client_id}",
            timeout=CONNECT_SECONDS,
            header=self._http.sent_headers(),
            suppress_origin=True,
            redirect_limit=0,  # the headers are for this server only
        )
        if connection.getstatus() != 101:
            raise websocket.WebSocketException("no upgrade")
        connection.send(_FEATURES)

    def _read(self, connection: websocket.WebSocket) -> None:
        parser = EventParser()
        connection.settimeout(_TICK_SECONDS)
        heard = checked = time.monotonic()
        while True:
            try:
                opcode, frame = connection.recv_data(control_frame=True)
            except websocket.WebSocketTimeoutException:
                opcode, frame = None, b""
            now = time.monotonic()
            if now - checked >= _TICK_SECONDS:
                # Also while others' prompts keep the socket busy with `status` messages.
                checked = now
                if self._give_back():
                    return
            if opcode is None:
                if now - heard >= 2 * _PING_SECONDS:
                    return
                if now - heard >= _PING_SECONDS:
                    connection.ping()
                continue
            heard = now
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                return
            if opcode == websocket.ABNF.OPCODE_TEXT:
                self._dispatch(parser.text(frame))
            elif opcode == websocket.ABNF.OPCODE_BINARY:
                self._dispatch(parser.binary(frame))

    def _give_back(self) -> bool:
        """Tell whether the connection is of no more use; then nobody is given its id."""
        with self._changed:
            unused = time.monotonic() - self._unused_since
            if self._closed or (not self._subscriptions and unused >= _IDLE_SECONDS):
                self._client_id = None
                self._attempt = Future()
                return True
            return False

    def _dispatch(self, event: PromptEvent | ImageEvent | None) -> None:
        if event is None:
            return
        with self._changed:
            subscription = self._subscriptions.get(event.prompt_id)
            if subscription is None:
                self._keep_early(event)
                return
            self._note_heard(subscription.client_id)
        if _is_wanted(event, subscription.image_nodes):
            subscription.sink(event)

    def _note_heard(self, client_id: str) -> None:
        """Take down that an event about a prompt has come; the lock is held."""
        if client_id == self._client_id:
            self._heard, self._deaf_since = True, None

    def _keep_early(self, event: PromptEvent | ImageEvent) -> None:
        if isinstance(event, ImageEvent):
            images = [early for early in self._early if isinstance(early, ImageEvent)]
            if len(images) >= _EARLY_IMAGES:
                self._early.remove(images[0])
        self._early.append(event)

    def _tell_lost(self, client_id: str) -> None:
        with self._changed:
            if self._attempt.done():
                self._attempt = Future()  # whoever asks from here on waits for the next one
            self._socket = self._client_id = None
            self._early.clear()
            sinks = [s.sink for s in self._subscriptions.values() if s.client_id == client_id]
        for sink in sinks:
            sink(ConnectionLost(client_id))


def _is_wanted(event: PromptEvent | ImageEvent, image_nodes: frozenset[str]) -> bool:
    return isinstance(event, PromptEvent) or event.node_id in image_nodes


class _Subscription(NamedTuple):
    client_id: str
    sink: Sink
    image_nodes: frozenset[str]


def _wake_reader(connection: websocket.WebSocket | None) -> None:
    # close() does not wake a reader that is blocked in a read, and abort() only one that is
    # connected; past TLS, whose state belongs to the reader.
    raw = connection.sock if connection is not None else None
    if raw is not None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(raw, socket.SHUT_RDWR)


def _hang_up(connection: websocket.WebSocket) -> None:
    # close() would wait for the other side's goodbye.
    connection.shutdown()  # type: ignore[no-untyped-call]


def _tls_options(verify: bool | str) -> dict[str, Any]:
    """Say to the websocket what `verify` says to requests."""
    if verify is False:
        return {"cert_reqs": ssl.CERT_NONE, "check_hostname": False}
    bundle = DEFAULT_CA_BUNDLE_PATH if verify is True else verify
    return {"ca_cert_path" if os.path.isdir(bundle) else "ca_certs": bundle}
