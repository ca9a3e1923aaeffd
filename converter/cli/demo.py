"""The built-in demo: a tiny random Z-Image pipeline of the real classes, converted, verified, loaded and run."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..conversion import convert
from ..format.layout import RECORD_FILE
from ..inspection import inspect
from ..output.record import load_record
from ..snapshot.building import quiet_libraries
from ..telling.errors import ConvertError
from ..telling.progress import bars_of_libraries
from ..tiny import tiny_pipeline
from ..verification import verify
from .render import render_inspection, render_result, render_verification

# Goes with the pipeline into its output, and so into the record, by which a rerun knows what it may replace.
_README = "A tiny pipeline with random weights, made by `fp8-convert demo`. It paints noise; delete it at will.\n"
_PICTURE_KEY = "fp8-convert demo"


def run_demo(output: Path, say: Callable[[str], None]) -> None:
    """Build a tiny pipeline, convert it into `output`, verify, load and run it; its picture is put beside the folder.

    Replaces an earlier demo's output and nothing else. Raises ConvertError.
    """
    picture = output.with_name(f"{output.name}.png")  # not inside: `verify` wants nothing there that is not recorded
    again = _is_a_demos(output)
    if not again and (output / RECORD_FILE).exists():
        raise ConvertError(f"{output} holds an FP8 snapshot that is not the demo's; name another folder with -o.")
    if os.path.lexists(picture) and not _is_a_demos_picture(picture):
        raise ConvertError(
            f"{picture}, where the demo's picture goes, exists and no demo wrote it; move it away, or name another "
            "folder with -o."
        )
    with tempfile.TemporaryDirectory() as folder, bars_of_libraries():
        source = Path(folder, "tiny-z-image")
        say("building a tiny random Z-Image pipeline (11 MB) ...")
        build_tiny_pipeline(source)
        result = convert(source, output, force=again)
        say(render_result(result))
        say("")
        say(render_inspection(inspect(output)))
        say("")
        say(render_verification(verify(output, source=source)).replace(str(source), "the source"))
    # The demo stands above both halves, and nothing else here imports the loader; late, so that it can speak at once.
    from ...loader import load_pipeline, report

    with bars_of_libraries():
        pipeline = load_pipeline(output)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red cube", height=64, width=64, num_inference_steps=2, guidance_scale=0.0, max_sequence_length=64
    ).images[0]
    _save(image, picture)
    say(f"generated {picture} ({image.width}x{image.height}; random weights paint noise)")
    say("")
    say(str(report(pipeline)))


def _is_a_demos(folder: Path) -> bool:
    try:
        record = load_record(folder)
    except ConvertError:
        return False
    digest = hashlib.sha256(_README.encode()).hexdigest()
    return record is not None and "README.md" in record.files and record.files["README.md"].sha256 == digest


def _save(image: Any, picture: Path) -> None:
    """Write the picture with a digest of its pixels, by which a rerun knows it."""
    from PIL.PngImagePlugin import PngInfo  # late, as the loader that brings it

    info = PngInfo()
    info.add_text(_PICTURE_KEY, hashlib.sha256(image.tobytes()).hexdigest())
    image.save(picture, pnginfo=info)


def _is_a_demos_picture(picture: Path) -> bool:
    from PIL import Image

    if picture.is_symlink():
        return False
    try:
        with Image.open(picture) as image:
            stated = image.info.get(_PICTURE_KEY)
            return stated is not None and stated == hashlib.sha256(image.tobytes()).hexdigest()
    except Exception:  # whatever Pillow raises for what is no picture
        return False


def build_tiny_pipeline(folder: Path, seed: int = 0) -> None:
    """Save a random Z-Image pipeline with small dimensions and a byte-level tokenizer, as BF16 safetensors."""
    torch.manual_seed(seed)
    with quiet_libraries():
        tiny_pipeline(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").write_text(_README)
