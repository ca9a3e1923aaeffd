"""The built wheel, installed in a clean environment and run from another folder."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from pipelines import saved

ROOT = Path(__file__).parent.parent


def is_ignored(name: str) -> bool:
    """Whether a Docker build from a clone would leave the file out."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    parts = PurePosixPath(name).parts
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(
            PurePosixPath(path).name if pattern.startswith("**/") else path, pattern.removeprefix("**/")
        )
        for pattern in patterns
        for path in above
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The sources are copied: a build leaves folders beside them.
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists() and not is_ignored(name):
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "src" / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(folder / "src")], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module(wheel: Path) -> None:
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("fp8_convert/")}
    compiled = {n for n in inside if n.startswith("fp8_convert/converter/stream/_e4m3.") and n.endswith(".so")}
    assert len(compiled) == (1 if shutil.which("cc") else 0)
    expected = {
        f"fp8_convert/{path.relative_to(ROOT).as_posix()}"
        for package in ("converter", "loader", "manifests")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".toml")
    }
    expected |= {"fp8_convert/__init__.py", "fp8_convert/py.typed"}
    model = ROOT / "emoji" / "model"
    expected |= {
        f"fp8_convert/emoji/{path.relative_to(model).as_posix()}" for path in model.rglob("*") if path.is_file()
    }
    assert inside - compiled == expected


def test_wheel_with_the_emoji_model_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 25_000_000


def test_wheel_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    # The dependencies come from this environment: its folder is only added to the path, so that the .pth file of an
    # editable install in it is not read.
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = subprocess.run(
        [python, "-c", "import fp8_convert.converter as c; print(c.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(tmp_path / "venv"))
    command = tmp_path / "venv" / "bin" / "fp8-convert"
    subprocess.run([command, str(saved("z_image")), "-o", "out"], cwd=tmp_path, check=True, capture_output=True)
    shown = subprocess.run([command, "inspect", "out", "--json"], cwd=tmp_path, check=True, capture_output=True).stdout
    methods = {c["name"]: c["quant_method"] for c in json.loads(shown)["components"]}
    assert methods == {"text_encoder": "fp8", "transformer": "fp8", "vae": None}
