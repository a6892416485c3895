"""A Flask application: one image, or images as they finish.

Development: `flask --app flask_app run`. Production, with one thread for each waiting request:
`gunicorn --workers 4 --threads 4 'flask_app:create_app()'`.
"""

import base64
import json
import os
from pathlib import Path

from flask import Flask, Response, current_app, jsonify, request

from comfy_executors import (
    ComfyExecutorsError,
    ComfyServerWorkflowExecutor,
    ServerUnreachableError,
    TemplateError,
    WorkflowRejectedError,
    WorkflowTemplate,
    WorkflowTimeoutError,
)

ANSWERS = [  # the first that fits
    ((TemplateError, WorkflowRejectedError), 500),  # of the site, not of its clients
    (WorkflowTimeoutError, 504),
    (ServerUnreachableError, 503),
    (ComfyExecutorsError, 502),
]


def create_app(server=None):
    app = Flask(__name__)
    template = WorkflowTemplate.from_file(Path(__file__).with_name("workflow.json.jinja"))
    # It starts neither threads nor connections before there is work, and works after a fork.
    executor = ComfyServerWorkflowExecutor(server or os.environ.get("COMFYUI_URL", "localhost"))
    app.extensions["comfy"] = executor

    def submit(**options):
        return executor.submit_workflow(
            template, prompt=request.form["prompt"], timeout=120, **options
        )

    @app.post("/image")
    def image():
        [image] = submit().result()
        return Response(image.data, mimetype="image/png")

    @app.post("/stream")
    def stream():
        number = request.form.get("number", 4, int)
        run = submit(num_samples=max(1, min(number, 16)))
        response = Response(lines_of(run), mimetype="application/x-ndjson")
        # Also when the client leaves: the server sees that at the next line.
        response.call_on_close(run.cancel)
        return response

    @app.errorhandler(ComfyExecutorsError)
    def failed(error):
        status = next(status for kinds, status in ANSWERS if isinstance(error, kinds))
        current_app.logger.error("%s: %s", type(error).__name__, error)
        return jsonify(error="the images cannot be made"), status

    return app


def lines_of(run):
    """Give one line of JSON for each image; an error that comes late is a line, too."""
    try:
        for image in run:
            data = base64.b64encode(image.data).decode()
            yield json.dumps({"seed": image.seed, "png": data}) + "\n"
    except ComfyExecutorsError as error:
        current_app.logger.error("%s: %s", type(error).__name__, error)
        yield json.dumps({"error": "the images cannot be made"}) + "\n"
