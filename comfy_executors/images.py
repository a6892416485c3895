"""What goes into a workflow and what comes out of it."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Union

from comfy_executors.errors import InputImageError, MissingExtraError, OutputFileError
from comfy_executors.saving import safe_name, safe_subfolder, save_bytes

if TYPE_CHECKING:
    from PIL import Image

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\x00", ".tiff"),
    (b"MM\x00*", ".tiff"),
)
_KINDS = {
    "image": "png jpg jpeg jpe webp gif bmp tif tiff avif apng jxl heic ico tga exr hdr",
    "video": "mp4 webm mkv mov avi m4v mpg mpeg ogv",
    "audio": "flac mp3 wav ogg opus m4a aac",
    "text": "txt json csv md srt vtt yaml yml xml",
    "3d": "glb gltf obj ply stl fbx usdz splat spz ksplat",
}
_SHOWN_PATH = 200
# A `Path` of a URL has one slash left; Windows' drives have one letter.
_URL_START = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_URL = re.compile(
    r"(?P<scheme>[^:]+):/+(?:[^/?#]*@)?(?P<host>(?:\[[^\]]*\]|[^/?#@:]*)(?::[0-9]*)?)"
    r"(?P<path>/[^?#]*)?(?:[?#].*)?",
    re.DOTALL,
)
_KIND_OF = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}

InputImageSource = Union["InputImage", str, "os.PathLike[str]", bytes, IO[bytes], "Image.Image"]


def kind_of(name: str) -> str:
    """Tell the kind of a file by its name: image, video, audio, text, 3d or file.

    ComfyUI reports videos under `images` and custom nodes use keys of their own, so that the key
    says nothing (reference: hazard 10 of the server's description).
    """
    return _KIND_OF.get(os.path.splitext(name)[1][1:].lower(), "file")


@dataclass(frozen=True)
class InputImage:
    """An image that goes into a workflow, as bytes that are sent unchanged.

    Args:
        data: The whole file.
        name: Its name in the folder of this set of images; `0000.png` and so on by default.

    Raises:
        InputImageError: There are no bytes, or the name is no plain file name.
    """

    data: bytes = field(repr=False)
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.data, bytes):
            raise InputImageError(f"an input image needs bytes, not {type(self.data).__name__}")
        if not self.data:
            raise InputImageError(f"the input image {self.name or '(bytes)'} is empty")
        if self.name is not None and safe_name(self.name, "_") != self.name:
            raise InputImageError(f"{self.name!r} is no plain file name for an input image")

    @classmethod
    def load(cls, source: InputImageSource) -> InputImage:
        """Read an image from what a caller has at hand.

        Args:
            source: A path, the bytes of a file, a file opened for reading in binary mode, a
                Pillow image (sent as PNG), or an `InputImage`.

        Returns:
            The image; the bytes of paths, bytes and files are not re-encoded.

        Raises:
            InputImageError: It cannot be read or is nothing of these.
        """
        if isinstance(source, InputImage):
            return source
        if isinstance(source, (bytes, bytearray, memoryview)):
            return cls(bytes(source))
        if isinstance(source, (str, os.PathLike)):
            return cls(_read_path(source))
        if hasattr(source, "read"):
            return cls(_read_file(source))
        if hasattr(source, "save") and hasattr(source, "getbands"):
            return cls(_encode_png(source))
        raise InputImageError(
            f"an input image is a path, bytes, an open file or a Pillow image, "
            f"not {type(source).__name__}"
        )

    @property
    def suffix(self) -> str:
        """The file name's ending, by the content's first bytes; `.png` where they are unknown."""
        if self.data[:4] == b"RIFF" and self.data[8:12] == b"WEBP":
            return ".webp"
        return next((s for magic, s in _MAGIC if self.data.startswith(magic)), ".png")


def _read_path(path: str | os.PathLike[str]) -> bytes:
    text = os.fspath(path)
    if _URL_START.match(text) and not os.path.exists(text):
        raise InputImageError(
            f"cannot read the input image {_shown_url(text)!r}: a URL; download it, and pass its "
            "bytes"
        )
    # Whoever passes base64 text as a path should not have all of it in the error.
    shown = repr(text[:_SHOWN_PATH])
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL or a surrogate in the path
        reason = getattr(error, "strerror", None) or error
        raise InputImageError(f"cannot read the input image {shown}: {reason}") from error
    if not data:
        raise InputImageError(f"the input image {shown} is empty")
    return data


def _shown_url(url: str) -> str:
    """Leave out what may be a key: the user, the password, the query and the fragment."""
    parts = _URL.fullmatch(url)
    if parts is None or "@" in (parts["path"] or ""):  # a password with a slash in it
        return f"{url.partition(':')[0]}://…"
    return f"{parts['scheme']}://{parts['host']}{parts['path'] or ''}"[:_SHOWN_PATH]


def _read_file(file: Any) -> bytes:
    if isinstance(file, io.TextIOBase):
        raise InputImageError("an input image file must be opened in binary mode ('rb')")
    try:
        data = file.read()
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise InputImageError(f"cannot read an input image from {file!r}: {error}") from error
    if not isinstance(data, bytes):
        raise InputImageError(f"reading {file!r} gave {type(data).__name__} instead of bytes")
    if not data:
        raise InputImageError(f"{file!r} is empty, or was read to its end already")
    return data


def _encode_png(image: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="PNG")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputImageError(f"Pillow cannot save an input image as PNG: {error}") from error
    return buffer.getvalue()


class InputImageSet:
    """The input images of one run, under names that follow from their content.

    The same images get the same folder every time, so that they are uploaded once a server, and
    ComfyUI's cache recognises them in the next run.

    Args:
        sources: What `InputImage.load` takes, in order.

    Raises:
        InputImageError: One cannot be read, two have the same name, or it is no list.
    """

    has_folder = True

    def __init__(self, sources: Sequence[InputImageSource]) -> None:
        # A path is a sequence too, of letters, and an open file one of lines.
        single = isinstance(sources, (str, bytes, bytearray)) or hasattr(sources, "read")
        if single or not isinstance(sources, Iterable):
            raise InputImageError(
                f"input_images is a list of images, not one {type(sources).__name__}: "
                "write input_images=[image]"
            )
        images = [InputImage.load(source) for source in sources]
        self.files: dict[str, bytes] = {}
        digest = hashlib.sha256()
        for index, image in enumerate(images):
            name = image.name or f"{index:04d}{image.suffix}"
            if name in self.files:
                raise InputImageError(f"two input images are called {name!r}")
            self.files[name] = image.data
            digest.update(f"{name}\0{hashlib.sha256(image.data).hexdigest()}\0".encode())
        self.folder = digest.hexdigest()[:32]

    @property
    def names(self) -> list[str]:
        """The names that a `LoadImage` node takes, relative to the server's input folder."""
        return [f"{self.folder}/{name}" for name in self.files]

    def __len__(self) -> int:
        return len(self.files)


class WorkflowOutput:
    """One file or text that a node of a finished batch reported.

    Args:
        data: The bytes as the server sent them.
        name: The file's name as the server gave it.
        subfolder: Its folder below the server's output folder.
        type: ComfyUI's word for where it lies: `output`, `temp` or `input`; `websocket` for
            images that only ever existed on the websocket.
        node_id: The node that reported it.
        batch_index: The batch it belongs to, from 0.
        seed: The seed of that batch, where it has one.
        prompt_id: The prompt on the server, where there is one.
        server: The address of the server, without keys.
        cached: Whether the server answered from its cache instead of computing it.

    `path` is where it was saved last, or None.
    """

    def __init__(
        self,
        data: bytes,
        *,
        name: str,
        subfolder: str = "",
        type: str = "output",
        node_id: str | None = None,
        batch_index: int = 0,
        seed: int | None = None,
        prompt_id: str | None = None,
        server: str | None = None,
        cached: bool = False,
    ) -> None:
        self._data: bytes | None = data
        self.name = name
        self.subfolder = subfolder
        self.type = type
        self.node_id = node_id
        self.batch_index = batch_index
        self.seed = seed
        self.prompt_id = prompt_id
        self.server = server
        self.cached = cached
        self.path: Path | None = None

    @property
    def kind(self) -> str:
        """What it is, by its name: image, video, audio, text, 3d or file."""
        return kind_of(self.name)

    @property
    def data(self) -> bytes:
        """The bytes as the server sent them.

        Raises:
            OutputFileError: They were saved to `path` to keep memory small, and the file is gone.
        """
        if self._data is not None:
            return self._data
        assert self.path is not None, "bytes are only released once they are on disk"
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise OutputFileError(f"cannot read {self.path}: {error.strerror}") from error

    @property
    def text(self) -> str:
        """The bytes as UTF-8 text, for outputs that are text; what is no UTF-8 is replaced."""
        return self.data.decode("utf-8", "replace")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the bytes, whole or not at all, and never over another file.

        Args:
            path: A file name with its ending; or else a folder, where the file gets the server's
                name below the server's subfolder, made harmless. Folders are made.

        Returns:
            The path written. A taken name is counted up: `fox.png`, `fox_00001_.png`.

        Raises:
            OutputFileError: It cannot be written.
        """
        text = os.fspath(path)
        target = Path(text)
        if text.endswith(("/", os.sep)) or target.is_dir() or not target.suffix:
            target = target / safe_subfolder(self.subfolder) / safe_name(self.name, "output")
        self.path = save_bytes(self.data, target)
        return self.path

    def _save_and_release(self, folder: Path) -> None:
        """Move the bytes to disk; afterwards they are read from there when asked for."""
        self.save(os.path.join(folder, ""))
        self._data = None

    def __repr__(self) -> str:
        where = f", path={str(self.path)!r}" if self.path else ""
        return (
            f"<{type(self).__name__} {self.name!r} batch={self.batch_index} "
            f"node={self.node_id} seed={self.seed}{where}>"
        )


class WorkflowOutputImage(WorkflowOutput):
    """One image of a finished batch: a `WorkflowOutput` that Pillow can open."""

    _image: Image.Image | None = None

    @property
    def image(self) -> Image.Image:
        """The image, opened with Pillow when first asked for.

        Raises:
            MissingExtraError: Pillow is not installed.
            OutputFileError: Pillow cannot read the bytes.
        """
        if self._image is None:
            self._image = _open_image(self.data, self.name)
        return self._image

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_image", None)
        return state


def _open_image(data: bytes, name: str) -> Image.Image:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("Pillow", "pillow") from error
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # on bytes that are no image its plugins raise in many ways
        raise OutputFileError(f"Pillow cannot open {name!r}: {error}") from error
    return image
