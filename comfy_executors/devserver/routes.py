"""The HTTP routes."""

from __future__ import annotations

import io
import json
import mimetypes
import platform
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import BodyPartReader, web
from PIL import Image, UnidentifiedImageError

from comfy_executors.devserver.engine import Engine
from comfy_executors.devserver.execution import Setting
from comfy_executors.devserver.files import FOLDER_TYPES, UnsafePathError, inside
from comfy_executors.devserver.hub import FEATURES
from comfy_executors.devserver.jobs import describe_job
from comfy_executors.devserver.prompts import Prompt
from comfy_executors.devserver.validation import MalformedPromptError, error_body, validate

_PAGE = """<!DOCTYPE html>
<html><head><title>comfy-executors dev server</title></head><body>
<h1>comfy-executors dev server</h1>
<p>It answers like ComfyUI {version}, without a GPU and without models.
Its pictures are placeholders.</p>
</body></html>
"""
_PREVIEW_FORMATS = {"webp": "WEBP", "jpeg": "JPEG"}
# A page, a script or a drawing with one, uploaded by somebody, must not run in a browser.
_SAFE_TYPE = re.compile(r"(image|video|audio)/(?!svg).*|text/plain|application/json")


class Routes:
    """The handlers of the routes.

    Args:
        setting: What the server was set up with.
        engine: Returns the engine of the moment.
    """

    def __init__(self, setting: Setting, engine: Callable[[], Engine]) -> None:
        self._setting = setting
        self._behaviour = setting.behaviour
        self._engine = engine
        self._number = 0

    def restart(self) -> None:
        """Begin to count prompts anew."""
        self._number = 0

    def table(self) -> list[web.RouteDef]:
        routes = [
            web.get("/", self.index),
            web.get("/ws", self.websocket),
            web.get("/prompt", self.get_prompt),
            web.post("/prompt", self.post_prompt),
            web.get("/queue", self.get_queue),
            web.post("/queue", self.post_queue),
            web.post("/interrupt", self.interrupt),
            web.get("/history", self.get_history),
            web.get("/history/{prompt_id}", self.get_history_of),
            web.post("/history", self.post_history),
            web.get("/view", self.view),
            web.post("/upload/image", self.upload_image),
            web.get("/object_info", self.object_info),
            web.get("/object_info/{class_type}", self.object_info),
            web.get("/system_stats", self.system_stats),
            web.get("/embeddings", self.embeddings),
            web.get("/models", self.models),
            web.get("/models/{folder}", self.models_in),
            web.post("/free", self.free),
        ]
        if self._behaviour.feature_flags:
            routes.append(web.get("/features", self.features))
        table = [*routes, *(_with_api(route) for route in routes)]
        if self._behaviour.jobs:
            table.append(web.get("/api/jobs/{job_id}", self.job))
        if self._behaviour.cancel:
            table.append(web.post("/api/jobs/cancel", self.cancel_jobs))
            table.append(web.post("/api/jobs/{job_id}/cancel", self.cancel_job))
        return table

    async def index(self, request: web.Request) -> web.StreamResponse:
        page = _PAGE.format(version=self._behaviour.version)
        return web.Response(text=page, content_type="text/html")

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        if self._setting.faults.refuse_websockets:
            return web.Response(status=503)
        return await self._setting.hub.serve(request, self._engine().greet)

    async def get_prompt(self, request: web.Request) -> web.StreamResponse:
        remaining = self._engine().queue.remaining
        return web.json_response({"exec_info": {"queue_remaining": remaining}})

    async def post_prompt(self, request: web.Request) -> web.StreamResponse:
        body = _fields(json.loads(await request.text()))
        number = self._take_number(body)
        if "prompt" not in body:
            return _rejected(error_body("no_prompt", "No prompt provided", "No prompt provided"))
        prompt_id = self._prompt_id(body)
        if prompt_id is None:
            return _rejected(_INVALID_PROMPT_ID)
        verdict = validate(
            body["prompt"],
            self._setting.catalogue.nodes,
            self._setting.catalogue.custom_checks,
            detailed=self._behaviour.detailed_errors,
            targets=body.get("partial_execution_targets"),
        )
        if verdict.error is not None:
            return _rejected(verdict.error, verdict.node_errors)
        extra_data = dict(body.get("extra_data") or {})
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        extra_data["create_time"] = int(time.time() * 1000)
        prompt = Prompt(number, prompt_id, body["prompt"], extra_data, verdict.outputs)
        self._engine().queue.put(prompt)
        answer = {"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors}
        return web.json_response(answer)

    def _take_number(self, body: Mapping[str, Any]) -> float:
        # Every post takes a number, the rejected ones too.
        number: float = self._number
        if "number" in body:
            number = float(body["number"])
        elif body.get("front"):
            number = -number
        self._number += 1
        return number

    def _prompt_id(self, body: Mapping[str, Any]) -> str | None:
        if not self._behaviour.own_prompt_id or body.get("prompt_id") is None:
            return str(uuid.uuid4())
        prompt_id = str(body["prompt_id"])
        return None if self._behaviour.uuid_prompt_id and not _is_uuid(prompt_id) else prompt_id

    async def get_queue(self, request: web.Request) -> web.StreamResponse:
        running, pending = self._engine().queue.snapshot()
        return web.json_response(
            {
                "queue_running": [prompt.describe() for prompt in running],
                "queue_pending": [prompt.describe() for prompt in pending],
            }
        )

    async def post_queue(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.text())
        if body.get("clear"):
            self._engine().queue.clear()
        for prompt_id in body.get("delete", ()):
            self._engine().queue.delete(prompt_id)
        return web.Response()

    async def interrupt(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.text())
        except ValueError:
            body = {}
        prompt_id = body.get("prompt_id") if isinstance(body, dict) else None
        if not self._behaviour.targeted_interrupt:
            prompt_id = None
        self._engine().queue.interrupt(prompt_id)
        return web.Response()

    async def get_history(self, request: web.Request) -> web.StreamResponse:
        max_items = request.query.get("max_items")
        offset = int(request.query.get("offset", -1))
        history = self._engine().queue.history(
            None if max_items is None else int(max_items), offset
        )
        return web.json_response(history)

    async def get_history_of(self, request: web.Request) -> web.StreamResponse:
        prompt_id = request.match_info["prompt_id"]
        return web.json_response(self._engine().queue.history_of(prompt_id))

    async def post_history(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.text())
        if body.get("clear"):
            self._engine().queue.forget(None)
        self._engine().queue.forget(body.get("delete", ()))
        return web.Response()

    async def job(self, request: web.Request) -> web.StreamResponse:
        queue = self._engine().queue
        found, is_running = queue.find(request.match_info["job_id"])
        if found is None:
            return web.json_response({"error": "Job not found"}, status=404)
        return web.json_response(describe_job(found, is_running, self._behaviour))

    async def cancel_job(self, request: web.Request) -> web.StreamResponse:
        cancelled = self._engine().queue.cancel(request.match_info["job_id"])
        return web.json_response({"cancelled": cancelled})

    async def cancel_jobs(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.text())
        job_ids = body.get("job_ids") if isinstance(body, dict) else None
        if not isinstance(job_ids, list) or not job_ids:
            return web.json_response({"error": "job_ids must be a non-empty list"}, status=400)
        invalid = [job_id for job_id in job_ids if not _is_uuid(job_id)]
        if invalid:
            error = {"error": "job_ids contains invalid id(s)", "invalid_ids": invalid}
            return web.json_response(error, status=400)
        cancelled = [self._engine().queue.cancel(job_id) for job_id in job_ids]
        return web.json_response({"cancelled": any(cancelled)})

    async def view(self, request: web.Request) -> web.StreamResponse:
        filename = request.query.get("filename", "")
        if not filename:
            return web.Response(status=404)
        folder_type = request.query.get("type", "output")
        if filename.startswith("/") or ".." in filename or folder_type not in FOLDER_TYPES:
            return web.Response(status=400)
        try:
            subfolder = self._setting.folders.resolve(
                folder_type, request.query.get("subfolder", "")
            )
        except UnsafePathError:
            return web.Response(status=403)
        try:
            path = inside(subfolder, filename)
            data = path.read_bytes()
        except UnsafePathError:
            return web.Response(status=400)
        except OSError:
            return web.Response(status=404)
        return _file_response(path.name, data, request.query.get("preview"))

    async def upload_image(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "multipart/form-data":
            return web.Response(status=400)
        form, files = await _read_form(request)
        try:
            return self._store_image(form, files)
        except (UnsafePathError, OSError):
            return web.Response(status=400)

    def _store_image(
        self, form: Mapping[str, str], files: Mapping[str, tuple[str, bytes]]
    ) -> web.Response:
        folder_type = form.get("type") or "input"
        if "image" not in files or folder_type not in FOLDER_TYPES:
            return web.Response(status=400)
        filename, data = files["image"]
        subfolder = form.get("subfolder", "")
        overwrite = form.get("overwrite", "").lower() in ("true", "1")
        name = self._setting.folders.store_upload(folder_type, subfolder, filename, data, overwrite)
        return web.json_response({"name": name, "subfolder": subfolder, "type": folder_type})

    async def object_info(self, request: web.Request) -> web.StreamResponse:
        class_type = request.match_info.get("class_type")
        return web.json_response(self._setting.catalogue.describe(class_type))

    async def system_stats(self, request: web.Request) -> web.StreamResponse:
        system = {
            "os": platform.system().lower(),
            "ram_total": 0,
            "ram_free": 0,
            "comfyui_version": self._behaviour.version,
            "python_version": sys.version,
            "pytorch_version": "none: comfy-executors dev server",
            "embedded_python": False,
            "argv": ["comfy-executors", "devserver"],
        }
        device = {"name": "cpu", "type": "cpu", "index": None, "vram_total": 0, "vram_free": 0}
        return web.json_response({"system": system, "devices": [device]})

    async def features(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(FEATURES)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        return web.json_response([])

    async def models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(list(self._setting.catalogue.models))

    async def models_in(self, request: web.Request) -> web.StreamResponse:
        names = self._setting.catalogue.models.get(request.match_info["folder"])
        return web.Response(status=404) if names is None else web.json_response(names)

    async def free(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.text() or "{}")
        if body.get("free_memory"):
            self._engine().forget_results()
        return web.Response()


_INVALID_PROMPT_ID = error_body(
    "invalid_prompt_id",
    "prompt_id must be a valid UUID",
    "prompt_id must be a UUID string in canonical lowercase hyphenated form; "
    "omit it to let the server generate one",
)


def _with_api(route: web.RouteDef) -> web.RouteDef:
    path = "/api" if route.path == "/" else f"/api{route.path}"
    return web.RouteDef(route.method, path, route.handler, {})


def _fields(body: Any) -> dict[str, Any]:
    if isinstance(body, (list, str)):
        # The real server looks for keys in these too, and finds none.
        return {}
    if not isinstance(body, dict):
        raise MalformedPromptError("the body is not an object")
    return body


async def _read_form(request: web.Request) -> tuple[dict[str, str], dict[str, tuple[str, bytes]]]:
    """Read a form's texts, and its files with their names.

    `request.post()` leaves a temporary file open when the client goes away within it.
    """
    texts: dict[str, str] = {}
    files: dict[str, tuple[str, bytes]] = {}
    size = 0
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader):
            continue  # a form within the form
        data = bytearray()
        while chunk := await part.read_chunk(1 << 16):
            size += len(chunk)
            if size > FEATURES["max_upload_size"]:
                raise web.HTTPRequestEntityTooLarge(FEATURES["max_upload_size"], size)
            data += chunk
        name = part.name or ""
        if part.filename is None:
            texts[name] = data.decode("utf-8", "replace")
        else:
            files[name] = part.filename, bytes(data)
    return texts, files


def _rejected(
    error: dict[str, Any], node_errors: dict[str, Any] | None = None
) -> web.StreamResponse:
    return web.json_response({"error": error, "node_errors": node_errors or {}}, status=400)


def _is_uuid(value: object) -> bool:
    try:
        return str(uuid.UUID(str(value))) == value
    except ValueError:
        return False


def _file_response(name: str, data: bytes, preview: str | None) -> web.Response:
    content_type = mimetypes.guess_type(name)[0] or ""
    if not _SAFE_TYPE.fullmatch(content_type):
        content_type = "application/octet-stream"
    if preview is not None:
        converted = _preview(data, preview)
        if converted is not None:
            data, content_type = converted
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    headers = {"Content-Disposition": f'filename="{quoted}"'}
    return web.Response(body=data, content_type=content_type, headers=headers)


def _preview(data: bytes, wanted: str) -> tuple[bytes, str] | None:
    """Return the image in another format (`webp;80`) and its type; None if it is no image."""
    name, _, quality = wanted.partition(";")
    image_format = _PREVIEW_FORMATS.get(name, "WEBP")
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB") if image_format == "JPEG" else opened
            image.save(buffer, image_format, quality=int(quality) if quality.isdigit() else 90)
    except (UnidentifiedImageError, OSError):
        return None
    return buffer.getvalue(), f"image/{image_format.lower()}"
