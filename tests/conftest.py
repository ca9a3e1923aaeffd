"""Tests marked `gpu` are skipped without a CUDA device that multiplies FP8; property tests have no deadline.

A background shell, and some CI, let its children ignore SIGINT; those of the tests must heed it, so this process does.
Workers of pytest-xdist share the cores: threads of PyTorch that wait for each other on a busy one take much longer.
"""

from __future__ import annotations

import os
import signal

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))  # before PyTorch reads it

import pytest
import torch
from hypothesis import settings

collect_ignore = ["readers"]  # they run in environments of their own: `make test-readers`

for _number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

settings.register_profile("fp8-convert", deadline=None)  # nothing is timed: machines differ
settings.load_profile("fp8-convert")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device of compute capability 8.9 or newer")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
