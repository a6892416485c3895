"""A TCP proxy that makes a server far away: every byte arrives a fixed time later.

Each direction of a connection is a delay line: chunks keep their order and are held for the same
time, however many there are, so that it costs latency and no throughput. As on a real line a
connection's first bytes come one round trip later still, that of TCP's handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

_CHUNK = 1 << 18


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, not_before: float
) -> None:
    """Pass on what comes, each chunk `delay` seconds after it came."""
    loop = asyncio.get_running_loop()
    line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        data = b"-"
        while data:
            due, data = await line.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            writer.write(data)
            await writer.drain()

    delivery = asyncio.ensure_future(deliver())
    data = b"-"
    with contextlib.suppress(ConnectionError):
        while data:
            data = await reader.read(_CHUNK)
            line.put_nowait((max(not_before, loop.time() + delay), data))
        await delivery
    delivery.cancel()
    writer.close()


async def serve(host: str, port: int, delay: float) -> None:
    """Pass connections on to a server, each way delayed, until cancelled.

    Args:
        host: The server's host.
        port: Its port.
        delay: How long a byte travels, in seconds.
    """

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handshake = asyncio.get_running_loop().time() + 2 * delay
        far_reader, far_writer = await asyncio.open_connection(host, port)
        # Cancelled when the benchmark is over, which is no error.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(
                _carry(reader, far_writer, delay, handshake + delay),
                _carry(far_reader, writer, delay, 0.0),
                return_exceptions=True,
            )

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=_CHUNK)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    address, seconds = sys.argv[1:]
    where, _, number = address.rpartition(":")
    asyncio.run(serve(where, int(number), float(seconds)))
