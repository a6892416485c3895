"""Celery tasks: `celery -A celery_tasks worker --concurrency 4`.

The executor is made in the parent and used in the children that Celery forks: each gets threads
and connections of its own when its first task runs.
"""

import os
from pathlib import Path

from celery import Celery
from celery.signals import worker_process_shutdown

from comfy_executors import (
    ComfyServerWorkflowExecutor,
    ServerUnreachableError,
    WorkflowTemplate,
)

app = Celery("celery_tasks")
app.config_from_object(os.environ.get("CELERY_SETTINGS", "celery_settings"))

executor = ComfyServerWorkflowExecutor(os.environ.get("COMFYUI_URL", "localhost:8188"))
template = WorkflowTemplate.from_file(Path(__file__).with_name("workflow.json.jinja"))


@app.task(bind=True, autoretry_for=(ServerUnreachableError,), max_retries=3, retry_backoff=True)
def make_images(self, prompt, num_samples, folder):
    """Make images, save them below a folder, and return their paths and seeds.

    When nobody answers it is tried again later. What a node or the template got wrong is not: it
    would fail again.
    """
    # Leaving the block cancels what is not done, as at a soft time limit.
    with executor.submit_workflow(
        template,
        num_samples=num_samples,
        prompt=prompt,
        timeout=600,
        output_dir=os.path.join(folder, self.request.id),
    ) as run:
        return [{"path": str(image.path), "seed": image.seed} for image in run]


@worker_process_shutdown.connect
def close_executor(**_):
    executor.close(cancel=True)
