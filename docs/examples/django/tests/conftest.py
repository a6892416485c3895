"""A dev server stands for ComfyUI; it needs no GPU and no model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import comfy

pytest_plugins = ["comfy_executors.devserver.pytest_plugin"]


@pytest.fixture(scope="session")
def django_db_modify_db_settings(tmp_path_factory):
    """Keep the test database in a file: jobs write to it from threads of their own."""
    from django.conf import settings

    settings.DATABASES["default"]["TEST"]["NAME"] = tmp_path_factory.mktemp("db") / "test.sqlite3"


@pytest.fixture
def comfyui(comfy_dev_server, settings, tmp_path):
    """A server for the site, and a site that knows it; afterwards nothing is left running."""
    settings.COMFY_SERVER = comfy_dev_server.address
    settings.MEDIA_ROOT = tmp_path
    yield comfy_dev_server
    comfy.close()


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """A database with its tables, for sites that run in processes of their own."""
    database = tmp_path_factory.mktemp("served") / "db.sqlite3"
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "--verbosity=0"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "DATABASE_PATH": str(database)},
        check=True,
    )
    return database
