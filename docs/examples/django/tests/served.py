"""The site under a real gunicorn, in a process of its own."""

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import requests

ROOT = Path(__file__).parent.parent
WORKERS = 4
STOP_SECONDS = 60

# The site's configuration, a word from each worker that is ready, and a note of the threads that
# are left when it ends.
CONFIGURATION = """
import json, os, runpy, threading

globals().update(runpy.run_path({conf!r}))
end_of_site = worker_exit

def post_worker_init(worker):
    worker.log.info("ready")

def worker_exit(server, worker):
    end_of_site(server, worker)
    for thread in threading.enumerate():
        if thread.name.startswith("job "):
            thread.join(20)
    with open(os.path.join({folder!r}, f"{{os.getpid()}}.threads"), "w") as file:
        json.dump([thread.name for thread in threading.enumerate()], file)
"""


class Visitor(requests.Session):
    """A client that has visited the page, and got its CSRF token."""

    def __init__(self, url):
        super().__init__()
        self.url = url
        self.get(url, timeout=60).raise_for_status()
        self.headers["X-CSRFToken"] = self.cookies["csrftoken"]

    def begin(self, path, form):
        """Post a form and wait for nothing; closing the connection that it returns is leaving."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        token = self.cookies["csrftoken"]
        headers = {
            "Content-Type": "application/x-www-form-urlencoded",
            "X-CSRFToken": token,
            "Cookie": f"csrftoken={token}",
        }
        connection.request("POST", path, urlencode(form), headers)
        return connection


@dataclass
class Site:
    """A running site."""

    url: str
    folder: Path
    log: Path
    process: subprocess.Popen

    def visitor(self):
        """Return a client that has the page's CSRF token."""
        return Visitor(self.url)

    def stop(self, number=signal.SIGTERM):
        """Stop it as a service manager does, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def gunicorn(folder, comfyui, database, **environment):
    """Serve the site until the block ends."""
    environment = {
        **os.environ,
        "BIND": "127.0.0.1:0",
        "HOME": str(folder),  # where gunicorn has its control socket
        "COMFYUI_URL": comfyui.address,
        "DATABASE_PATH": str(database),
        "MEDIA_ROOT": str(folder / "media"),
        "DJANGO_SETTINGS_MODULE": "studio.settings",
        **environment,
    }
    conf = folder / "gunicorn.conf.py"
    conf.write_text(
        CONFIGURATION.format(conf=str(ROOT / "gunicorn.conf.py"), folder=str(folder)), "utf-8"
    )
    log = folder / "gunicorn.log"
    command = [sys.executable, "-m", "gunicorn", "-c", str(conf), "studio.wsgi"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
    try:
        yield Site(address_in(log, process), folder, log, process)
    finally:
        process.kill()
        process.wait()


def address_in(log, process):
    """Wait until all workers are ready, and return where gunicorn listens.

    One that is told to stop before it is ready may miss that.
    """
    while process.poll() is None:
        said = log.read_text("utf-8")
        if said.count("] ready") == WORKERS:
            return re.search(r"Listening at: (\S+)", said)[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text("utf-8"))
