"""Fetching what a prompt on a ComfyUI server makes, each output once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from comfy_executors.clients.comfyui import ComfyUIClient
from comfy_executors.clients.comfyui_frames import ImageEvent
from comfy_executors.clients.comfyui_reports import OutputFile, output_file, value_file
from comfy_executors.clients.http import Waiter
from comfy_executors.errors import OutputMissingError
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.side_by_side import Call, side_by_side
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
        self._saved: list[WorkflowOutput] = []  # also those that are not yet among these

    def fetch_node(self, prompt_id: str, node: str, output: Mapping[str, list[Any]]) -> None:
        """Fetch what a node reports, a few files at a time.

        Raises:
            OutputMissingError: The server does not have a file that it names.
            ServerError: A file cannot be had.
            OutputFileError: A file cannot be saved.
        """
        self.reported.add(node)
        calls = list(self._calls(prompt_id, node, output))
        with contextlib.closing(side_by_side(calls, self._control)) as made:
            for item in made:
                self._keep(item)

    def add_websocket_image(self, event: ImageEvent) -> None:
        """Add an image that came over the websocket."""
        number = len(self.images) + 1
        name = f"{class_type(self._graph, event.node_id)}_{number:05d}_{event.suffix}"
        self._keep(self._make(event.data, event.prompt_id, event.node_id, name, "", "websocket"))

    def _calls(
        self, prompt_id: str, node: str, output: Mapping[str, list[Any]]
    ) -> Iterator[Call[WorkflowOutput]]:
        """Return what is to be done for each thing that a node reports and that is new."""
        for key, items in output.items():
            for number, item in enumerate(items):
                file, value = output_file(item), value_file(item)
                if file is None:
                    if value is not None and self._is_new(node, key, str(number)):
                        yield partial(self._make_value, prompt_id, node, key, *value)
                elif self._is_new(node, file.type, file.subfolder, file.name):
                    if file.type == "temp" and not self._job.include_previews:
                        self.previews += 1
                    else:
                        yield partial(self._fetch_file, prompt_id, node, file)

    def _fetch_file(
        self, prompt_id: str, node: str, file: OutputFile, waiter: Waiter
    ) -> WorkflowOutput:
        data = self._client.view(*file, waiter)
        if data is None:
            raise self._missing(prompt_id, node, file.name)
        return self._make(data, prompt_id, node, *file)

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

    def _make_value(
        self, prompt_id: str, node: str, key: str, text: str, suffix: str, waiter: Waiter
    ) -> WorkflowOutput:
        data = text.encode("utf-8", "replace")
        return self._make(data, prompt_id, node, f"{key}.{suffix}", "", "text")

    def _is_new(self, *key: str) -> bool:
        new = key not in self._seen
        self._seen.add(key)
        return new

    def _make(
        self, data: bytes, prompt_id: str, node: str, name: str, subfolder: str, type_: str
    ) -> WorkflowOutput:
        """Make an output of its bytes, and save it where that is wanted, on any thread."""
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
            self._saved.append(output)
        return output

    def _keep(self, output: WorkflowOutput) -> None:
        if isinstance(output, WorkflowOutputImage):
            self.images.append(output)
        else:
            self.outputs.append(output)
        if self._job.on_output is not None:
            self._job.on_output(output)

    def discard(self) -> None:
        """Forget all, and remove what was saved, because the batch fails or is run again."""
        for output in self._saved:
            if output.path is not None:
                output.path.unlink(missing_ok=True)
        # The batch's error is kept, and with it the frames that know this object.
        for made in (self._saved, self.images, self.outputs):
            made.clear()
