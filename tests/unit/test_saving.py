"""Saving: harmless names, whole files or none, never over another one."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_executors import OutputFileError
from comfy_executors.saving import safe_name, safe_subfolder, save_bytes

_POSIX = pytest.mark.skipif(os.name != "posix", reason="about signals, limits and modes of POSIX")
_ANY_TEXT = st.text(st.characters(), max_size=300)  # surrogates included


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Names.


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("ComfyUI_00001_.png", "ComfyUI_00001_.png"),
        ("ein Bild, größer.png", "ein Bild, größer.png"),
        ("../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("C:\\Windows\\evil.png", "evil.png"),
        ("C:evil.png", "C_evil.png"),
        ("file.png:stream", "file.png_stream"),
        ("", "default"),
        (".", "default"),
        ("..", "default"),
        ("...", "default"),
        ("  ", "default"),
        ("a/", "default"),
        ("\0", "default"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        ("com1 .png", "_com1 .png"),
        ("LPT¹.png", "_LPT¹.png"),
        ("CONOUT$", "_CONOUT$"),
        ("console.png", "console.png"),
        ("a\0b.png", "a_b.png"),
        ("a\nb\r.png", "a_b_.png"),
        ("a\x9bb.png", "a_b.png"),
        ("a\ud800b.png", "a_b.png"),
        ("gpj.\u202egnp.exe", "gpj._gnp.exe"),
        ("a\u2028b.png", "a_b.png"),
        ("a.png. . ", "a.png"),
        (".htaccess", "_.htaccess"),
        ("-rf", "-rf"),
        ('<a>"b"|c?*.png', "_a__b__c__.png"),
    ],
)
def test_hostile_names_become_harmless(name: str, safe: str) -> None:
    assert safe_name(name, "default") == safe


@given(_ANY_TEXT)
def test_a_safe_name_is_one_plain_component(name: str) -> None:
    safe = safe_name(name, "default")
    assert safe not in ("", ".", "..")
    assert not re.search(r'[\\/<>:"|?*]', safe)
    assert not safe.startswith((".", " "))
    assert not safe.endswith((".", " "))
    assert all(unicodedata.category(letter)[0] != "C" for letter in safe if letter.isascii())
    assert len(safe.encode()) <= 200


@given(_ANY_TEXT)
def test_a_safe_name_stays_as_it_is(name: str) -> None:
    safe = safe_name(name, "default")
    assert safe_name(safe, "other") == safe


@given(_ANY_TEXT)
def test_a_subfolder_never_leads_upwards(subfolder: str) -> None:
    folder = safe_subfolder(subfolder)
    assert not folder.is_absolute()
    assert ".." not in folder.parts
    assert len(folder.parts) <= 8


@pytest.mark.parametrize(
    ("subfolder", "safe"),
    [
        ("", "."),
        ("2024/may", "2024/may"),
        ("2024\\may", "2024/may"),
        ("../../etc", "etc"),
        ("/etc/cron.d", "etc/cron.d"),
        ("a/./b//c/..", "a/b/c"),
        ("C:\\x", "C_/x"),
        ("nul/x", "_nul/x"),
        ("\0/x", "_/x"),
    ],
)
def test_hostile_subfolders_become_harmless(subfolder: str, safe: str) -> None:
    assert safe_subfolder(subfolder) == PurePosixPath(safe)


def test_an_over_long_name_keeps_its_suffix() -> None:
    assert safe_name("ü" * 300 + ".png", "") == "ü" * 98 + ".png"
    assert safe_name("x." + "y" * 300, "") == "x." + "y" * 198


@given(name=_ANY_TEXT, subfolder=_ANY_TEXT)
def test_any_name_can_be_saved_inside_the_folder(
    tmp_path_factory: pytest.TempPathFactory, name: str, subfolder: str
) -> None:
    folder = tmp_path_factory.mktemp("out")
    path = save_bytes(b"data", folder / safe_subfolder(subfolder) / safe_name(name, "output"))
    assert path.read_bytes() == b"data"
    assert folder in path.resolve().parents


# One file after the other.


def test_a_taken_name_is_counted_up(tmp_path: Path) -> None:
    paths = [save_bytes(b"%d" % number, tmp_path / "fox.png") for number in range(3)]
    assert [path.name for path in paths] == ["fox.png", "fox_00001_.png", "fox_00002_.png"]
    assert [path.read_bytes() for path in paths] == [b"0", b"1", b"2"]


def test_a_counted_name_is_counted_on(tmp_path: Path) -> None:
    for number in range(20):
        path = save_bytes(b"", tmp_path / "ComfyUI_00007_.png")
        assert path.name == f"ComfyUI_{number + 7:05d}_.png"


def test_names_with_newlines_are_counted_too(tmp_path: Path) -> None:
    names = [save_bytes(b"", tmp_path / "a\nb.png").name for _ in range(3)]
    assert names == ["a\nb.png", "a\nb_00001_.png", "a\nb_00002_.png"]


def test_folders_are_made(tmp_path: Path) -> None:
    assert save_bytes(b"x", tmp_path / "a" / "b" / "c.png").read_bytes() == b"x"


def test_composed_and_decomposed_letters_do_not_overwrite_each_other(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        save_bytes(form.encode(), tmp_path / unicodedata.normalize(form, "ä.png"))
    assert sorted(p.read_bytes() for p in tmp_path.iterdir()) == [b"NFC", b"NFD"]


def test_saving_leaves_nothing_else(tmp_path: Path) -> None:
    save_bytes(b"x", tmp_path / "a.png")
    assert _names(tmp_path) == ["a.png"]


def test_a_symlink_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").symlink_to(victim)
    (out / "b.png").symlink_to(tmp_path / "nowhere")
    assert save_bytes(b"x", out / "a.png").name == "a_00001_.png"
    assert save_bytes(b"x", out / "b.png").name == "b_00001_.png"
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_in_the_way_is_counted_around(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert save_bytes(b"x", tmp_path / "a.png").name == "a_00001_.png"


@_POSIX
def test_the_umask_decides_on_the_mode(tmp_path: Path) -> None:
    # In a process of its own: the umask is everybody's.
    program = (
        "import os, sys; from pathlib import Path; from comfy_executors.saving import save_bytes;"
        "os.umask(0o027); save_bytes(b'x', Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.png")], check=True)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


# Many at once.


def test_threads_that_save_one_name_lose_nothing(tmp_path: Path) -> None:
    threads, each = 8, 40
    start = threading.Barrier(threads)

    def save(thread: int) -> list[Path]:
        start.wait(30)
        target = tmp_path / "ComfyUI_00001_.png"
        return [save_bytes(b"%d/%d" % (thread, number), target) for number in range(each)]

    with ThreadPoolExecutor(threads) as pool:
        paths = [path for saved in pool.map(save, range(threads)) for path in saved]
    assert sorted(path.name for path in paths) == _names(tmp_path)
    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert contents == {b"%d/%d" % (t, n) for t in range(threads) for n in range(each)}


_SAVER = """
import os, sys
from pathlib import Path
from comfy_executors.saving import save_bytes
folder, name, size, count = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(count)):
    data = (f"{os.getpid()}/{number}/" * int(size)).encode()
    print(save_bytes(data, Path(folder, name)), flush=True)
"""


def _start_saver(folder: Path, name: str, size: int, count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SAVER, str(folder), name, str(size), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_save_one_name_lose_nothing(tmp_path: Path) -> None:
    processes = [_start_saver(tmp_path, "fox.png", 1, 50) for _ in range(4)]
    for process in processes:
        _go(process)
    printed = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(Path(line).name for lines in printed for line in lines) == _names(tmp_path)
    contents = {path.read_text() for path in tmp_path.iterdir()}
    assert contents == {f"{p.pid}/{n}/" for p in processes for n in range(50)}


# When it goes wrong.


@_POSIX
def test_a_killed_process_leaves_no_half_file(tmp_path: Path) -> None:
    repeats = 200_000  # some megabytes, so that most of the time goes into writing
    finished = 0
    for kill in range(9):
        process = _start_saver(tmp_path, "fox.png", repeats, 1_000_000)
        _go(process)
        assert process.stdout is not None
        # Killed while it saves one of the files after the first few.
        for _ in range(kill % 3):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        for path in tmp_path.glob("fox*"):
            data = path.read_text()
            beginning = data[: data.index("/", data.index("/") + 1) + 1]
            assert data == beginning * repeats
            path.unlink()
            finished += 1
        leftovers = {path.name[:8] for path in tmp_path.iterdir()}
        assert leftovers <= {".saving-"}
    assert finished >= 9  # those whose end was waited for


@_POSIX
def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; from pathlib import Path;"
        "from comfy_executors import OutputFileError;"
        "from comfy_executors.saving import save_bytes;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: save_bytes(b'x' * 5000, Path(sys.argv[1]))\n"
        "except OutputFileError as error: print(error)"
    )
    target = tmp_path / "big.png"
    ran = subprocess.run(
        [sys.executable, "-c", program, str(target)], check=True, stdout=subprocess.PIPE, text=True
    )
    assert ran.stdout == f"cannot save {str(target)!r}: File too large\n"
    assert _names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one device that is always full stands in for the temporary file's.
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda *_: real_open("/dev/full", os.O_WRONLY))
    with pytest.raises(OutputFileError, match="No space left on device"):
        save_bytes(b"x" * 5000, tmp_path / "a.png")
    monkeypatch.undo()
    assert _names(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("file/a.png", "Not a directory|File exists"),
        ("x" * 300 + ".png", "File name too long"),
        ("a\0b.png", "embedded null"),
        ("a\ud800b.png", "surrogates not allowed"),
    ],
)
def test_what_cannot_be_saved_is_our_error(tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(OutputFileError, match=reason):
        save_bytes(b"x", tmp_path / target)
    assert _names(tmp_path) == ["file"]


@_POSIX
def test_a_read_only_folder_is_our_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    program = (
        "import os, sys; from pathlib import Path; from comfy_executors import OutputFileError;"
        "from comfy_executors.saving import save_bytes\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: save_bytes(b'x', Path(sys.argv[1]))\n"
        "except OutputFileError as error: print(error)"
    )
    # For root nothing is read-only, so root becomes somebody else; the way must be open to them.
    for parent in (tmp_path, *list(tmp_path.parents)[:2]):
        parent.chmod(0o755)
    ran = subprocess.run(
        [sys.executable, "-c", program, str(folder / "a.png")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.stdout == f"cannot save {str(folder / 'a.png')!r}: Permission denied\n"
    assert _names(folder) == []


# File systems without hard links.


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse hard links as a FAT file system does, which a test cannot mount."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("no_links")
def test_without_links_nothing_is_overwritten(tmp_path: Path) -> None:
    threads, each = 8, 25
    start = threading.Barrier(threads)

    def save(thread: int) -> list[Path]:
        start.wait(30)
        return [save_bytes(b"%d/%d" % (thread, n), tmp_path / "a.png") for n in range(each)]

    with ThreadPoolExecutor(threads) as pool:
        paths = [path for saved in pool.map(save, range(threads)) for path in saved]
    assert sorted(path.name for path in paths) == _names(tmp_path)
    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert contents == {b"%d/%d" % (t, n) for t in range(threads) for n in range(each)}


@pytest.mark.usefixtures("no_links")
def test_without_links_a_guard_of_a_killed_process_is_counted_around(tmp_path: Path) -> None:
    (tmp_path / ".claim-a.png").touch()
    assert save_bytes(b"x", tmp_path / "a.png").name == "a_00001_.png"


def test_other_refusals_of_links_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputFileError, match="Input/output error"):
        save_bytes(b"x", tmp_path / "a.png")
    assert _names(tmp_path) == []
