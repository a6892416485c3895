"""From the library's errors to HTTP answers."""

import logging
from functools import wraps

from django.core.exceptions import ValidationError
from django.http import JsonResponse

from comfy_executors import (
    ComfyExecutorsError,
    ExecutorClosedError,
    GraphError,
    InputImageError,
    OutputFileError,
    ServerNotReadyError,
    ServerUnreachableError,
    TemplateError,
    WorkflowCancelledError,
    WorkflowRejectedError,
    WorkflowTimeoutError,
)

logger = logging.getLogger(__name__)

# The first that fits counts. What these errors say is for the log: it may name addresses, paths
# and models of ours.
ANSWERS = [
    (InputImageError, 400, "That image cannot be used."),
    ((TemplateError, GraphError, WorkflowRejectedError), 500, "This site is not set up correctly."),
    (WorkflowTimeoutError, 504, "It took too long."),
    (ServerUnreachableError, 503, "The image server does not answer."),
    (ServerNotReadyError, 503, "The image server is still starting."),
    ((WorkflowCancelledError, ExecutorClosedError), 503, "This server is being restarted."),
    (OutputFileError, 500, "The images could not be saved."),
    (ComfyExecutorsError, 502, "The image server failed."),
]
VALUE_PROBLEMS = {"value_smaller_than_min", "value_bigger_than_max", "invalid_input_type"}
RETRY_AFTER = "10"  # seconds


def describe(error):
    """Return the status of an error and a sentence that a client may see; log what it may not."""
    if isinstance(error, WorkflowRejectedError) and is_about_values(error):
        return 400, str(error)  # node, input, value and reason
    status, sentence = next((s, text) for kinds, s, text in ANSWERS if isinstance(error, kinds))
    logger.error("%s: %s", type(error).__name__, error)
    return status, sentence


def is_about_values(error):
    """Tell whether ComfyUI refused nothing but values that a client may have given."""
    return {problem.kind for problem in error.problems} <= VALUE_PROBLEMS and bool(error.problems)


def answers_errors(view):
    """Decorate a view so that bad forms and the library's errors become JSON answers."""

    @wraps(view)
    def wrapped(request, *args, **kwargs):
        try:
            return view(request, *args, **kwargs)
        except ValidationError as error:
            return JsonResponse({"errors": error.message_dict}, status=400)
        except ComfyExecutorsError as error:
            status, sentence = describe(error)
            headers = {"Retry-After": RETRY_AFTER} if status == 503 else {}
            return JsonResponse({"error": sentence}, status=status, headers=headers)

    return wrapped
