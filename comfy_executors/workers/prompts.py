"""Single graphs on the ComfyUI of this machine, whose outputs are told while they run."""

from __future__ import annotations

from collections.abc import Callable

from comfy_executors.executors.comfy_server import ComfyServerWorkflowExecutor
from comfy_executors.executors.plan import refuse_previews_only
from comfy_executors.graphs import check_graph
from comfy_executors.images import WorkflowOutput
from comfy_executors.runs import Batch, Job, ProgressCallback, RunOptions, WorkflowRun
from comfy_executors.wire import JobGraph, JobOptions


class GraphExecutor(ComfyServerWorkflowExecutor):
    """`ComfyServerWorkflowExecutor` for graphs that are rendered already."""

    def submit_graph(
        self,
        item: JobGraph,
        options: JobOptions,
        *,
        on_progress: ProgressCallback,
        on_output: Callable[[WorkflowOutput], object],
        comfy_org_api_key: str | None = None,
    ) -> WorkflowRun:
        """Start a graph as a run of one batch.

        Args:
            item: The graph.
            options: What goes for all batches of its job.
            on_progress: Told of its progress, on a thread of the executor.
            on_output: Given each output once it was fetched, on such a thread, too. What a prompt
                made that then failed, or was lost, is not in the result.
            comfy_org_api_key: The key for nodes that call paid services.

        Raises:
            GraphError: It is no graph, or ends in previews that nobody wants.
            ExecutorClosedError: The executor is closed.
        """
        check_graph(item.graph)
        if not options.include_previews:
            refuse_previews_only(item.graph)
        job = Job(
            (),
            include_previews=options.include_previews,
            allow_partial=options.allow_partial,
            on_output=on_output,
            extra_data={"api_key_comfy_org": comfy_org_api_key} if comfy_org_api_key else {},
        )
        run_options = RunOptions(batch_timeout=options.batch_timeout, on_progress=on_progress)
        batch = Batch(0, item.size, None, lambda _: item.graph)
        return self._start([batch], job, run_options)
