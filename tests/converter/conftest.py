"""A finished conversion for those who look at one, and a copy of it for those who damage it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipelines import copied, saved

from fp8_convert.converter import convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Z-Image pipeline, converted. Not to be changed."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    convert(saved("z_image"), folder)
    return folder


@pytest.fixture
def spoilt(converted: Path, tmp_path: Path) -> Path:
    """A converted Z-Image pipeline that the test may damage."""
    return copied(converted, tmp_path / "spoilt")
