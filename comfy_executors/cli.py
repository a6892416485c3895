"""The command line: `comfy-executors run`, `check`, `demo`, `devserver` and `version`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comfy_executors import __version__
from comfy_executors.checking import check_nodes, is_warning
from comfy_executors.cli_progress import Display, make_display
from comfy_executors.clients.comfyui import DEFAULT_PORT, ComfyUIClient
from comfy_executors.clients.http import DeadlineWaiter, HttpClient, parse_address
from comfy_executors.errors import (
    AuthenticationError,
    ComfyExecutorsError,
    ExecutorClosedError,
    NodeExecutionError,
    OutputFileError,
    ServerError,
    ServerUnreachableError,
    TemplateVariablesError,
    WaitTimeoutError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowRejectedError,
)
