"""Convert a Hub repository once for all builds of an image, and lay the snapshot out in one folder for each layer.

    python bake.py --cache CACHE --layers LAYERS -- SOURCE [OPTIONS of fp8-convert]

The snapshot is made in CACHE, which the builder keeps, under a name that follows from the source's commit, the recipe
and the version: a build that is run again finds it finished and converts nothing, one that broke off goes on. LAYERS
gets the folders 00 to 15: all small files in the first, then the weights in their order, none over --layer-size unless
a file alone is. Each has its files below the folder `model`, so that nothing of a layer is made while it is copied: the
times of files and folders are the snapshot's, which are constant, and the same source gives the same layers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LAYERS = 16  # as many as the Dockerfile copies
PLACE = "model"  # where the snapshot is in the image


def main(command_line: list[str]) -> None:
    arguments, convert = _arguments(command_line)
    plan = json.loads(_run("fp8-convert", *convert, "--dry-run", "--json", "--quiet"))
    if plan["commit"] is None:
        sys.exit(f"error: {plan['source']} is a folder; give the id of a Hub repository.")
    snapshot = arguments.cache / _key(plan, _run("fp8-convert", "--version"))
    # At the commit that was planned, though the branch may move meanwhile; options that come last count.
    print(_run("fp8-convert", *convert, "--revision", plan["commit"], "--stream", "-o", str(snapshot)), end="")
    print(_run("fp8-convert", "verify", str(snapshot)), end="")
    layers = [*_layers(snapshot, arguments.layer_size)]
    if len(layers) > LAYERS:
        sys.exit(f"error: {snapshot} fills {len(layers)} layers, and there are {LAYERS}; pass a larger --layer-size.")
    for number in range(LAYERS):
        files = layers[number] if number < len(layers) else []
        _lay_out(snapshot, files, arguments.layers / f"{number:02}")
        print(f"layer {number:02}: {len(files)} files, {_bytes(files) / 1e9:.2f} GB")


def _arguments(command_line: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is before `--`, and what is for fp8-convert behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder that outlives a build")
    parser.add_argument("--layers", type=Path, required=True, help="folder to write the layers to")
    parser.add_argument("--layer-size", type=_size, default="5GB", help="most bytes of a layer, such as 5GB")
    parser.add_argument("convert", nargs="+", metavar="SOURCE [OPTIONS]")
    split = command_line.index("--") if "--" in command_line else len(command_line)
    convert = command_line[split + 1 :]
    return parser.parse_args([*command_line[:split], *convert[:1]]), convert


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG])B", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not such as 5GB or 500MB")
    return int(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9}[match[2]]


def _run(*command: str) -> str:
    """What the command prints; its errors go where this program's go, and end it too."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def _key(plan: dict[str, object], version: str) -> str:
    """A folder's name for all that determines the snapshot's bytes."""
    recipe = json.dumps([plan["source"], plan["recipe"], version], sort_keys=True)
    return f"{plan['commit']}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"


def _layers(snapshot: Path, most: int) -> Iterator[list[Path]]:
    files = sorted(path for path in snapshot.rglob("*") if path.is_file())
    yield [path for path in files if path.suffix != ".safetensors"]
    layer: list[Path] = []
    for path in files:
        if path.suffix != ".safetensors":
            continue
        if layer and _bytes(layer) + path.stat().st_size > most:
            yield layer
            layer = []
        layer.append(path)
    yield layer


def _lay_out(snapshot: Path, files: list[Path], folder: Path) -> None:
    """Copy the files to their places below `folder`, with the times that they and their folders have."""
    folder.mkdir(parents=True)
    for path in files:
        target = folder / PLACE / path.relative_to(snapshot)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    time = (snapshot / "fp8_convert.json").stat().st_mtime
    for parent, _, _ in os.walk(folder, topdown=False):
        os.utime(parent, (time, time))


def _bytes(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


if __name__ == "__main__":
    main(sys.argv[1:])
