"""docs/examples/django passes its own tests, as its readers run them: with Django, and gunicorn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "django"


def run_its_tests(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", *arguments]
    done = subprocess.run(
        command,
        cwd=EXAMPLE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_passes_its_own_tests() -> None:
    told = run_its_tests("-m", "not slow")
    assert "test_stopping_cancels_jobs_and_leaves_no_thread" in told
    assert "test_when_the_client_leaves_the_picture_is_not_made" in told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_answers_two_hundred_clients() -> None:
    assert "200 clients in" in run_its_tests("-m", "slow")


def test_its_models_and_migrations_agree(tmp_path: Path) -> None:
    command = [sys.executable, "manage.py", "makemigrations", "--check", "--dry-run"]
    done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
