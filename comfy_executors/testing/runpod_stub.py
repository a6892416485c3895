"""The RunPod stub as its users see it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable

from aiohttp import web

from comfy_executors.devserver.listener import Listener
from comfy_executors.devserver.middleware import Gate
from comfy_executors.testing.runpod_faults import RunPodFaults
from comfy_executors.testing.runpod_jobs import StubJob
from comfy_executors.testing.runpod_platform import Platform
from comfy_executors.testing.runpod_records import JobRecord, Limits
from comfy_executors.testing.runpod_routes import MAX_BODY_BYTES, Doorman, Routes
from comfy_executors.testing.stand_in import StandIn


class RunPodStub(StandIn):
    """RunPod's serverless platform on loopback, with one endpoint, in a thread of its own.

    Clients use it as they use RunPod, and workers as well: the RunPod SDK's own worker loop runs
    against it with `worker_environment()`. It runs nothing itself. What it does where RunPod's
    documents are silent, such as the answer 413 to a body that is too large, is a guess. ::

        with RunPodStub() as stub:
            worker = subprocess.Popen([sys.executable, "handler.py"],
                                      env={**os.environ, **stub.worker_environment()})
            client = RunPodClient(stub.endpoint_id, stub.api_key, stub.url)

    Args:
        port: The TCP port; 0 takes a free one.
        endpoint_id: The id of the endpoint.
        api_key: The key that clients have to send.

    Attributes:
        faults: The misbehaviour that is switched on.
        limits: The limits of the platform, to be changed at any time.
    """

    def __init__(
        self, port: int = 0, *, endpoint_id: str = "stub-endpoint", api_key: str = "stub-key"
    ) -> None:
        super().__init__(port)
        self.endpoint_id = endpoint_id
        self.api_key = api_key
        self.limits = Limits()
        self.faults = RunPodFaults(self._refuse_connections, self._look_again)
        self._prefix = f"/v2/{endpoint_id}"
        self._platform: Platform | None = None

    def _serve(self, listener: Listener) -> None:
        self._platform = Platform(listener.loop, self.limits, self.faults, self._journal)
        self._gate = Gate(self._prefix, {}, self.faults, self._journal)
        listener.start(self._application(self._platform, self._gate))

    @property
    def _refuses(self) -> bool:
        return self.faults.refuse_connections

    def _application(self, platform: Platform, gate: Gate) -> web.Application:
        doorman = Doorman(self._prefix, self.api_key, self.limits)
        app = web.Application(
            middlewares=[gate.handle, doorman.handle], client_max_size=MAX_BODY_BYTES
        )
        app.add_routes(Routes(platform, self.limits).table(self._prefix))
        return app

    @property
    def url(self) -> str:
        """The base URL, to be given to a client: `http://127.0.0.1:1234/v2`."""
        return f"http://127.0.0.1:{self._port}/v2"

    @property
    def jobs(self) -> list[JobRecord]:
        """Every job that was taken, in order, as it is now."""
        return [] if self._platform is None else self._platform.records

    @property
    def calls(self) -> Counter[str]:
        """How often each operation was called: `calls["status"]`, `calls["job-take"]`."""
        return Counter(request.path.split("/")[1] for request in self.requests)

    @property
    def executions(self) -> int:
        """How often a worker began a job."""
        return sum(job.executions for job in self.jobs)

    @property
    def stopped_workers(self) -> list[str]:
        """The workers that asked for a fresh container; they get no more jobs."""
        return [] if self._platform is None else self._platform.stopped_workers

    def worker_environment(self, worker_id: str = "worker-1") -> dict[str, str]:
        """Return the variables that make the RunPod SDK's worker loop work for this stub.

        The loop pings from a child process, which survives it when it is killed: start it in a
        session of its own and kill the whole process group.

        Args:
            worker_id: The id of the worker; each process wants its own.
        """
        base = f"{self.url}/{self.endpoint_id}"
        # The SDK appends further parameters with &, so that each URL needs a query.
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=stub",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=stub",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=stub",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=stub",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_AI_API_KEY": f"key-of-{worker_id}",
            "RUNPOD_LOG_LEVEL": "INFO",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def wait_for(self, predicate: Callable[[RunPodStub], bool], timeout: float = 10.0) -> None:
        """Wait until something holds; it is looked at whenever something happens.

        What happens: a job is taken, begins or ends, a chunk is posted or handed out, a request
        has been answered.

        Args:
            predicate: Called with the stub.
            timeout: How long to wait at most, in seconds.

        Raises:
            TimeoutError: It did not come to hold in time.
        """
        if not self._journal.wait_for(lambda: predicate(self), timeout):
            statuses = Counter(job.status for job in self.jobs)
            jobs = ", ".join(f"{count} {status}" for status, count in statuses.items()) or "none"
            raise TimeoutError(
                f"waited {timeout:g} s in vain for {_describe(predicate)}; jobs: {jobs}"
            )

    def expire(self, job_id: str) -> None:
        """Let the platform forget a job, as after its ttl or retention; KeyError for no job."""
        self._act(Platform.expire, job_id)

    def time_out(self, job_id: str) -> None:
        """End a job as if its executionTimeout had passed; KeyError for no job."""
        self._act(Platform.time_out, job_id)

    def clear(self) -> None:
        """Make the stub as good as new: no jobs, no records, no faults, and documented limits."""
        with self._lifecycle:
            self.faults.clear()
            vars(self.limits).update(vars(Limits()))
            if self._platform is not None and self._listener is not None:
                self._listener.call(_on_loop(self._platform.clear))
            self._journal.clear()

    def _act(self, action: Callable[[Platform, StubJob], None], job_id: str) -> None:
        with self._lifecycle:
            if self._listener is None or self._platform is None:
                raise RuntimeError("the stub does not run: start it, or use it in a with block")
            platform = self._platform
            job = platform.find(job_id)
            if job is None:
                raise KeyError(job_id)
            self._listener.call(_on_loop(lambda: action(platform, job)))

    def _look_again(self) -> None:
        with self._lifecycle:
            if self._listener is not None and self._platform is not None:
                self._listener.call(_on_loop(self._platform.notify))


async def _on_loop(action: Callable[[], None]) -> None:
    action()


def _describe(predicate: Callable[[RunPodStub], bool]) -> str:
    try:
        return " ".join(inspect.getsource(predicate).split())
    except (OSError, TypeError):
        return repr(predicate)
