"""Fetching what a prompt on a ComfyUI server makes, each output once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from comfy_executors.clients.comfyui import ComfyUIClient
from comfy_executors.clients.comfyui_frames import ImageEvent
from comfy_executors.errors import OutputMissingError
from comfy_executors.executors.control import JobControl
from comfy_executors.images import WorkflowOutput, WorkflowOutputImage, kind_of
from comfy_executors.runs import Batch, Job
from comfy_executors.workflows import Graph, class_type


class OutputCollector:
    """What one prompt has made so far.

    Events and history both name the outputs of a node, and each is fetched once. Attributes:
    `images` and `outputs`; `previews`, the number of those left out; `cached`, the nodes that the
    server answered from its cache; `reported`, the nodes that were heard of.

    Args:
        client: The server's routes.
        control: The deadline and the cancel signal of the downloads.
        job: What the batches of the run share.
        batch: The batch.
        graph: Its graph.
    """

    def __init__(
        self, client: ComfyUIClient, control: JobControl, job: Job, batch: Batch, graph: Graph
    ) -> None:
        self._client = client
        self._control = control
        self._job = job
        self._batch = batch
        self._graph = graph
        self._server = client.http.base_url
        self._seen: set[tuple[str, ...]] = set()
        self.cached: set[str] = set()
        self.reported: set[str] = set()
        self.previews = 0
        self.images: list[WorkflowOutputImage] = []
        self.outputs: list[WorkflowOutput] = []

    def fetch_node(self, prompt_id: str, node: str, output: Mapping[str, Any]) -> None:
        """Fetch what a node reports.

        Raises:
            OutputMissingError: The server does not have a file that it names.
            ServerError: A file cannot be had.
        """
        self.reported.add(node)
        for key, items in output.items():
            for number, item in enumerate(items if isinstance(items, list) else ()):
                if isinstance(item, dict) and isinstance(item.get("filename"), str):
                    self._fetch_file(prompt_id, node, item)
                elif not isinstance(item, bool):  # such as `animated: [true]`
                    self._add_value(prompt_id, node, key, number, item)

    def add_websocket_image(self, event: ImageEvent) -> None:
        """Add an image that came over the websocket."""
        number = len(self.images) + 1
        name = f"{class_type(self._graph, event.node_id)}_{number:05d}_{event.suffix}"
        self._add(event.data, event.prompt_id, event.node_id, name, "", "websocket")

    def _fetch_file(self, prompt_id: str, node: str, item: Mapping[str, Any]) -> None:
        name = item["filename"]
        subfolder, type_ = str(item.get("subfolder") or ""), str(item.get("type") or "output")
        if not self._is_new(node, type_, subfolder, name):
            return
        if type_ == "temp" and not self._job.include_previews:
            self.previews += 1
            return
        data = self._client.view(name, subfolder, type_, self._control)
        if data is None:
            raise self._missing(prompt_id, node, name)
        self._add(data, prompt_id, node, name, subfolder, type_)

    def _missing(self, prompt_id: str, node: str, name: str) -> OutputMissingError:
        cached = node in self.cached
        why = "it was deleted since, and the server's cache still names it" if cached else "404"
        return OutputMissingError(
            f"{self._server} does not have {name} of node {node}: {why}",
            cached=cached,
            node_id=node,
            prompt_id=prompt_id,
            server=self._server,
        )

    def _add_value(self, prompt_id: str, node: str, key: str, number: int, value: Any) -> None:
        text, suffix = (value, "txt") if isinstance(value, str) else (json.dumps(value), "json")
        if self._is_new(node, key, str(number)):
            data = text.encode("utf-8", "replace")
            self._add(data, prompt_id, node, f"{key}.{suffix}", "", "text")

    def _is_new(self, *key: str) -> bool:
        new = key not in self._seen
        self._seen.add(key)
        return new

    def _add(
        self, data: bytes, prompt_id: str, node: str, name: str, subfolder: str, type_: str
    ) -> None:
        is_image = kind_of(name) == "image"
        output = (WorkflowOutputImage if is_image else WorkflowOutput)(
            data,
            name=name,
            subfolder=subfolder,
            type=type_,
            node_id=node,
            batch_index=self._batch.index,
            seed=self._batch.seed,
            prompt_id=prompt_id,
            server=self._server,
            cached=node in self.cached,
        )
        if self._job.output_dir is not None:
            output._save_and_release(self._job.output_dir)
        if isinstance(output, WorkflowOutputImage):
            self.images.append(output)
        else:
            self.outputs.append(output)

    def discard(self) -> None:
        """Remove what was saved, because the batch fails or is run again."""
        for output in (*self.images, *self.outputs):
            if output.path is not None:
                output.path.unlink(missing_ok=True)
