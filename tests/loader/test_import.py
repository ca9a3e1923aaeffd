"""fp8_convert.loader imports on other systems than Linux: without fcntl, resource, triton and their like."""

import subprocess
import sys

WITHOUT_POSIX = """
import os, sys
for name in ("fcntl", "resource", "triton"):
    sys.modules[name] = None
for name in ("preadv", "pwrite", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "O_CLOEXEC", "O_DIRECT"):
    if hasattr(os, name):
        delattr(os, name)
import fp8_convert.loader
from fp8_convert.loader import load_component, load_pipeline, report
print("imported")
"""

ONLY_WHAT_LOADING_NEEDS = """
import sys
import fp8_convert.loader
parts = ("conversion", "run", "target", "supply", "verification", "cli")
print(*(name for name in parts if f"fp8_convert.converter.{name}" in sys.modules))
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_what_only_linux_has() -> None:
    done = run(WITHOUT_POSIX)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr


def test_the_loader_imports_no_more_of_the_converter_than_loading_needs() -> None:
    done = run(ONLY_WHAT_LOADING_NEEDS)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
