"""Whether the client still waits: WSGI does not say, but gunicorn lends its socket."""

import select
import socket
import ssl


def is_gone(request):
    """Tell whether the client has closed its connection; False where that cannot be known.

    A client that has closed leaves an end of file to be read. It is only looked at, not taken.
    Behind a proxy, the proxy is the client: nginx closes when its own client does.
    """
    connection = request.META.get("gunicorn.socket")
    if connection is None or isinstance(connection, ssl.SSLSocket):  # TLS has no peeking
        return False
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except OSError:  # reset
        return True
