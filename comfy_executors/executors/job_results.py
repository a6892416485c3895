"""What a job of several batches makes, put together from its events."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Union

from comfy_executors.clients.http import Waiter
from comfy_executors.errors import (
    ComfyExecutorsError,
    JobOutputLostError,
    ServerResponseError,
)
from comfy_executors.executors.control import JobControl
from comfy_executors.executors.side_by_side import side_by_side
from comfy_executors.images import WorkflowOutput, WorkflowOutputImage, kind_of
from comfy_executors.runs import Batch, BatchFailure, BatchResult, ProgressEvent
from comfy_executors.wire import (
    Assembler,
    CompleteBatch,
    Failed,
    News,
    Progress,
    WholeOutput,
    is_of_unknown_kind,
)

logger = logging.getLogger(__name__)

Settled = Union[BatchResult, BatchFailure]

_FETCHES = 3  # of an output whose bytes come broken


class JobResults:
    """Takes a job's events, and gives each batch's result or failure once.

    Events of kinds that are not known are passed over: a newer worker may tell more.

    Args:
        control: Who is told of progress.
        batches: The batches by their number in the job.
        server: The address of the backend, without keys.
        fetch: Gets an output that its event only names, on any thread; None where it is gone for
            good.
        output_dir: Where outputs are saved as they come, if anywhere.

    Attributes:
        job_id: The backend's id of the job, once it has one.
        started: Whether a worker of ours said anything.
    """

    def __init__(
        self,
        control: JobControl,
        batches: Mapping[int, Batch],
        server: str,
        fetch: Callable[[WholeOutput, Waiter], bytes | None],
        output_dir: Path | None = None,
    ) -> None:
        self._control = control
        self._batches = batches
        self._server = server
        self._fetch = fetch
        self._output_dir = output_dir
        self._assembler = Assembler(batches, keeps_data=False)
        self._made: dict[int, dict[int, WorkflowOutput]] = {}  # of batches that are not complete
        self._lost: list[str] = []
        self._told_of_others = False
        self._told_of_unknown = False
        self.job_id: str | None = None
        self.started = False

    @property
    def unsettled(self) -> tuple[int, ...]:
        """The batches that are neither complete nor failed."""
        return self._assembler.unsettled

    @property
    def error(self) -> ComfyExecutorsError | None:
        """The error of the whole job, if the worker told one."""
        error = self._assembler.job_error
        return None if error is None else self.name_job(error)

    def missing(self) -> list[str]:
        """Name what has not come, or was lost on the way."""
        return [*self._lost, *map(str, self._assembler.missing())]

    def lost(self, how: str) -> JobOutputLostError:
        """Make the error that names what is missing.

        Args:
            how: What became of the job, such as `ended, and its stream lost`.
        """
        missing = self.missing()
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" * (len(missing) > 5))
        return JobOutputLostError(f"{how} {shown}", job_id=self.job_id, server=self._server)

    def take(self, events: Iterable[Any]) -> Iterator[Settled]:
        """Take the events of one answer, and yield what becomes of batches by them.

        Outputs that the events only name are fetched a few at a time; they count in order.

        Raises:
            ServerResponseError: One is no event, or as `fetch` does.
            OutputFileError: An output cannot be saved.
        """
        news: list[News] = []
        for event in events:
            try:
                added = self._add(event)
            except ServerResponseError:
                yield from self._hear_all(news)
                raise
            news += added
            # What is only named waits for more of its kind; with bytes it would take memory.
            if any(isinstance(item, WholeOutput) and item.data is not None for item in added):
                yield from self._hear_all(news)
                news = []
        yield from self._hear_all(news)

    def _add(self, event: Any) -> list[News]:
        if is_of_unknown_kind(event):
            self._tell_of_unknown(event["kind"])
            return []
        news = self._assembler.add(event)
        self._tell_of_others(event.get("batch"))
        # The event that says so may be lost, and any other shows it as well.
        self.started = self.started or bool(event)
        return news

    def _tell_of_others(self, number: Any) -> None:
        if self._told_of_others or not isinstance(number, int) or number in self._batches:
            return
        self._told_of_others = True
        logger.warning(
            "job %s has a batch %d, which this run was not asked for: what it makes is not taken; "
            "attach() takes num_batches= and first_batch=",
            self.job_id,
            number,
        )

    def _tell_of_unknown(self, kind: str) -> None:
        if not self._told_of_unknown:
            self._told_of_unknown = True
            logger.info("job %s told of %.40r, which this version does not know", self.job_id, kind)

    def discard(self) -> None:
        """Remove what was saved of batches that are not complete."""
        for batch in list(self._made):
            self._discard(batch)

    def name_job(self, error: ComfyExecutorsError) -> ComfyExecutorsError:
        """Write the job's id on an error."""
        error.job_id = error.job_id or self.job_id
        return error

    @contextlib.contextmanager
    def naming_job(self) -> Iterator[None]:
        """Write the job's id on every error of ours that leaves the block."""
        try:
            yield
        except ComfyExecutorsError as error:
            self.name_job(error)
            raise

    def tell(self, kind: str, number: int, **facts: Any) -> None:
        """Tell of a batch's progress, with the job's id."""
        index = self._batches[number].index
        self._control.progress(ProgressEvent(kind, index, job_id=self.job_id, **facts))

    def _hear_all(self, news: Sequence[News]) -> Iterator[Settled]:
        calls = [
            partial(self._fetch_whole, item)
            for item in news
            if isinstance(item, WholeOutput) and item.data is None
        ]
        with contextlib.closing(side_by_side(calls, self._control)) as fetched:
            for item in news:
                yield from self._hear(item, fetched)

    def _hear(self, news: News, fetched: Iterator[bytes | None]) -> Iterator[Settled]:
        if isinstance(news, Progress):
            if news.event.kind != "queued":  # which it was on the backend
                self.tell(number=news.batch, **vars(news.event))
        elif isinstance(news, WholeOutput):
            # In order and on this thread, while others are fetched and made.
            self._keep(news, news.data if news.data is not None else next(fetched))
        elif isinstance(news, Failed) and news.batch is not None:
            self._discard(news.batch)
            yield BatchFailure(self._batches[news.batch].index, self.name_job(news.error))
        elif isinstance(news, CompleteBatch):
            yield from self._result(news)

    def _keep(self, whole: WholeOutput, data: bytes | None) -> None:
        if data is None:
            self._lost.append(f"{whole.name} of batch {whole.batch}")
            return
        output = self._output(whole, data)
        if self._output_dir is not None:
            output._save_and_release(self._output_dir)
        self._made.setdefault(whole.batch, {})[whole.output] = output

    def _fetch_whole(self, whole: WholeOutput, waiter: Waiter) -> bytes | None:
        for _ in range(_FETCHES):
            data = self._fetch(whole, waiter)
            if data is None or whole.matches(data):
                return data
            logger.warning("%s of job %s came broken", whole.name, self.job_id)
        return None

    def _discard(self, batch: int) -> None:
        for output in self._made.pop(batch, {}).values():
            if output.path is not None:
                output.path.unlink(missing_ok=True)

    def _result(self, complete: CompleteBatch) -> Iterator[BatchResult]:
        made = self._made.get(complete.batch, {})
        if any(whole.output not in made for whole in complete.outputs):
            return  # it could not be fetched
        # What else there is was made by another attempt, and is not part of this one.
        outputs = [made.pop(whole.output) for whole in complete.outputs]
        for output in outputs:
            output.prompt_id = complete.prompt_id
        batch = self._batches[complete.batch]
        images = [output for output in outputs if isinstance(output, WorkflowOutputImage)]
        yield BatchResult(
            batch.index,
            images,
            [output for output in outputs if not isinstance(output, WorkflowOutputImage)],
            seed=batch.seed,
            prompt_id=complete.prompt_id,
            server=self._server,
            job_id=self.job_id,
        )

    def _output(self, whole: WholeOutput, data: bytes) -> WorkflowOutput:
        batch = self._batches[whole.batch]
        is_image = kind_of(whole.name) == "image"
        return (WorkflowOutputImage if is_image else WorkflowOutput)(
            data,
            name=whole.name,
            subfolder=whole.subfolder,
            type=whole.type,
            node_id=whole.node,
            batch_index=batch.index,
            seed=batch.seed,
            server=self._server,
            cached=whole.cached,
        )
