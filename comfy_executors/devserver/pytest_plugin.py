"""Fixtures that give tests a dev server.

Switch them on in `conftest.py`::

    pytest_plugins = ["comfy_executors.devserver.pytest_plugin"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from comfy_executors.devserver import DevServer


@pytest.fixture(scope="session")
def _comfy_dev_server_of_session() -> Iterator[DevServer]:
    with DevServer() as server:
        yield server


@pytest.fixture
def comfy_dev_server(_comfy_dev_server_of_session: DevServer) -> DevServer:
    """A running dev server that knows nothing of the tests before; one for the whole session."""
    _comfy_dev_server_of_session.reset()
    return _comfy_dev_server_of_session


@pytest.fixture
def comfy_dev_server_factory() -> Iterator[Callable[..., DevServer]]:
    """Makes and starts further dev servers, with the arguments of `DevServer`; stops them."""
    with ExitStack() as servers:

        def make(*args: Any, **options: Any) -> DevServer:
            return servers.enter_context(DevServer(*args, **options))

        yield make
