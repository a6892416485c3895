"""Runs one graph: order, cache, events, errors."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy_executors.devserver.catalogue import Catalogue
from comfy_executors.devserver.faults import Faults
from comfy_executors.devserver.files import Folders
from comfy_executors.devserver.graph import Schedule, is_link, signatures
from comfy_executors.devserver.hub import Hub, Preview
from comfy_executors.devserver.nodes import (
    FINGERPRINTS,
    NODES,
    InterruptedNodeError,
    NodeContext,
    NodeResult,
)
from comfy_executors.devserver.prompts import Prompt
from comfy_executors.devserver.records import Journal
from comfy_executors.devserver.versions import Behaviour

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What all prompts of a server share.

    Args:
        behaviour: What the imitated version does.
        catalogue: The node classes.
        folders: The server's folders.
        faults: The faults that are switched on.
        journal: Where it is kept what happened.
        hub: The way to the websockets.
        step_seconds: How long a sampling step takes, in seconds.
    """

    behaviour: Behaviour
    catalogue: Catalogue
    folders: Folders
    faults: Faults
    journal: Journal
    hub: Hub
    step_seconds: float


class Execution:
    """One execution of one prompt.

    Args:
        setting: What all prompts share.
        prompt: What to run.
        cache: The results of the prompt before, by signature.
        on_executing: Called with the client id and the node id when a node starts.
    """

    def __init__(
        self,
        setting: Setting,
        prompt: Prompt,
        cache: dict[str, NodeResult],
        on_executing: Callable[[str | None, str], None],
    ) -> None:
        self._setting = setting
        self._prompt = prompt
        self._on_executing = on_executing
        self._signatures = signatures(prompt.graph, prompt.outputs, self._fingerprint)
        # As on the real server, only what the prompt before has left is known, and of that only
        # what this prompt needs.
        wanted = self._signatures.values()
        self.results = {key: cache[key] for key in wanted if key in cache}
        self._states: dict[str, dict[str, Any]] = {}
        self._executed: list[str] = []
        self._outputs: dict[str, Any] = {}
        self._messages: list[tuple[str, dict[str, Any]]] = []
        self._outcome = "success"

    def _fingerprint(self, node_id: str) -> str:
        node = self._prompt.graph[node_id]
        function = FINGERPRINTS.get(node["class_type"])
        if function is None:
            return ""
        try:
            return function(self._setting.folders, node["inputs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            # The node itself will stumble over it and report it.
            return repr(error)

    def run(self) -> str:
        """Run the graph and return how it ended: `success`, `error` or `interrupted`."""
        prompt_id = self._prompt.prompt_id
        self._announce("execution_start", {"prompt_id": prompt_id})
        cached = [node for node in self._prompt.graph if self._result(node) is not None]
        self._setting.journal.change_prompt(self._prompt.key, cached_nodes=cached)
        self._announce("execution_cached", {"nodes": cached, "prompt_id": prompt_id})
        schedule = Schedule(
            self._prompt.graph, self._prompt.outputs, lambda node: self._result(node) is not None
        )
        for node_id in schedule:
            if not self._visit(node_id):
                return self._outcome
        self._announce("execution_success", {"prompt_id": prompt_id})
        return self._outcome

    def history_entry(self) -> dict[str, Any]:
        """Return what `GET /history` shows."""
        meta = {
            node: {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}
            for node in self._outputs
        }
        succeeded = self._outcome == "success"
        status = {
            "status_str": "success" if succeeded else "error",
            "completed": succeeded,
            "messages": self._messages,
        }
        return {
            "prompt": self._prompt.describe(),
            "outputs": self._outputs,
            "status": status,
            "meta": meta,
        }

    def send(self, kind: str, data: dict[str, Any], preview: Preview | None = None) -> None:
        """Send an event to the websocket of the prompt's client, if it has one."""
        if self._prompt.client_id is not None:
            self._setting.hub.send(kind, data, self._prompt.client_id, preview)

    def _announce(self, kind: str, data: dict[str, Any]) -> None:
        data["timestamp"] = int(time.time() * 1000)
        self._messages.append((kind, data))
        self.send(kind, data)

    def _result(self, node_id: str) -> NodeResult | None:
        return self.results.get(self._signatures.get(node_id, ""))

    def _visit(self, node_id: str) -> bool:
        """Run a node, or take it from the cache; False when the prompt ends here."""
        result = self._result(node_id)
        if result is not None:
            self._report_cached(node_id, result)
            return True
        inputs: dict[str, Any] = {}
        try:
            if self._prompt.stop.is_set():
                raise InterruptedNodeError
            self._start(node_id)
            inputs.update(self._inputs(node_id))
            result = NODES[self._class_type(node_id)](self._context(node_id), **inputs)
        except InterruptedNodeError:
            self._end_interrupted(node_id)
            return False
        except Exception as error:
            logger.info("node %s of prompt %s failed", node_id, self._prompt.prompt_id)
            self._end_failed(node_id, inputs, error)
            return False
        self._finish(node_id, result)
        return True

    def _class_type(self, node_id: str) -> str:
        return str(self._prompt.graph[node_id]["class_type"])

    def _inputs(self, node_id: str) -> dict[str, Any]:
        described = self._setting.catalogue.nodes[self._class_type(node_id)]["input"]
        known = {*described.get("required", ()), *described.get("optional", ())}
        inputs = self._prompt.graph[node_id]["inputs"]
        return {name: self._value(value) for name, value in inputs.items() if name in known}

    def _value(self, value: Any) -> Any:
        if not is_link(value):
            return value
        result = self._result(value[0])
        assert result is not None
        return result.outputs[value[1]]

    def _context(self, node_id: str) -> NodeContext:
        def progress(value: int, total: int, preview: tuple[bytes, str] | None) -> None:
            self._step(node_id, value, total, preview)

        return NodeContext(
            node_id,
            self._prompt.graph,
            self._prompt.extra_data,
            self._setting.folders,
            self._setting.step_seconds,
            self._prompt.stop,
            progress,
        )

    def _start(self, node_id: str) -> None:
        self._on_executing(self._prompt.client_id, node_id)
        self._set_state(node_id, 0.0, 1.0, "running")
        self.send("executing", self._event(node_id))
        self._setting.journal.happened()

    def _step(
        self, node_id: str, value: int, total: int, preview: tuple[bytes, str] | None
    ) -> None:
        if self._prompt.stop.is_set():
            raise InterruptedNodeError
        prompt_id = self._prompt.prompt_id
        self._set_state(node_id, value, total, "running")
        data = {"value": value, "max": total, "prompt_id": prompt_id, "node": node_id}
        image = None if preview is None else Preview(*preview, node_id, prompt_id)
        self.send("progress", data, image)
        self._setting.journal.happened()

    def _finish(self, node_id: str, result: NodeResult) -> None:
        self.results[self._signatures[node_id]] = result
        self._executed.append(node_id)
        self._setting.journal.node_ran(self._prompt.key, node_id, self._class_type(node_id))
        if result.ui is not None:
            self._outputs[node_id] = result.ui
            self.send("executed", {**self._event(node_id, result.ui)})
        total = self._states[node_id]["max"]
        self._set_state(node_id, total, total, "finished")

    def _report_cached(self, node_id: str, result: NodeResult) -> None:
        # Without a client id the outputs of cached nodes are missing even from the history.
        if result.ui is not None and self._prompt.client_id is not None:
            self._outputs[node_id] = result.ui
            if self._setting.behaviour.cached_executed:
                self.send("executed", self._event(node_id, result.ui))
        self._set_state(node_id, 1, 1, "finished")

    def _event(self, node_id: str, output: dict[str, Any] | None = None) -> dict[str, Any]:
        data: dict[str, Any] = {"node": node_id, "display_node": node_id}
        if output is not None:
            data["output"] = output
        data["prompt_id"] = self._prompt.prompt_id
        return data

    def _set_state(self, node_id: str, value: float, total: float, state: str) -> None:
        self._states[node_id] = {
            "value": value,
            "max": total,
            "state": state,
            "node_id": node_id,
            "prompt_id": self._prompt.prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        if self._setting.behaviour.progress_state:
            data = {"prompt_id": self._prompt.prompt_id, "nodes": self._states}
            self.send("progress_state", data)

    def _end_interrupted(self, node_id: str) -> None:
        self._outcome = "interrupted"
        self._announce("execution_interrupted", self._end_data(node_id))

    def _end_failed(self, node_id: str, inputs: dict[str, Any], error: Exception) -> None:
        self._outcome = "error"
        data = self._end_data(node_id)
        data["exception_message"] = f"{error}\n"
        data["exception_type"] = _type_name(error)
        data["traceback"] = traceback.format_tb(error.__traceback__)
        data["current_inputs"] = {name: [_shown(value)] for name, value in inputs.items()}
        data["current_outputs"] = list(self._prompt.graph)
        self._announce("execution_error", data)

    def _end_data(self, node_id: str) -> dict[str, Any]:
        return {
            "prompt_id": self._prompt.prompt_id,
            "node_id": node_id,
            "node_type": self._class_type(node_id),
            "executed": list(self._executed),
        }


def _type_name(error: Exception) -> str:
    kind = type(error)
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _shown(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
