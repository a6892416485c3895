"""Jobs: runs that outlive their request, and whose state stands in the database."""

import logging
import threading
import uuid

from django.conf import settings
from django.db import connections
from django.utils.timezone import now

from comfy_executors import ComfyExecutorsError, WorkflowCancelledError
from pictures import comfy
from pictures.answers import describe
from pictures.models import Job, Picture

logger = logging.getLogger(__name__)


def start(num_samples, **options):
    """Start a job and return it.

    Raises:
        ComfyExecutorsError: What was given cannot work; there is no job then.
    """
    job_id = uuid.uuid4()
    run = comfy.submit(
        num_samples=num_samples, output_dir=settings.MEDIA_ROOT / str(job_id), **options
    )
    try:
        job = Job.objects.create(id=job_id, num_samples=num_samples)
        # No daemon: it ends with its run, which close() cancels, and its last word is wanted.
        threading.Thread(target=_record, args=(job.id, run), name=f"job {job.id}").start()
    except BaseException:
        run.cancel()
        raise
    return job


def cancel(job_id):
    """Ask for a job to be cancelled, in whichever process it runs; tell whether it ran."""
    running = Job.objects.filter(pk=job_id, state=Job.State.RUNNING)
    return bool(running.update(cancel_requested=True))


def _record(job_id, run):
    """Write down what a run makes, until it has ended."""
    job = Job.objects.filter(pk=job_id)
    state, error = Job.State.FAILED, "Something went wrong here."
    try:
        with run:
            for result in comfy.follow(run):
                for image in result.images if result is not None else ():
                    file = image.path.relative_to(settings.MEDIA_ROOT)
                    Picture.objects.create(job_id=job_id, file=file, seed=image.seed)
                # One statement says that we live, and asks whether we shall.
                if not job.filter(cancel_requested=False).update(heartbeat=now()):
                    run.cancel()
        state, error = Job.State.DONE, ""
    except WorkflowCancelledError:
        state, error = Job.State.CANCELLED, "It was cancelled, or the server was restarted."
    except ComfyExecutorsError as failure:
        error = describe(failure)[1]
    except Exception:
        logger.exception("job %s", job_id)
    try:
        job.update(state=state, error=error)
    finally:
        connections.close_all()
