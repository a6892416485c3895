"""Jobs on RunPod that another process submitted, and the runs that take them up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from comfy_executors.errors import GraphError
from comfy_executors.graphs import Graph
from comfy_executors.runs import Batch, Job, WorkflowRun


@dataclass(eq=False)
class Attachment:
    """A job, and the run that takes it up.

    Args:
        job_id: RunPod's id of the job.
        first_batch: The number that its first batch had in the run that submitted it.
        run: The run, once it was started.
    """

    job_id: str
    first_batch: int
    run: WorkflowRun | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the run was cancelled, or its deadline has passed."""
        run = self.run
        if run is None:
            return False
        is_late = run.deadline is not None and time.monotonic() >= run.deadline
        return is_late or run.cancelled() or run.done()


@dataclass(frozen=True)
class AttachedJob(Job):
    """What an attached run works on."""

    # With a default only because those of `Job` before it have one.
    attachment: Attachment = field(default_factory=lambda: Attachment("", 0))


def unknown_graph(batch: Batch) -> Graph:
    """Stand in for a batch's graph."""
    raise GraphError("the graphs of a job that another process submitted are not known")
