"""The built-in demo: a small trained Z-Image that paints emoji, converted, verified and run beside its original."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.resources import files
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

EMOJI = Path(str(files("fp8_convert") / "emoji"))
PROMPTS = ("red apple", "rocket", "dog face", "slice of pizza")
# Goes with the pipeline into its output, and so into the record, by which a rerun knows what it may replace.
_README = "A small pipeline, converted by `fp8-convert demo`; delete it at will.\n"
_PICTURE_KEY = "fp8-convert demo"


def run_demo(output: Path, say: Callable[[str], None], model: Path = EMOJI) -> None:
    """Convert a small pipeline into `output`, verify, load and run it; a picture beside the folder shows BF16 and FP8.

    model: the trained snapshot that comes with the package; where it is missing, random weights are painted with.
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
        source = Path(folder, "source")
        trained = _make_source(source, model, say)
        result = convert(source, output, force=again)
        say(render_result(result))
        say("")
        say(render_inspection(inspect(output)))
        say("")
        say(render_verification(verify(output, source=source)).replace(str(source), "the source"))
        original = _original_pictures(source)
    # The demo stands above both halves, and nothing else here imports the loader; late, so that it can speak at once.
    from ...loader import load_pipeline, report
    from ...loader.quality.pictures import psnr

    with bars_of_libraries():
        pipeline = load_pipeline(output)
    converted = _painted(pipeline)
    _save(_sheet({"BF16": original, "FP8": converted}), picture)
    apart = ", ".join(f"{psnr(ours, theirs):.1f}" for ours, theirs in zip(converted, original, strict=True))
    say(f"generated {picture}: {', '.join(PROMPTS)}; BF16 above, FP8 below, {apart} dB apart (PSNR)")
    if not trained:
        say("The trained model is not installed, and random weights paint noise: this says nothing about quality.")
    say("")
    say(str(report(pipeline)))


def _make_source(folder: Path, model: Path, say: Callable[[str], None]) -> bool:
    """Put the pipeline to convert into a folder; whether it is a trained one."""
    trained = (model / "model_index.json").is_file()
    if trained:
        say("taking a small trained Z-Image that paints emoji (24 MB) ...")
        shutil.copytree(model, folder)
    else:
        say("building a tiny random Z-Image pipeline (11 MB) ...")
        build_tiny_pipeline(folder)
    (folder / "README.md").write_text(_README)
    return trained


def _original_pictures(source: Path) -> torch.Tensor:
    from diffusers import DiffusionPipeline

    return _painted(DiffusionPipeline.from_pretrained(source, dtype=torch.bfloat16))


def _painted(pipeline: Any) -> torch.Tensor:
    """A picture for each prompt from the same noise, [prompts, 3, 64, 64], 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: torch.Tensor = pipeline(
        list(PROMPTS),
        height=64,
        width=64,
        num_inference_steps=9,
        guidance_scale=0.0,
        max_sequence_length=64,
        generator=[torch.Generator("cpu").manual_seed(0) for _ in PROMPTS],
        output_type="pt",
    ).images
    return pictures.float().cpu()


def _sheet(rows: dict[str, torch.Tensor], size: int = 192) -> Any:
    """Rows of pictures with their names on the left."""
    from PIL import Image, ImageDraw  # late, as the loader that brings it

    sheet = Image.new("RGB", (48 + size * len(PROMPTS), size * len(rows)), "white")
    for row, (name, pictures) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((8, size * row + size // 2), name, fill="black")
        for column, pixels in enumerate((255 * pictures).round().byte().permute(0, 2, 3, 1).numpy()):
            painted = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            sheet.paste(painted, (48 + size * column, size * row))
    return sheet


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
