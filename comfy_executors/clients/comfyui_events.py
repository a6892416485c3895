"""The websocket of a ComfyUI server: one reader thread, events handed to whoever waits for them.

A connection that reconnects under its old client id can go deaf without an error, so each has a
fresh one, and prompts that were posted under a lost id are told so (`ConnectionLost`) and look the
server's queue and history up instead.
"""

from __future__ import annotations

import json
import logging
import os
import random
import ssl
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

import websocket
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from comfy_executors.clients.http import CONNECT_SECONDS, HttpClient

logger = logging.getLogger(__name__)

_TICK_SECONDS = 5.0
_EARLY_EVENTS = 1000
_PING_SECONDS = 20.0  # proxies cut websockets that are idle for 60 to 100 s
_IDLE_SECONDS = 30.0  # without prompts the connection is given back
_LONGEST_BACKOFF = 10.0
_FEATURES = json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
# Sent at each step with the state of every node; `progress` says what is new in it.
_PROGRESS_STATE = b'{"type": "progress_state"'
_IMAGE, _IMAGE_WITH_METADATA = 1, 4
_SUFFIXES = {1: ".jpg", 2: ".png"}


@dataclass(frozen=True)
class PromptEvent:
    """A message about a prompt: its type and data as the server sent them."""

    type: str
    prompt_id: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class ImageEvent:
    """An image that came over the websocket: a preview, or the output of a websocket node."""

    prompt_id: str
    node_id: str
    suffix: str
    data: bytes


@dataclass(frozen=True)
class ConnectionLost:
    """No more events come for the prompts that were posted under this client id."""

    client_id: str


Event = Union[PromptEvent, ImageEvent, ConnectionLost]
Sink = Callable[[Event], None]


class EventParser:
    """Turns the frames of one connection into events; does no I/O.

    Images of servers without the feature flag name no prompt: they belong to the node that
    `executing` named last on the same connection.
    """

    def __init__(self) -> None:
        self._executing: tuple[str, str] | None = None

    def text(self, frame: bytes) -> PromptEvent | None:
        """Parse a text frame; None for messages about no prompt, and for what is no message."""
        if frame.startswith(_PROGRESS_STATE):
            return None
        try:
            message = json.loads(frame)
            kind, data = message["type"], message["data"]
            # After a reconnect the server repeats `executing` without a prompt id.
            prompt_id = data.get("prompt_id")
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        if not isinstance(prompt_id, str):
            return None
        if kind == "executing":
            node = data.get("node")
            self._executing = None if node is None else (prompt_id, str(node))
        return PromptEvent(str(kind), prompt_id, data)

    def binary(self, frame: bytes) -> ImageEvent | None:
        """Parse a binary frame; None for kinds that are no images."""
        try:
            (kind,) = struct.unpack_from(">I", frame)
            if kind == _IMAGE_WITH_METADATA:
                (length,) = struct.unpack_from(">I", frame, 4)
                about = json.loads(frame[8 : 8 + length])
                suffix = ".png" if about.get("image_type") == "image/png" else ".jpg"
                return ImageEvent(
                    about["prompt_id"], str(about["node_id"]), suffix, frame[8 + length :]
                )
            if kind == _IMAGE and self._executing is not None:
                (image_format,) = struct.unpack_from(">I", frame, 4)
                suffix = _SUFFIXES.get(image_format, ".png")
                return ImageEvent(*self._executing, suffix, frame[8:])
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("a binary websocket frame of %d bytes is not understood", len(frame))
        return None


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
        self._early: deque[PromptEvent] = deque(maxlen=_EARLY_EVENTS)
        self._socket: websocket.WebSocket | None = None
        self._client_id: str | None = None
        self._connecting = False
        self._running = False
        self._thread: threading.Thread | None = None
        self._closed = False

    def client_id(self, timeout: float) -> str | None:
        """Return the id of the present connection, making one if there is none.

        Args:
            timeout: Seconds to wait for it at the most.

        Returns:
            The id to post prompts under, or None when no connection can be had now.
        """
        with self._changed:
            if not self._running and not self._closed:
                self._running = self._connecting = True
                # A daemon, because it may be blocked in a read when the interpreter ends; close()
                # wakes and joins it.
                self._thread = threading.Thread(
                    target=self._run, name="comfy-executors-websocket", daemon=True
                )
                self._thread.start()
            self._changed.wait_for(lambda: not self._connecting or self._closed, timeout)
            return self._client_id

    def is_live(self, client_id: str) -> bool:
        """Tell whether the connection with this id still brings events."""
        with self._changed:
            return client_id == self._client_id

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
        with self._changed:
            self._subscriptions[prompt_id] = _Subscription(client_id, sink, image_nodes)
            early = [event for event in self._early if event.prompt_id == prompt_id]
            lost = client_id != self._client_id
        for event in early:
            sink(event)
        if lost:
            sink(ConnectionLost(client_id))

    def unsubscribe(self, prompt_id: str) -> None:
        """Stop handing out a prompt's events."""
        with self._changed:
            self._subscriptions.pop(prompt_id, None)
            self._unused_since = time.monotonic()

    def drop(self, client_id: str) -> None:
        """Give up a connection that has gone deaf, so that a fresh one is made."""
        with self._changed:
            stale = self._socket if client_id == self._client_id else None
        if stale is not None:
            _wake_reader(stale)

    def close(self) -> None:
        """Close the connection and end the thread."""
        with self._changed:
            self._closed = True
            thread, connection = self._thread, self._socket
            self._changed.notify_all()
        if connection is not None:
            _wake_reader(connection)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # On the reader's thread.

    def _run(self) -> None:
        failures = 0
        while not self._may_end(failures):
            client_id = uuid.uuid4().hex
            connection = self._connect(client_id, failures)
            if connection is None:
                failures += 1
                self._pause(random.uniform(0.5, 1) * min(_LONGEST_BACKOFF, 0.25 * 2**failures))
                continue
            failures = 0
            try:
                self._read(connection)
            except (websocket.WebSocketException, OSError) as error:
                logger.info("the websocket to %s was lost: %s", self._http.base_url, error)
            finally:
                _hang_up(connection)
                self._tell_lost(client_id)

    def _may_end(self, failures: int) -> bool:
        with self._changed:
            if self._closed or not (self._subscriptions or self._connecting):
                self._running = self._connecting = False
                self._changed.notify_all()
                return True
            self._connecting = failures == 0
            return False

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _connect(self, client_id: str, failures: int) -> websocket.WebSocket | None:
        try:
            connection = self._open(client_id)
        except (websocket.WebSocketException, OSError) as error:
            # The exception's own text can hold headers of the answer.
            reason = getattr(error, "status_code", None) or type(error).__name__
            if failures == 0:
                logger.warning(
                    "no websocket to %s (%s): polling instead", self._http.base_url, reason
                )
            connection = None
        with self._changed:
            self._connecting = False
            if connection is not None and self._closed:
                _hang_up(connection)
                connection = None
            if connection is not None:
                self._socket, self._client_id = connection, client_id
            self._changed.notify_all()
        return connection

    def _open(self, client_id: str) -> websocket.WebSocket:
        base = "ws" + self._http.base_url[len("http") :]
        connection = websocket.create_connection(
            f"{base}/ws?clientId={client_id}",
            timeout=CONNECT_SECONDS,
            header=self._http.sent_headers(),
            sslopt=_tls_options(self._http.verify),
            suppress_origin=True,
            # In pure Python it costs more than all the rest; JSON checks the encoding anyway.
            skip_utf8_validation=True,
        )
        connection.send(_FEATURES)
        return connection

    def _read(self, connection: websocket.WebSocket) -> None:
        parser = EventParser()
        connection.settimeout(_TICK_SECONDS)
        heard = time.monotonic()
        while True:
            try:
                opcode, frame = connection.recv_data(control_frame=True)
            except websocket.WebSocketTimeoutException:
                silent = time.monotonic() - heard
                if silent >= 2 * _PING_SECONDS or self._is_unused():
                    return
                if silent >= _PING_SECONDS:
                    connection.ping()
                continue
            heard = time.monotonic()
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                return
            if opcode == websocket.ABNF.OPCODE_TEXT:
                self._dispatch(parser.text(frame))
            elif opcode == websocket.ABNF.OPCODE_BINARY:
                self._dispatch(parser.binary(frame))

    def _is_unused(self) -> bool:
        with self._changed:
            unused = time.monotonic() - self._unused_since
            return self._closed or (not self._subscriptions and unused >= _IDLE_SECONDS)

    def _dispatch(self, event: PromptEvent | ImageEvent | None) -> None:
        if event is None:
            return
        with self._changed:
            subscription = self._subscriptions.get(event.prompt_id)
            if subscription is None:
                if isinstance(event, PromptEvent):
                    self._early.append(event)
                return
        if isinstance(event, PromptEvent) or event.node_id in subscription.image_nodes:
            subscription.sink(event)

    def _tell_lost(self, client_id: str) -> None:
        with self._changed:
            self._socket = self._client_id = None
            self._connecting = bool(self._subscriptions) and not self._closed
            sinks = [s.sink for s in self._subscriptions.values() if s.client_id == client_id]
            self._changed.notify_all()
        for sink in sinks:
            sink(ConnectionLost(client_id))


@dataclass(frozen=True)
class _Subscription:
    client_id: str
    sink: Sink
    image_nodes: frozenset[str]


def _wake_reader(connection: websocket.WebSocket) -> None:
    # Neither close() nor shutdown() wakes a reader that is blocked in a read.
    connection.abort()  # type: ignore[no-untyped-call]


def _hang_up(connection: websocket.WebSocket) -> None:
    # close() would wait for the other side's goodbye.
    connection.shutdown()  # type: ignore[no-untyped-call]


def _tls_options(verify: bool | str) -> dict[str, Any]:
    """Say to the websocket what `verify` says to requests."""
    if verify is False:
        return {"cert_reqs": ssl.CERT_NONE, "check_hostname": False}
    bundle = DEFAULT_CA_BUNDLE_PATH if verify is True else verify
    return {"ca_cert_path" if os.path.isdir(bundle) else "ca_certs": bundle}
