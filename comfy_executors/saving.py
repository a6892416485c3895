"""Writing files that nobody can make us regret: safe names, atomic, never over another file."""

from __future__ import annotations

import errno
import os
import re
import shutil
import unicodedata
import uuid
from pathlib import Path, PurePosixPath

from comfy_executors.errors import OutputFileError

_MAX_NAME_BYTES = 200  # file systems allow 255; the rest is for the counter and the temporary name
_MAX_SUFFIX = 16
_MAX_DEPTH = 8
_UNSAFE = frozenset('<>:"|?*')
# Controls, marks that turn the direction of writing, surrogates, separators of lines.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\.|$)", re.IGNORECASE
)
_COUNTED = re.compile(r"(?P<prefix>.*)_(?P<counter>[0-9]{5,})_?", re.DOTALL)
# What a file system answers that has no hard links.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EXDEV}


def safe_name(name: str, default: str) -> str:
    """Make one harmless file name of a name that came from outside.

    Args:
        name: The name as a server or a user gave it; folders in it are dropped.
        default: What to use where nothing harmless is left.

    Returns:
        A name without separators, control characters and reserved words, which is not hidden and
        has 200 bytes at most.
    """
    last = re.split(r"[\\/]", name)[-1]
    last = "".join("_" if _is_unsafe(letter) else letter for letter in last).strip().rstrip(". ")
    if not last.strip("._ "):
        return default
    # A leading dot hides a file, and makes some of them mean something: `.htaccess`.
    if last.startswith(".") or _RESERVED.match(last):
        last = f"_{last}"
    return _shorten(last)


def _is_unsafe(letter: str) -> bool:
    return letter in _UNSAFE or unicodedata.category(letter) in _UNSAFE_CATEGORIES


def safe_subfolder(subfolder: str) -> PurePosixPath:
    """Make a relative folder of one that came from outside; it never leads upwards or elsewhere."""
    parts = [part for part in re.split(r"[\\/]", subfolder) if part.strip(". ")]
    return PurePosixPath(*(safe_name(part, "_") for part in parts[:_MAX_DEPTH]))


def _shorten(name: str) -> str:
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    stem, suffix = os.path.splitext(name)
    if len(suffix) > _MAX_SUFFIX:
        stem, suffix = name, ""
    room = _MAX_NAME_BYTES - len(suffix.encode())
    return stem.encode()[:room].decode("utf-8", "ignore").rstrip(". ") + suffix


def save_bytes(data: bytes, target: Path) -> Path:
    """Write a file so that it is there whole or not at all, and never over another one.

    A taken name is counted up as ComfyUI does: `fox.png`, `fox_00001_.png`, `fox_00002_.png`.

    Args:
        data: The content.
        target: The file; folders above it are made.

    Returns:
        The path written, which differs from `target` where that name was taken.

    Raises:
        OutputFileError: The file cannot be written (no permission, no space, a file in the way).
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".saving-{uuid.uuid4().hex}"
        try:
            _write_through(temporary, data)
            return _publish(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL or a surrogate in the path
        reason = getattr(error, "strerror", None) or error
        raise OutputFileError(f"cannot save {str(target)!r}: {reason}") from error


def write_whole(data: bytes, target: Path, *, over: bool) -> None:
    """Write a file so that it is there whole or as it was before.

    Args:
        data: The content.
        target: The file.
        over: Whether to write over one that is there.

    Raises:
        FileExistsError: It is there, and `over` is off.
        OSError: It cannot be written.
    """
    if over and target.exists() and not target.is_file():
        target.write_bytes(data)  # a pipe or a device, which must not be replaced
        return
    target = Path(os.path.realpath(target))  # what a symbolic link leads to, not the link
    temporary = target.parent / f".saving-{uuid.uuid4().hex}"
    try:
        _write_through(temporary, data)
        if over:
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
        elif not _claim(temporary, target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    finally:
        temporary.unlink(missing_ok=True)


def _write_through(path: Path, data: bytes) -> None:
    # os.open lets the umask decide on the mode, which the tempfile module does not.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        # Without it a power cut can leave an empty file under the final name.
        os.fsync(file.fileno())


def _publish(temporary: Path, target: Path) -> Path:
    """Give the temporary file its final name, or the next free one."""
    while True:
        if not os.path.lexists(target) and _claim(temporary, target):
            return target
        target = next_free(target)


def _claim(temporary: Path, target: Path) -> bool:
    """Take one name if it is free, in one step that two processes cannot both win."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _claim_without_links(temporary, target)
    return True


def _claim_without_links(temporary: Path, target: Path) -> bool:
    guard = target.parent / f".claim-{target.name}"
    try:
        os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    try:
        if os.path.lexists(target):
            return False
        os.replace(temporary, target)
        return True
    finally:
        guard.unlink()


def next_free(target: Path) -> Path:
    """Count a taken name up, as ComfyUI does: find a free number whose predecessor is taken.

    By doubling the step and halving it again: listing the folder for each file, as ComfyUI does,
    would take minutes for ten thousand.
    """
    counted = _COUNTED.fullmatch(target.stem)
    prefix = counted["prefix"] if counted else target.stem
    taken = int(counted["counter"]) if counted else 0

    def numbered(number: int) -> str:
        return os.path.join(target.parent, f"{prefix}_{number:05d}_{target.suffix}")

    step = 1
    while os.path.lexists(numbered(taken + step)):
        taken += step
        step *= 2
    while step > 1:
        step //= 2
        if os.path.lexists(numbered(taken + step)):
            taken += step
    return Path(numbered(taken + 1))
