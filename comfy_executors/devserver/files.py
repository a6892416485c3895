"""The server's folders: safe names, numbered output files, uploads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

FOLDER_TYPES = ("input", "output", "temp")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")


class UnsafePathError(ValueError):
    """Raised when a name from outside leads out of the folder it belongs to."""


class Folders:
    """The input, output and temp folders below one directory.

    Args:
        root: The directory; the folders are made when they are missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        for name in FOLDER_TYPES:
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._lock = Lock()
        self._counters: dict[tuple[str, str], _FolderCounters] = {}

    def path(self, folder_type: str) -> Path:
        """Return the folder of a type: `input`, `output` or `temp`."""
        return self.root / folder_type

    def resolve(self, folder_type: str, *parts: str) -> Path:
        """Return the path of a file or folder inside one of the folders.

        Raises:
            UnsafePathError: The path leads out of the folder, or no file can have this name.
        """
        return inside(self.path(folder_type), *parts)

    def input_images(self) -> list[str]:
        """Return the names that a `LoadImage` node offers: images directly in the input folder."""
        names = (path.name for path in self.path("input").iterdir() if path.is_file())
        return sorted(name for name in names if name.lower().endswith(_IMAGE_SUFFIXES))

    def annotated(self, name: str) -> Path:
        """Return the path of an input, for names such as `a.png` and `sub/a.png [output]`.

        Raises:
            UnsafePathError: The path leads out of its folder.
        """
        match = re.fullmatch(r"(.*) \[(input|output|temp)\]", name, re.DOTALL)
        if match:
            return self.resolve(match[2], match[1])
        return self.resolve("input", name)

    def write(self, folder_type: str, prefix: str, data: bytes, suffix: str) -> dict[str, str]:
        """Write a file under the next free number of its prefix.

        Args:
            folder_type: `output` or `temp`.
            prefix: The name before the number, possibly with folders: `run/ComfyUI`.
            data: The contents.
            suffix: What follows the number: `_.png`.

        Returns:
            The file as ComfyUI reports it: filename, subfolder, type.

        Raises:
            UnsafePathError: The prefix leads out of the folder.
        """
        subfolder, name = os.path.split(os.path.normpath(prefix))
        with self._lock:
            counters = self._counters_of(folder_type, subfolder)
            filename = counters.write(name, data, suffix)
        return {"filename": filename, "subfolder": subfolder, "type": folder_type}

    def _counters_of(self, folder_type: str, subfolder: str) -> _FolderCounters:
        # Checking a path costs more than writing a small file to it.
        key = (folder_type, subfolder)
        if key not in self._counters:
            self._counters[key] = _FolderCounters(self.resolve(folder_type, subfolder))
        return self._counters[key]

    def store_upload(
        self, folder_type: str, subfolder: str, name: str, data: bytes, overwrite: bool
    ) -> str:
        """Store an upload and return its name, which differs when another file has that name.

        Raises:
            UnsafePathError: The path leads out of the folder.
        """
        folder = self.resolve(folder_type, subfolder)
        target = inside(folder, name)
        if target == folder:
            raise UnsafePathError(f"{name!r} is no name for a file")
        with self._lock:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not overwrite:
                target = next(path for path in _renamed(target) if _is_free_or_same(path, data))
            target.write_bytes(data)
        return target.name

    def empty(self) -> None:
        """Remove every file and folder inside the three folders."""
        with self._lock:
            self._counters.clear()
            for name in FOLDER_TYPES:
                _remove_children(self.path(name))


class _FolderCounters:
    """The next free number of each prefix in one folder.

    Scanning a folder of thousands of files for each new one would make saving slow; the numbers
    are remembered for as long as nobody else changes the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modified = -1
        self._next: dict[str, int] = {}

    def write(self, prefix: str, data: bytes, suffix: str) -> str:
        refuse_control_characters(prefix)
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
        if os.stat(self._folder).st_mtime_ns != self._modified:
            self._next.clear()
        while True:
            number = self._next.get(prefix) or self._scan(prefix)
            name = f"{prefix}_{number:05}{suffix}"
            try:
                # Never through a link, and never over a file: somebody else may have made it.
                with open(self._folder / name, "xb", buffering=0) as file:
                    file.write(data)
            except FileExistsError:
                self._next.pop(prefix, None)
                continue
            self._next[prefix] = number + 1
            self._modified = os.stat(self._folder).st_mtime_ns
            return name

    def _scan(self, prefix: str) -> int:
        # One count for all kinds of files: the server numbers x_00001_.webp, then x_00002_.png.
        pattern = re.compile(re.escape(prefix) + r"_(\d+)(?:[_.].*)?", re.DOTALL)
        matches = (pattern.fullmatch(name) for name in os.listdir(self._folder))
        return max((int(match[1]) for match in matches if match), default=0) + 1


def inside(folder: Path, *parts: str) -> Path:
    """Return `folder` joined with the parts, which may not lead out of it.

    Raises:
        UnsafePathError: They do, or no file can have this name.
    """
    for part in parts:
        refuse_control_characters(part)
    path = Path(os.path.normpath(folder.joinpath(*parts)))
    if path != folder and folder not in path.parents:
        raise UnsafePathError(f"{os.path.join('', *parts)!r} leads out of its folder")
    # A link inside the folder may point out of it.
    real = Path(os.path.realpath(path))
    root = Path(os.path.realpath(folder))
    if real != root and root not in real.parents:
        raise UnsafePathError(f"{os.path.join('', *parts)!r} leads out of its folder")
    return path


def refuse_control_characters(name: str) -> None:
    """Raise `UnsafePathError` for a name that no file should have."""
    if any(ord(letter) < 32 for letter in name):
        raise UnsafePathError("a name contains a control character")


def _renamed(path: Path) -> Iterator[Path]:
    yield path
    number = 1
    while True:
        yield path.with_name(f"{path.stem} ({number}){path.suffix}")
        number += 1


def _is_free_or_same(path: Path, data: bytes) -> bool:
    return not path.exists() or (path.is_file() and path.read_bytes() == data)


def _remove_children(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            _remove_children(child)
            child.rmdir()
        else:
            child.unlink()
