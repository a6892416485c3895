"""ComfyUI, seen from this process: one executor, made when it is first needed."""

import threading
from concurrent.futures import FIRST_COMPLETED, wait
from functools import cache

from django.conf import settings
from django.core.signals import setting_changed
from django.dispatch import receiver

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    WorkflowCancelledError,
    WorkflowTemplate,
)

LOOK_AROUND = 0.5  # seconds between two looks at whether anybody still waits

_lock = threading.Lock()
_executor = None


def executor():
    """Return the executor of this process; all its threads share it."""
    global _executor
    with _lock:
        if _executor is None:
            _executor = ComfyServerWorkflowExecutor(settings.COMFY_SERVER, **settings.COMFY_OPTIONS)
        return _executor


@cache
def template(path):
    """Return the workflow template, read once a process."""
    return WorkflowTemplate.from_file(path)


def submit(**options):
    """Start a run of the site's workflow and return it at once."""
    return executor().submit_workflow(
        template(settings.COMFY_TEMPLATE), timeout=settings.COMFY_TIMEOUT, **options
    )


def follow(run):
    """Yield the result of each batch when it is there, and None whenever time has passed.

    At each None the caller can look around: is the client still there, was the job cancelled?
    """
    pending = set(run.futures)
    while pending:
        done, pending = wait(pending, LOOK_AROUND, return_when=FIRST_COMPLETED)
        if not done:
            yield None
        for future in done:
            if future.cancelled():  # before it had begun
                raise WorkflowCancelledError("the run was cancelled")
            yield future.result()


def close():
    """Cancel what this process has at ComfyUI, and end the threads; later requests get a 503."""
    with _lock:
        closing = _executor
    if closing is not None:
        closing.close(cancel=True)


@receiver(setting_changed)
def _forget_executor(*, setting, **_):
    """In tests that override settings: the next call makes a new one."""
    global _executor
    if setting.startswith("COMFY_"):
        close()
        _executor = None
