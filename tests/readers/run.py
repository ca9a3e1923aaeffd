"""Make an environment for each reader and run its tests there: `run.py [READER ...]`, all of them without a name.

A reader is a folder beside this file with a requirements.txt: every package that importing it needs, pinned, and
installed without its dependencies on a CPU torch. (Its own list would bring CUDA and a second torch.) Environments are
in READERS_HOME, `.readers` by default, and are made again when their requirements change.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
HOME = Path(os.environ.get("READERS_HOME") or HERE.parents[1] / ".readers")
TORCH = "torch==2.13.0"


def main(names: list[str]) -> int:
    readers = sorted(file.parent.name for file in HERE.glob("*/requirements.txt"))
    unknown = sorted(set(names) - set(readers))
    if unknown:
        print(f"no reader {', '.join(unknown)}; there are {', '.join(readers)}", file=sys.stderr)
        return 2
    failed = [name for name in names or readers if _test(name, _environment(name))]
    print("readers failed: " + ", ".join(failed) if failed else "readers passed: " + ", ".join(names or readers))
    return 1 if failed else 0


def _environment(name: str) -> Path:
    """The interpreter of a reader's environment, made where there is none of these requirements."""
    folder, requirements = HOME / name, HERE / name / "requirements.txt"
    python, ready = folder / "bin" / "python", folder / "requirements.txt"
    if ready.is_file() and ready.read_text() == requirements.read_text():
        return python
    print(f"making {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--no-deps", "--requirement", str(requirements)], check=True)
    ready.write_text(requirements.read_text())
    return python


def _test(name: str, python: Path) -> int:
    print(f"testing {name}", flush=True)
    command = [str(python), "-m", "pytest", "-c", str(HERE / "pytest.ini"), f"--rootdir={HERE}", f"--confcutdir={HERE}"]
    known = {"FP8_CONVERT_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([*command, str(HERE / name)], env={**os.environ, **known}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
