"""The end of a command: imported objects are not walked once more when the process goes."""

import subprocess
import sys

import pytest

CODE = """
import atexit, gc, sys
atexit.register(lambda: print("frozen" if gc.get_freeze_count() else "walked", file=sys.stderr))
sys.argv = ["fp8-convert", *sys.argv[1:]]
from fp8_convert.converter.cli import main
main()
"""


@pytest.mark.parametrize(("arguments", "code"), [(["manifests"], 0), (["--no-such-option"], 2)], ids=["done", "failed"])
def test_what_was_imported_is_left_alone(arguments: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.endswith("frozen\n")
