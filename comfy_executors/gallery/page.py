"""The page of a gallery: read from a folder, and written into it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2

from comfy_executors.errors import OutputFileError
from comfy_executors.gallery.model import Batch, File, Run, run_from_json, run_to_json

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "index.html"

_HERE = Path(__file__).parent
_GENERATOR = '<meta name="generator" content="comfy-executors gallery">'
_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def read_page(folder: Path) -> list[Run]:
    """Read what the gallery in a folder has, without what is not on the disk any more.

    Returns:
        Its runs, the newest first; none where there is no gallery yet.

    Raises:
        OutputFileError: There is an index.html that is no gallery, or it cannot be read.
    """
    path = folder / FILE_NAME
    try:
        text = path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputFileError(f"cannot read {path}: {error.strerror}") from error
    found = _DATA.search(text) if _GENERATOR in text else None
    try:
        runs = [run_from_json(run) for run in json.loads(found[1] if found else "")]
    except (ValueError, TypeError, KeyError) as error:
        raise OutputFileError(
            f"{path} is no gallery of comfy-executors, and would be lost: choose another folder"
        ) from error
    return [run for run in runs if _keep(run, lambda file: (folder / file.path).is_file())]


def write_page(folder: Path, run: Run) -> Path:
    """Put a run into the gallery of a folder, above those that are there.

    Args:
        folder: The folder, in which the run's files lie.
        run: The run. One that is there under its id is replaced.

    Returns:
        The page.

    Raises:
        OutputFileError: It cannot be read or written, or is no gallery.
    """
    path = folder / FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two runs that end at once would read the same page, and one of them be lost.
        with _locked(folder / f".{FILE_NAME}.lock"):
            _replace(path, _render(_with_run(read_page(folder), run)))
    except OSError as error:
        raise OutputFileError(f"cannot write {path}: {error.strerror}") from error
    return path


def _with_run(there: list[Run], run: Run) -> list[Run]:
    new = {file.path for batch in run.batches for file in batch.files}
    others = [other for other in there if other.id != run.id]
    return [run, *(other for other in others if _keep(other, lambda file: file.path not in new))]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        # What UTF-8 does not have, such as half a surrogate pair, is shown as what it is not.
        temporary.write_text(text, "utf-8", "xmlcharrefreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes and threads wait for; its file is gone afterwards."""
    if fcntl is None:
        yield
        return
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            # Some network file systems have no locks.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # Who held it has removed its file: another one is locked by now, or none.
            if not _is_at(path, file):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _keep(run: Run, wanted: Callable[[File], bool]) -> bool:
    """Leave out the files that are not wanted; tell whether anything of the run is left."""
    for batch in run.batches:
        batch.files = [file for file in batch.files if wanted(file)]
    run.batches = [batch for batch in run.batches if batch.files or batch.error]
    return bool(run.batches)


def _render(runs: list[Run]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters.update(url=_url, shown=shown, label=_label, counted=_counted)
    style = (_HERE / "style.css").read_text("utf-8")
    script = (_HERE / "script.js").read_text("utf-8")
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        data=[run_to_json(run) for run in runs],
        first_failed=next((run for run in runs if run.failures), None),
        failures=sum(len(run.failures) for run in runs),
        style=style,
        script=script,
        policy=_policy(style, script),
    )


def _policy(style: str, script: str) -> str:
    """Allow the page's own script and style and the files beside it, and nothing else."""
    beside = "'self' file: blob:"
    parts = {
        "default-src": "'none'",
        "img-src": beside,
        "media-src": beside,
        "style-src": _hash(style),
        "script-src": _hash(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _url(path: str) -> str:
    """Make a relative URL of a path; nothing in it can be taken for a scheme or a query."""
    return urllib.parse.quote(path.encode("utf-8", "surrogateescape"), safe="/")


def shown(value: Any) -> str:
    """Write a variable's value for people: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _counted(runs: list[Run]) -> str:
    files = [file for run in runs for batch in run.batches for file in batch.files]
    noun = "image" if all(file.kind == "image" for file in files) else "file"
    return f"1 {noun}" if len(files) == 1 else f"{len(files)} {noun}s"


def _label(file: File, batch: Batch) -> str:
    """Say what is behind a thumbnail, for those who cannot see it."""
    name = PurePosixPath(file.path).name
    seed = "" if batch.seed is None else f", seed {batch.seed}"
    return f"{name}: {batch.name}{seed}"
