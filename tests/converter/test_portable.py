"""Systems other than Linux: the same bytes where calls, flags and modules that only Linux or Unix has are missing.

Each test runs in a process of its own in which they are taken away, once the libraries in use were imported.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import saved

import fp8_convert.converter
from fp8_convert.converter import convert

OURS = fp8_convert.converter.__path__[0]
MACOS = ["preadv", "pwritev", "posix_fadvise", "posix_fallocate", "O_DIRECT"]
WINDOWS = [*MACOS, "pread", "pwrite", "O_CLOEXEC", "O_NONBLOCK"]

_TAKE_AWAY = """
import builtins, contextlib, importlib, os, sys, types
from pathlib import Path

for library in {libraries!r}:
    importlib.import_module(library)
names, windows = {names!r}, {windows!r}
for name in names:
    delattr(os, name)
if windows:
    os.O_BINARY = 1 << 29
    real_import, real_open, real_replace, ours = builtins.__import__, os.open, os.replace, {ours!r}

    def windows_import(name, module=None, *rest, **more):  # for our code: the libraries here want them
        if name in ("fcntl", "resource") and (module or {{}}).get("__name__", "").startswith("fp8_convert"):
            raise ImportError(name)
        return real_import(name, module, *rest, **more)

    def windows_open(path, flags, *rest, **more):
        if sys._getframe(1).f_code.co_filename.startswith(ours):
            assert flags & os.O_BINARY, f"{{path}} is opened as text"
            if os.path.isdir(path):
                raise PermissionError(13, "Permission denied")
        return real_open(path, flags & ~os.O_BINARY, *rest, **more)

    def windows_replace(source, target):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                assert os.readlink(f"/proc/self/fd/{{fd}}") not in map(os.path.realpath, (source, target))
        real_replace(source, target)

    builtins.__import__, os.open, os.replace = windows_import, windows_open, windows_replace
"""


def run_without(names: list[str], program: str, libraries: list[str]) -> str:
    """Run Python code in a process that has `libraries` and whose `os` lacks `names`; returns what it prints."""
    before = _TAKE_AWAY.format(names=names, windows=names == WINDOWS, ours=OURS, libraries=libraries)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", before + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


_READ_AND_WRITE = """
converter = types.ModuleType("fp8_convert.converter")  # not all of it: only what reads and writes
converter.__path__ = [{ours!r}]
sys.modules["fp8_convert.converter"] = converter
from fp8_convert.converter.stream import reading
from fp8_convert.converter.output import writing
from fp8_convert.converter.format.header import encode_header, read_header, TensorInfo

folder, S = Path({folder!r}), writing.STAGING_BYTES
import numpy
data = numpy.random.default_rng(0).integers(0, 256, 3 * S + 5000, dtype=numpy.uint8).tobytes()
for size in (0, 1, 4096, 4097, S + 1, len(data)):
    pieces = (data[i : min(i + 1_000_003, size)] for i in range(0, size, 1_000_003))
    digest = writing.write_pieces(folder / str(size), size, pieces, "x")
    fd = reading.open_for_reading(folder / str(size), "x")
    assert writing.file_sha256(fd) == digest
    os.close(fd)
    print(size, digest)

spans = [(i, min(i + 65536, len(data))) for i in range(0, len(data), 65536)]
pool = reading.BufferPool(65536, 9)
fd = reading.open_for_reading(folder / str(len(data)), "x")
with contextlib.closing(reading.SpanReader(fd, spans, pool, where="x", threads=8)) as reader:
    for start, stop in spans:
        span = reader.next()
        assert bytes(span.data.numpy()) == data[start:stop]
        span.release()
os.close(fd)

tensor = TensorInfo("a", "U8", (3,), 0, 3)
writing.write_small(folder / "tensor", encode_header([tensor], {{}}) + b"123", "x")
assert read_header(folder / "tensor", "x").tensors == (tensor,)
"""


@pytest.mark.parametrize("names", [MACOS, WINDOWS], ids=["macos", "windows"])
def test_reading_and_writing(tmp_path: Path, names: list[str]) -> None:
    program = _READ_AND_WRITE.format(ours=OURS, folder=str(tmp_path))
    lines = run_without(names, program, ["torch"]).splitlines()
    assert len(lines) == 6
    for line in lines:
        size, digest = line.split()
        assert hashlib.sha256((tmp_path / size).read_bytes()).hexdigest() == digest
        assert (tmp_path / size).stat().st_size == int(size)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("names", [MACOS, WINDOWS], ids=["macos", "windows"])
def test_a_whole_conversion(tmp_path: Path, names: list[str]) -> None:
    program = (
        "import filelock\n"
        "filelock.FileLock = filelock.SoftFileLock\n"  # the one that needs no calls of the system the test runs on
        "from fp8_convert.converter.cli.commands import main\n"
        "import fp8_convert.loader\n"
        f"main([{str(saved('z_image'))!r}, '-o', {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        f"main(['verify', {str(tmp_path / 'out')!r}, '--source', {str(saved('z_image'))!r}], standalone_mode=False)\n"
    )
    assert ": ok (" in run_without(names, program, ["diffusers", "transformers", "safetensors.torch", "filelock"])
    convert(saved("z_image"), tmp_path / "normal")
    written, normal = (
        {p.relative_to(tmp_path / n).as_posix(): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("out", "normal")
    )
    assert written == normal
