"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from comfy_executors.devserver import DevServer

# A busy machine is no failure: what a test costs is measured elsewhere.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A test run in the background ignores Ctrl-C, and the programs that tests start would inherit
    # that. A handler of our own becomes the default one in them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def any_server() -> Iterator[str]:
    """The URL of the ComfyUI server that COMFYUI_URL names, or else of a dev server.

    Tests that use it need core nodes only, no faults and no look into the dev server.
    """
    url = os.environ.get("COMFYUI_URL")
    if url:
        yield url.rstrip("/")
        return
    with DevServer() as server:
        yield server.url
