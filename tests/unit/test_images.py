"""What goes in and what comes out: sources of input images, names, saving, opening, pickling."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comfy_executors import (
    InputImage,
    InputImageError,
    OutputFileError,
    WorkflowOutput,
    WorkflowOutputImage,
)
from comfy_executors.images import InputImageSet, kind_of

_PNG = b"\x89PNG\r\n\x1a\nnot really"


def _encoded(image_format: str, size: tuple[int, int] = (3, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, image_format)
    return buffer.getvalue()


def _output(data: bytes = _PNG, name: str = "a.png", **facts: Any) -> WorkflowOutputImage:
    return WorkflowOutputImage(data, name=name, **facts)


# Kinds.


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "image"),
        ("a.b.JPEG", "image"),
        ("clip.mp4", "video"),
        ("clip.webm", "video"),
        ("clip.webp", "image"),
        ("song.flac", "audio"),
        ("notes.txt", "text"),
        ("mesh.glb", "3d"),
        ("data.bin", "file"),
        ("png", "file"),
        (".png", "file"),
        ("", "file"),
    ],
)
def test_the_name_tells_the_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    assert WorkflowOutput(b"", name=name).kind == kind


# Sources of input images.


class _PathLike:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize("kind", ["path", "str", "PathLike", "file", "pipe"])
def test_files_go_in_unchanged(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(_PNG)
    with path.open("rb") as file, path.open("rb", buffering=0) as pipe:
        source = {
            "path": path,
            "str": str(path),
            "PathLike": _PathLike(path),
            "file": file,
            "pipe": pipe,
        }[kind]
        assert InputImage.load(source).data == _PNG  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [_PNG, bytearray(_PNG), memoryview(_PNG), io.BytesIO(_PNG)])
def test_bytes_go_in_unchanged(source: Any) -> None:
    assert InputImage.load(source).data == _PNG


@given(st.binary(min_size=1, max_size=2000))
def test_any_bytes_go_in_unchanged(data: bytes) -> None:
    assert list(InputImageSet([data]).files.values()) == [data]


def test_an_input_image_stays_itself() -> None:
    image = InputImage(_PNG, name="mask.png")
    assert InputImage.load(image) is image


def test_a_bytearray_may_change_afterwards() -> None:
    source = bytearray(_PNG)
    image = InputImage.load(source)  # type: ignore[arg-type]
    source[:] = b"else"
    assert image.data == _PNG


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "I;16"])
def test_a_pillow_image_goes_in_as_png(mode: str) -> None:
    source = Image.new(mode, (5, 4))
    image = InputImage.load(source)
    opened = Image.open(io.BytesIO(image.data))
    assert (opened.format, opened.size, opened.mode) == ("PNG", (5, 4), mode)
    assert image.suffix == ".png"


def test_a_pillow_image_that_png_does_not_know_is_refused() -> None:
    with pytest.raises(InputImageError, match=r"Pillow cannot save .* CMYK"):
        InputImage.load(Image.new("CMYK", (2, 2)))


def test_a_truncated_pillow_image_is_refused() -> None:
    half = _encoded("JPEG", (300, 300))[:700]
    with pytest.raises(InputImageError, match=r"Pillow cannot save .*truncated"):
        InputImage.load(Image.open(io.BytesIO(half)))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", r"\(bytes\) is empty"),
        (io.BytesIO(), "is empty, or was read to its end already"),
        (io.StringIO("text"), r"must be opened in binary mode \('rb'\)"),
        ("missing.png", "'missing.png': No such file or directory"),
        ("", "Is a directory"),
        (Path(), "'.': Is a directory"),
        ("a\0b", "embedded null"),
        ("x" * 5000, "x': File name too long"),
        ("https://example.com/a.png", "download it, and pass its bytes"),
        (None, "not NoneType"),
        (17, "not int"),
        ({"data": b"x"}, "not dict"),
        (["a.png"], "not list"),
    ],
)
def test_what_is_no_image_is_refused(source: Any, reason: str) -> None:
    with pytest.raises(InputImageError, match=reason) as caught:
        InputImage.load(source)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:SECRET@host:8443/a/b.png", "https://host:8443/a/b.png"),
        ("https://SECRET@[::1]:80/b.png", "https://[::1]:80/b.png"),
        ("https://host/b.png?X-Amz-Signature=SECRET", "https://host/b.png"),
        ("s3://key:SECRET@bucket?a=b/SECRET#SECRET", "s3://bucket"),
        ("https://host/b.png#SECRET", "https://host/b.png"),
        ("https://u:SEC/SECRET@host/b.png", "https://…"),
        ("https://u:12/SECRET@host/b.png", "https://…"),
        (Path("https://u:SECRET@host/b.png"), "https://host/b.png"),
    ],
)
def test_keys_in_a_url_are_not_shown(url: str | Path, shown: str) -> None:
    with pytest.raises(InputImageError) as caught:
        InputImage.load(url)
    assert str(caught.value) == (
        f"cannot read the input image {shown!r}: a URL; download it, and pass its bytes"
    )
    assert caught.value.__context__ is None


def test_a_path_that_looks_like_a_url_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    Path("s3:/a.png").write_bytes(_PNG)
    assert InputImage.load("s3:/a.png").data == _PNG


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputImageError, match=r"empty\.png' is empty"):
        InputImage.load(tmp_path / "empty.png")


def test_a_closed_file_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO(_PNG)
    file.close()
    with pytest.raises(InputImageError, match="closed file"):
        InputImage.load(file)


def test_a_text_file_is_refused_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_encoded("PNG"))
    with (tmp_path / "a.png").open() as file, pytest.raises(InputImageError, match="binary mode"):
        InputImage.load(file)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "../a.png", "a/b.png", "a\\b", "con.png", "a\0", ".x", "a "])
def test_an_input_image_needs_a_plain_name(name: str) -> None:
    with pytest.raises(InputImageError, match="no plain file name"):
        InputImage(_PNG, name=name)


def test_an_input_image_needs_bytes() -> None:
    with pytest.raises(InputImageError, match="needs bytes, not str"):
        InputImage("a.png")  # type: ignore[arg-type]


def test_bytes_are_not_in_the_repr() -> None:
    assert repr(InputImage(b"secret", name="a.png")) == "InputImage(name='a.png')"


# Sets of input images.


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (_encoded("PNG"), ".png"),
        (_encoded("JPEG"), ".jpg"),
        (_encoded("GIF"), ".gif"),
        (_encoded("BMP"), ".bmp"),
        (_encoded("TIFF"), ".tiff"),
        (_encoded("WEBP"), ".webp"),
        (b"something else", ".png"),
    ],
)
def test_the_content_tells_the_suffix(data: bytes, suffix: str) -> None:
    assert list(InputImageSet([data]).files) == [f"0000{suffix}"]


def test_names_lie_in_the_folder_of_the_set() -> None:
    images = InputImageSet([_encoded("PNG"), _encoded("JPEG"), InputImage(_PNG, name="mask.png")])
    folder = images.folder
    assert images.names == [f"{folder}/0000.png", f"{folder}/0001.jpg", f"{folder}/mask.png"]
    assert len(images) == 3
    assert len(folder) == 32


def test_the_same_content_gives_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "whatever.png").write_bytes(_PNG)
    sources: list[Any] = [_PNG, io.BytesIO(_PNG), tmp_path / "whatever.png"]
    assert len({InputImageSet([source]).folder for source in sources}) == 1


def test_the_folder_is_the_same_on_every_machine() -> None:
    inner = hashlib.sha256(b"x").hexdigest()
    expected = hashlib.sha256(f"0000.png\0{inner}\0".encode()).hexdigest()[:32]
    assert InputImageSet([b"x"]).folder == expected


@pytest.mark.parametrize(
    "other",
    [[b"b", b"a"], [b"a"], [b"a", b"b", b"b"], [b"ab"], [b"a", InputImage(b"b", name="b.png")]],
)
def test_order_number_and_names_are_part_of_the_folder(other: list[Any]) -> None:
    assert InputImageSet(other).folder != InputImageSet([b"a", b"b"]).folder


def test_two_images_of_one_name_are_refused() -> None:
    with pytest.raises(InputImageError, match=r"two input images are called '0001\.png'"):
        InputImageSet([InputImage(b"x", name="0001.png"), b"y"])


@pytest.mark.parametrize("source", ["a.png", b"data", bytearray(b"x"), io.BytesIO(b"x"), Path("a")])
def test_one_image_is_no_list(source: Any) -> None:
    with pytest.raises(InputImageError, match=r"write input_images=\[image\]"):
        InputImageSet(source)


# Outputs.


def test_an_output_is_saved_under_its_name_below_a_folder(tmp_path: Path) -> None:
    output = _output(name="ComfyUI_00001_.png", subfolder="2024/may")
    path = output.save(tmp_path)
    assert path == output.path == tmp_path / "2024" / "may" / "ComfyUI_00001_.png"
    assert path.read_bytes() == output.data == _PNG


def test_a_slash_makes_it_a_folder(tmp_path: Path) -> None:
    assert _output().save(f"{tmp_path}/new/") == tmp_path / "new" / "a.png"


def test_what_has_an_ending_is_a_file_and_what_has_none_is_a_folder(tmp_path: Path) -> None:
    output = _output(subfolder="ignored")
    assert output.save(tmp_path / "deep" / "fox.png") == tmp_path / "deep" / "fox.png"
    assert output.save(tmp_path / "new") == tmp_path / "new" / "ignored" / "a.png"


def test_saving_twice_makes_two_files(tmp_path: Path) -> None:
    output = _output()
    assert [output.save(tmp_path).name for _ in range(2)] == ["a.png", "a_00001_.png"]
    assert output.path == tmp_path / "a_00001_.png"


@pytest.mark.parametrize("name", ["../../evil.png", "/evil.png", "..\\evil.png", "C:\\evil.png"])
@pytest.mark.parametrize("subfolder", ["", "../..", "/tmp", "C:\\"])
def test_hostile_names_stay_in_the_folder(tmp_path: Path, name: str, subfolder: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = _output(name=name, subfolder=subfolder).save(folder)
    assert path.name == "evil.png"
    assert folder.resolve() in path.resolve().parents


@pytest.mark.parametrize("name", ["", ".", "..", "/", "\0"])
def test_a_name_of_nothing_gets_one(tmp_path: Path, name: str) -> None:
    assert _output(name=name).save(tmp_path) == tmp_path / "output"


@pytest.mark.parametrize("path", ["a\0b", "a\0b/", "\ud800"])
def test_an_impossible_path_is_our_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(OutputFileError, match="cannot save"):
        _output().save(f"{tmp_path}/{path}")
    assert list(tmp_path.iterdir()) == []


def test_released_bytes_are_read_from_disk(tmp_path: Path) -> None:
    output = _output(_encoded("PNG"))
    output._save_and_release(tmp_path / "new")
    assert output.path == tmp_path / "new" / "a.png"
    assert output.data == _encoded("PNG")
    assert output.image.size == (3, 2)
    assert output.save(tmp_path / "copy.png").read_bytes() == _encoded("PNG")


def test_released_bytes_whose_file_is_gone_are_our_error(tmp_path: Path) -> None:
    output = _output()
    output._save_and_release(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(OutputFileError, match=r"cannot read .*a\.png: No such file"):
        output.data  # noqa: B018


def test_text_is_decoded() -> None:
    assert WorkflowOutput("grün\n".encode(), name="a.txt").text == "grün\n"
    assert WorkflowOutput(b"\xff!", name="a.txt").text == "\ufffd!"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_an_image_is_opened_once(image_format: str) -> None:
    output = _output(_encoded(image_format))
    assert output.image.size == (3, 2)
    assert output.image is output.image


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", _encoded("PNG")[:40], _encoded("JPEG", (300, 300))[:700], b"GIF89a"],
)
def test_what_pillow_cannot_open_is_our_error(data: bytes) -> None:
    with pytest.raises(OutputFileError, match=r"Pillow cannot open 'a\.png'"):
        _output(data).image  # noqa: B018


@given(
    cut=st.integers(0, 5000),
    patch=st.binary(max_size=30),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
)
def test_broken_images_raise_nothing_but_our_error(cut: int, patch: bytes, kind: str) -> None:
    data = _encoded(kind, (20, 20))
    cut %= len(data)
    output = _output(data[:cut] + patch + data[cut + len(patch) :])
    with contextlib.suppress(OutputFileError):
        assert min(output.image.size) > 0


def test_without_pillow_the_extra_is_named() -> None:
    program = """
import sys
sys.modules["PIL"] = None
from comfy_executors import MissingExtraError, WorkflowOutputImage
output = WorkflowOutputImage(b"data", name="a.png")
try:
    output.image
except MissingExtraError as error:
    print(error)
print(output.data)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    assert "comfy-executors[pillow]" in ran.stdout
    assert ran.stdout.endswith("b'data'\n")


_FACTS = {
    "subfolder": "sub",
    "type": "output",
    "node_id": "9",
    "batch_index": 3,
    "seed": 42,
    "prompt_id": "p",
    "server": "http://localhost:8188",
    "cached": True,
}


@pytest.mark.parametrize("kind", [WorkflowOutput, WorkflowOutputImage])
def test_pickling_keeps_bytes_and_facts(kind: type[WorkflowOutput], tmp_path: Path) -> None:
    output = kind(_encoded("PNG"), name="a.png", **_FACTS)  # type: ignore[arg-type]
    output.save(tmp_path)
    copy = pickle.loads(pickle.dumps(output))
    assert type(copy) is kind
    assert {name: getattr(copy, name) for name in _FACTS} == _FACTS
    assert (copy.data, copy.name, copy.path) == (output.data, "a.png", output.path)


def test_pickling_leaves_the_opened_image_behind() -> None:
    output = _output(_encoded("PNG"))
    opened = output.image
    copy = pickle.loads(pickle.dumps(output))
    assert output.image is opened
    assert copy.image is not opened
    assert copy.image.tobytes() == opened.tobytes()


def test_the_repr_shows_where_it_comes_from(tmp_path: Path) -> None:
    output = _output(name="a\n.png", batch_index=2, node_id="9", seed=7)
    assert repr(output) == "<WorkflowOutputImage 'a\\n.png' batch=2 node=9 seed=7>"
    path = output.save(tmp_path / "b.png")
    assert repr(output).endswith(f" seed=7, path={str(path)!r}>")
