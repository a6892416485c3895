"""What the commands that run nothing ask of the server of `--server`."""

from __future__ import annotations

import argparse
from typing import Any

from comfy_executors.cli_delivery import UsageError
from comfy_executors.clients.comfyui import DEFAULT_PORT, ComfyUIClient
from comfy_executors.clients.http import DeadlineWaiter, HttpClient, parse_address

_SERVER_SECONDS = 60.0  # the descriptions of a server with many custom nodes are megabytes


def server_object_info(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the server's address without keys, and its description of its nodes.

    Raises:
        UsageError: The address is none.
        ServerError: The server cannot be asked.
    """
    try:
        url, user = parse_address(args.server, DEFAULT_PORT)
        http = HttpClient(url, headers=dict(args.header), auth=user, verify=args.verify)
    except ValueError as error:
        raise UsageError(str(error)) from error
    client, waiter = ComfyUIClient(http), DeadlineWaiter(_SERVER_SECONDS)
    try:
        client.check(waiter)
        return url, client.object_info(waiter)
    finally:
        http.close()
