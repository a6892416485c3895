"""The state of a RunPod endpoint in words."""

from __future__ import annotations

from comfy_executors.clients.runpod_answers import RunPodHealth


def describe(health: RunPodHealth) -> str:
    """Put the state of an endpoint into a sentence, with what to do about it."""
    workers, waiting = health.workers, health.jobs.in_queue
    if workers.unhealthy:
        why = f"{_workers(workers.unhealthy)} unhealthy: look at their logs on RunPod"
    elif workers.running:
        why = f"{_workers(workers.running)} busy: raise the endpoint's max workers, or wait"
    elif workers.initializing:
        why = f"{_workers(workers.initializing)} starting: a cold start loads the image first"
    elif workers.throttled:
        why = (
            f"{_workers(workers.throttled)} throttled: RunPod has no free GPU of this kind, "
            "allow other kinds or data centres"
        )
    elif workers.idle or workers.ready:
        why = f"{_workers(max(workers.idle, workers.ready))} idle and should take one soon"
    else:
        why = "there are no workers: is the endpoint's max workers above 0?"
    return f"{waiting} {'job waits' if waiting == 1 else 'jobs wait'}, and {why}"


def _workers(count: int) -> str:
    return f"{count} {'worker is' if count == 1 else 'workers are'}"
