"""The open websockets, and the way of events to them."""

from __future__ import annotations

import asyncio
import json
import struct
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import WSMsgType, web

from comfy_executors.devserver.faults import Faults
from comfy_executors.devserver.records import Journal, record_of
from comfy_executors.devserver.transports import reset_transport
from comfy_executors.devserver.versions import Behaviour

FEATURES: dict[str, Any] = {
    "supports_preview_metadata": True,
    "supports_model_type_tags": True,
    "max_upload_size": 104857600,
    "extension": {"manager": {"supports_v4": True}},
    "node_replacements": True,
    "assets": False,
}
_PREVIEW_IMAGE = 1
_PREVIEW_IMAGE_WITH_METADATA = 4
_IMAGE_FORMATS = {"image/jpeg": 1, "image/png": 2}


@dataclass(frozen=True)
class Preview:
    """An image on its way to a websocket.

    Args:
        data: The bytes of the file.
        mime_type: `image/jpeg` or `image/png`.
        node_id: The node that made it.
        prompt_id: The prompt that it belongs to.
    """

    data: bytes
    mime_type: str
    node_id: str
    prompt_id: str

    def plain_frame(self) -> bytes:
        """Return the binary frame for clients without the feature flag."""
        head = struct.pack(">II", _PREVIEW_IMAGE, _IMAGE_FORMATS[self.mime_type])
        return head + self.data

    def frame_with_metadata(self) -> bytes:
        """Return the binary frame that also names the node and the prompt."""
        metadata = json.dumps(
            {
                "node_id": self.node_id,
                "prompt_id": self.prompt_id,
                "display_node_id": self.node_id,
                "parent_node_id": None,
                "real_node_id": self.node_id,
                "image_type": self.mime_type,
            }
        ).encode()
        head = struct.pack(">II", _PREVIEW_IMAGE_WITH_METADATA, len(metadata))
        return head + metadata + self.data


@dataclass(frozen=True)
class _Message:
    """What goes to one client, or with `client_id` None to all of them."""

    kind: str
    client_id: str | None
    text: str
    preview: Preview | None = None

    def frames(self, with_metadata: bool) -> list[tuple[str, str | bytes]]:
        # With metadata the preview comes before its progress message, without after it.
        if self.preview is None:
            return [(self.kind, self.text)]
        if with_metadata:
            return [("preview", self.preview.frame_with_metadata()), (self.kind, self.text)]
        return [(self.kind, self.text), ("preview", self.preview.plain_frame())]


class Connection:
    """One websocket with its queue of messages, so that a slow reader delays nobody else."""

    def __init__(self, ws: web.WebSocketResponse, transport: asyncio.BaseTransport | None) -> None:
        self.ws = ws
        self.transport = transport
        self.with_metadata = False
        self.queue: asyncio.Queue[_Message] = asyncio.Queue()


class Hub:
    """Sends events to the websockets of their clients.

    Only the loop's thread touches the connections. Other threads put messages into an outbox and
    wake the loop, once for as many messages as there are by then.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        faults: Faults,
        journal: Journal,
        behaviour: Behaviour,
    ) -> None:
        self._loop = loop
        self._faults = faults
        self._journal = journal
        self._behaviour = behaviour
        self._outbox: deque[_Message] = deque()
        self._awake = False
        self._clients: dict[str, Connection] = {}
        self._connections: set[Connection] = set()

    def send(
        self,
        kind: str,
        data: dict[str, Any],
        client_id: str | None = None,
        preview: Preview | None = None,
    ) -> None:
        """Send a JSON message to one client or, without a client id, to all; from any thread."""
        text = json.dumps({"type": kind, "data": data})
        self._outbox.append(_Message(kind, client_id, text, preview))
        if not self._awake:
            self._awake = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # The flag first: what is put in from here on is either seen below or wakes the loop again.
        self._awake = False
        while self._outbox:
            message = self._outbox.popleft()
            for connection in self._receivers(message.client_id):
                connection.queue.put_nowait(message)

    def _receivers(self, client_id: str | None) -> list[Connection]:
        if client_id is None:
            return list(self._clients.values())
        connection = self._clients.get(client_id)
        return [] if connection is None else [connection]

    async def serve(
        self, request: web.Request, greet: Callable[[str], list[dict[str, Any]]]
    ) -> web.WebSocketResponse:
        """Talk to one websocket until it closes.

        Args:
            request: The request for the upgrade.
            greet: Returns the first messages for a client id.
        """
        client_id = request.query.get("clientId") or uuid.uuid4().hex
        ws = web.WebSocketResponse(compress=False, max_msg_size=0)
        await ws.prepare(request)
        self._journal.add_request(record_of(request, "/ws", 101))
        connection = Connection(ws, request.transport)
        self._connections.add(connection)
        self._clients[client_id] = connection
        for message in greet(client_id):
            text = json.dumps(message)
            connection.queue.put_nowait(_Message(message["type"], client_id, text))
        self._journal.count_websockets(len(self._connections))
        sender = asyncio.ensure_future(self._send_all(connection))
        try:
            await self._receive_all(connection)
        finally:
            sender.cancel()
            self._forget(client_id, connection)
        return ws

    def _forget(self, client_id: str, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._clients.get(client_id) is connection or self._faults.deaf_reconnect:
            self._clients.pop(client_id, None)
        self._journal.count_websockets(len(self._connections))

    async def _receive_all(self, connection: Connection) -> None:
        first = True
        async for message in connection.ws:
            if first and message.type is WSMsgType.TEXT:
                self._take_flags(connection, message.data)
            first = False

    def _take_flags(self, connection: Connection, text: str) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            return
        if not isinstance(message, dict) or message.get("type") != "feature_flags":
            return
        if self._behaviour.feature_flags:
            flags = message.get("data") or {}
            connection.with_metadata = flags.get("supports_preview_metadata") is True
            answer = json.dumps({"type": "feature_flags", "data": FEATURES})
            connection.queue.put_nowait(_Message("feature_flags", None, answer))

    async def _send_all(self, connection: Connection) -> None:
        while True:
            message = await connection.queue.get()
            for kind, payload in message.frames(connection.with_metadata):
                if not await self._send(connection, kind, payload):
                    return

    async def _send(self, connection: Connection, kind: str, payload: str | bytes) -> bool:
        if self._faults.silence_websockets:
            return True
        if self._faults.take_drop(f"before:{kind}"):
            reset_transport(connection.transport)
            return False
        try:
            if isinstance(payload, str):
                await connection.ws.send_str(payload)
            else:
                await connection.ws.send_bytes(payload)
        except ConnectionError:
            return False
        if self._faults.take_drop(kind):
            reset_transport(connection.transport)
            return False
        return True

    async def drop(self) -> int:
        """Reset every open websocket and return how many there were."""
        connections = list(self._connections)
        for connection in connections:
            reset_transport(connection.transport)
        return len(connections)
