"""The thread that works through the queue, one prompt at a time."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from comfy_executors.devserver.execution import Execution, Setting
from comfy_executors.devserver.nodes import NodeResult
from comfy_executors.devserver.prompts import Prompt, PromptQueue

logger = logging.getLogger(__name__)


class Engine:
    """The queue, the history, the cache, and the thread that works through them.

    All of it lives in memory: a server that restarts gets a new engine.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._cache: dict[str, NodeResult] = {}
        self._executing: tuple[str | None, str] | None = None
        self._closing = threading.Event()
        self.queue = PromptQueue(setting.journal, self._send_status)
        # A daemon: a server that nobody stopped must not keep the interpreter from ending.
        self._thread = threading.Thread(
            target=self._work, name="comfy-devserver-executor", daemon=True
        )
        self._thread.start()

    def greet(self, client_id: str) -> list[dict[str, Any]]:
        """Return the first messages for a websocket, which may have been there before."""
        data = {**_status(self.queue.remaining), "sid": client_id}
        messages: list[dict[str, Any]] = [{"type": "status", "data": data}]
        executing = self._executing
        if executing is not None and executing[0] == client_id:
            messages.append({"type": "executing", "data": {"node": executing[1]}})
        return messages

    def forget_results(self) -> None:
        """Empty the cache of node results; a prompt that runs keeps the one it began with."""
        self._cache = {}

    def close(self) -> None:
        """Stop what runs, drop the rest, and wait for the thread."""
        self.queue.close()
        self._closing.set()
        self._thread.join()

    def _send_status(self, remaining: int) -> None:
        self._setting.hub.send("status", _status(remaining))

    def _work(self) -> None:
        while True:
            prompt = self.queue.get()
            if prompt is None:
                return
            self._run(prompt)

    def _run(self, prompt: Prompt) -> None:
        journal = self._setting.journal
        journal.change_prompt(prompt.key, status="running", started=time.monotonic())
        execution = Execution(self._setting, prompt, self._cache, self._set_executing)
        # Emptied during the prompt (POST /free), the cache stays as full as the prompt makes it.
        self._cache = execution.results
        outcome = execution.run()
        ended = time.monotonic()
        self._closing.wait(self._setting.faults.history_delay)
        self._executing = None
        if not self.queue.finish(prompt, execution.history_entry()):
            return
        execution.send("executing", {"node": None, "prompt_id": prompt.prompt_id})
        journal.change_prompt(prompt.key, status=outcome, ended=ended)

    def _set_executing(self, client_id: str | None, node_id: str) -> None:
        self._executing = (client_id, node_id)


def _status(remaining: int) -> dict[str, Any]:
    return {"status": {"exec_info": {"queue_remaining": remaining}}}
