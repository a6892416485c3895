"""gunicorn studio.wsgi"""

import os

bind = os.environ.get("BIND", "127.0.0.1:8000")
# Threads, because a view waits for its picture: one thread a request that is under way.
worker_class = "gthread"
workers = 4
threads = 4
preload_app = True
# More than COMFY_TIMEOUT, so that at SIGTERM each request ends by itself, with an answer.
graceful_timeout = 130


def worker_exit(server, worker):
    """Cancel what this process still has at ComfyUI, and end its threads."""
    from pictures import comfy

    comfy.close()
