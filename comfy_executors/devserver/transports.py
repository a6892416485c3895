"""Cutting connections."""

from __future__ import annotations

import asyncio
import socket
import struct

_NO_LINGER = struct.pack("ii", 1, 0)


def reset_transport(transport: asyncio.BaseTransport | None) -> None:
    """Close a connection with a TCP reset, without sending what is still buffered."""
    if transport is None or transport.is_closing():
        return
    connection = transport.get_extra_info("socket")
    # Without this the kernel would end the connection in good order, as after a normal close.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    assert isinstance(transport, asyncio.WriteTransport)
    transport.abort()
