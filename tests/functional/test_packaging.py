"""What people install: the sdist, and the wheel that is built from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import comfy_executors

ROOT = Path(__file__).parents[2]
PATIENCE = 110.0


@pytest.mark.slow
def test_the_wheel_and_the_sdist_have_all_files_of_the_package(tmp_path: Path) -> None:
    source, dist = tmp_path / "source", tmp_path / "dist"
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "comfy_executors", source / "comfy_executors", ignore=without_caches)
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # With what is installed here, so that it needs no network.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert built.returncode == 0, built.stdout + built.stderr

    package = {
        str(path.relative_to(source))
        for path in (source / "comfy_executors").rglob("*")
        if path.is_file()
    }
    for name in ("py.typed", "demo/workflow.json.jinja", "devserver/object_info.json",
                 "workers/Dockerfile"):  # fmt: skip
        assert f"comfy_executors/{name}" in package
    release = f"comfy_executors-{comfy_executors.__version__}"
    with zipfile.ZipFile(dist / f"{release}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        points = wheel.read(f"{release}.dist-info/entry_points.txt").decode()
    assert {name for name in names if ".dist-info/" not in name} == package
    assert [name for name in names if name.endswith("/LICENSE")]
    assert "comfy-executors = comfy_executors.cli:main" in points
    with tarfile.open(dist / f"{release}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert package | {"setup.py", "setup.cfg", "README.md", "LICENSE"} <= names
