"""What a benchmark finds: rows, printed and written as they come, so that a run that is stopped loses none."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao", "sdnq", "safetensors", "fastsafetensors")


class Recording:
    """The rows of one run, with its machine, versions and command."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {name: found for name in PACKAGES if (found := _version(name))},
            "command": " ".join([_launcher(), "benchmarks/" + Path(sys.argv[0]).name, *_arguments()]),
            "rows": [],
        }
        print(self.found["device"], self.found["versions"], flush=True)

    def add(self, **row: Any) -> None:
        self.found["rows"].append(row)
        self._keep(row)

    def complete(self, row: dict[str, Any], **more: Any) -> None:
        """Give the last row that has what `row` says, and has not failed, more values; KeyError where there is none."""
        rows = [known for known in self.found["rows"] if row.items() <= known.items() and "failed" not in known]
        if not rows:
            raise KeyError(f"no row is {row}")
        rows[-1].update(more)
        self._keep({**row, **more})

    def _keep(self, values: dict[str, Any]) -> None:
        """Print `values`, and write all rows."""
        print("  ".join(f"{key} {_shown(value)}" for key, value in values.items()), flush=True)
        if self.path is not None:
            unfinished = self.path.with_suffix(".part")
            unfinished.write_text(json.dumps(self.found, indent=1) + "\n")
            unfinished.replace(self.path)

    @contextmanager
    def failing(self, **row: Any) -> Iterator[None]:
        """Record what goes wrong inside as a row that says "failed", and go on."""
        try:
            yield
        except Exception as error:  # a peer may fail in any way, and the others are still to be measured
            self.add(**row, failed=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")


def _launcher() -> str:
    ranks = os.environ.get("WORLD_SIZE")  # which torchrun sets
    return f"torchrun --nproc-per-node {ranks}" if ranks else "python"


def _arguments() -> list[str]:
    """The command's, without the folder of what `--json` names."""
    return [Path(word).name if before == "--json" else word for before, word in pairwise(["", *sys.argv[1:]])]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_shown(part)}" for key, part in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
