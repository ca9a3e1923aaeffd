"""Tests of other programs' readers, each run in that reader's own environment by `run.py`.

`made(SOURCE, **keywords of convert)` is a snapshot that the project's own environment has converted, in a process of
its own; tests only read it, and change a `copy`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROJECT_PYTHON = os.environ.get("FP8_CONVERT_PYTHON", "")
Made = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made("wan22", ignored_layers=["to_out"]): a converted snapshot. made("wan22", None): the source as it is."""
    root, known = tmp_path_factory.mktemp("made"), dict[str, Path]()

    def make(source: str, *unconverted: None, **keywords: Any) -> Path:
        arguments = [source, json.dumps(None if unconverted else keywords, sort_keys=True)]
        key = " ".join(arguments)
        if key not in known:
            known[key] = root / f"{len(known)}-{source}"
            script = Path(__file__).with_name("making.py")
            command = [PROJECT_PYTHON, str(script), str(known[key]), *arguments]
            done = subprocess.run(command, text=True, capture_output=True)
            if done.returncode:
                pytest.fail(f"{key}\n{done.stderr}", pytrace=False)
        return known[key]

    return make


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a snapshot that the test may change."""
    return lambda snapshot: Path(shutil.copytree(snapshot, tmp_path / snapshot.name))
