"""A small ComfyUI-compatible server for demos and tests, without a GPU and without models.

::

    from comfy_executors.devserver import DevServer

    with DevServer() as server:
        print(server.url)

It needs the extra `devserver`.
"""

from __future__ import annotations

from importlib import import_module

from comfy_executors.errors import MissingExtraError

for _module, _package in (("aiohttp", "aiohttp"), ("PIL", "Pillow")):
    try:
        import_module(_module)
    except ImportError as error:
        raise MissingExtraError(_package, extra="devserver") from error

from comfy_executors.devserver.faults import Faults  # noqa: E402
from comfy_executors.devserver.records import PromptRecord, RequestRecord  # noqa: E402
from comfy_executors.devserver.server import DevServer  # noqa: E402

__all__ = ["DevServer", "Faults", "PromptRecord", "RequestRecord"]
