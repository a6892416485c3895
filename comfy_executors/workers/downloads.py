"""Input images that a job names by URL, fetched from public addresses only.

A worker sits in a data centre, where private addresses answer that are nobody's business: names
are resolved once, checked, and connected to by number.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from comfy_executors.clients.http import Waiter
from comfy_executors.errors import ComfyExecutorsError, InputImageError

_MAX_BYTES = 200 * 1024 * 1024
_SECONDS = 120.0  # for a whole file
_SILENCE_SECONDS = 20.0  # between two of its bytes
_MAX_REDIRECTS = 3
_CHUNK_BYTES = 64 * 1024
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SAFE = "%/:=&?~#+!$,;'@()*[]"


class InputDownloader:
    """Fetches input images over https.

    Args:
        allow_private: Whether loopback, link-local and private addresses are allowed, too.
        max_bytes: How large a file may be.
        seconds: How long one may take.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        max_bytes: int = _MAX_BYTES,
        seconds: float = _SECONDS,
    ) -> None:
        self._allow_private = allow_private
        self._max_bytes = max_bytes
        self._seconds = seconds

    def fetch(self, url: str, name: str, waiter: Waiter) -> bytes:
        """Return what stands at an address.

        Args:
            url: The address; its query may be a key and is never shown.
            name: The input image's name, for messages.
            waiter: Its cancellation ends the download.

        Raises:
            InputImageError: The address is not allowed, nobody answers, or the file is too large.
        """
        deadline = time.monotonic() + self._seconds
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                parts = _checked(url, name)
                found = self._get(parts, name, deadline, waiter)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
            raise InputImageError(f"the url of {name} redirects more than {_MAX_REDIRECTS} times")
        except ComfyExecutorsError:
            raise
        except (OSError, HTTPException, UnicodeError) as error:
            # In words of ours or the system's: others hold the whole address.
            reason = getattr(error, "strerror", None) or type(error).__name__
            if isinstance(error, HTTPException):
                reason = "the answer was cut short"
            if time.monotonic() >= deadline:
                reason = f"it took more than {self._seconds:g} s"
            host = urlsplit(url).hostname
            raise InputImageError(f"cannot fetch {name} from {host}: {reason}") from error

    def _get(self, parts: SplitResult, name: str, deadline: float, waiter: Waiter) -> bytes | str:
        """Make one request; return the body, or where it was moved to."""
        host = parts.hostname or ""
        connection = HTTPSConnection(host, parts.port or 443)
        raw = self._connect(host, parts.port or 443, name, deadline)
        context = ssl.create_default_context()
        tls = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        # A peer that lets bytes trickle would reset every timeout that a socket has.
        closer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, [tls])
        closer.start()
        try:
            # Verified: an address that a hostile name server puts forward has no certificate.
            tls.do_handshake()
            connection.sock = tls
            target = quote(parts.path or "/", _SAFE)
            target += f"?{quote(parts.query, _SAFE)}" if parts.query else ""
            headers = {"User-Agent": "comfy-executors", "Accept-Encoding": "identity"}
            connection.request("GET", target, headers=headers)
            with connection.getresponse() as response:
                found = self._read(response, name, waiter)
            if time.monotonic() >= deadline:
                raise TimeoutError  # what looks like the end of the body may be our own doing
            return found
        finally:
            closer.cancel()
            closer.join()
            connection.close()
            tls.close()

    def _read(self, response: HTTPResponse, name: str, waiter: Waiter) -> bytes | str:
        moved = response.headers.get("Location")
        if response.status in (301, 302, 303, 307, 308) and moved:
            return moved
        if response.status != 200:
            raise InputImageError(f"the url of {name} is answered with {response.status}")
        body = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            waiter.limit(self._seconds)
            body += chunk
            if len(body) > self._max_bytes:
                raise InputImageError(f"{name} has more than {self._max_bytes} bytes")
        if response.length:
            raise HTTPException(f"{response.length} bytes did not come")
        if not body:
            raise InputImageError(f"the url of {name} is an empty file")
        return bytes(body)

    def _connect(self, host: str, port: int, name: str, deadline: float) -> socket.socket:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not self._allow_private and not all(map(_is_public, addresses)):
            raise InputImageError(f"the url of {name} leads to {host}, which is no public address")
        for number, address in enumerate(addresses, start=1):
            left = max(0.01, min(_SILENCE_SECONDS, deadline - time.monotonic()))
            try:
                return socket.create_connection((address, port), timeout=left)
            except OSError:
                if number == len(addresses):
                    raise
        raise InputImageError(f"{host} has no address")


def _checked(url: str, name: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InputImageError(f"the url of {name} is no address") from None
    if parts.scheme != "https" or not host or parts.username is not None:
        raise InputImageError(f"the url of {name} must begin with https:// and a host")
    return parts


def _is_public(address: str) -> bool:
    return all(ip.is_global and not ip.is_multicast for ip in _meant(address))


def _meant(address: str) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Yield the address and those of the older kind that hide in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        hidden = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            hidden = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if hidden is not None:
            yield hidden
            return
    yield ip


def _shut_down(tls: ssl.SSLSocket) -> None:
    try:
        # Not the TLS socket's own method, which forgets the encryption under the reader's feet.
        socket.socket.shutdown(tls, socket.SHUT_RDWR)
    except OSError:
        return  # it was closed at this moment
