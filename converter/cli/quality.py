"""The commands that run pipelines to tell what FP8 did to them. Like the demo they use the loader, imported late."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..output.work import DEVICES
from .options import (
    compact_option,
    hub_options,
    ignored_layers_option,
    json_option,
    manifest_option,
    quiet_option,
    together,
    weight_block_size_option,
)
from .session import errors, progress_of

_CONTROLS = ("attention", "dtype", "batch", "none")


class Argument(click.ParamType):  # type: ignore[type-arg]
    """NAME=VALUE, where the value is JSON or else text."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r} is not NAME=VALUE, such as max_sequence_length=64.", param, ctx)
        try:
            return name, json.loads(text)
        except ValueError:
            return name, text


@click.command("compare")
@click.argument("fp8", metavar="[FP8]")
@click.argument("original", required=False, metavar="ORIGINAL")
@click.option(
    "--prompts", required=True, type=click.Path(path_type=Path), help="File of prompts: a line each, .json or .jsonl."
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many for each prompt.")
@click.option("--steps", type=click.IntRange(1), help="Sampling steps; the pipeline's own number by default.")
@click.option("--height", type=click.IntRange(1), help="Pixels.")
@click.option("--width", type=click.IntRange(1), help="Pixels.")
@click.option("--frames", type=click.IntRange(1), help="Of a video.")
@click.option("--guidance", type=float, help="Scale of classifier-free guidance.")
@click.option("--argument", "extra", type=Argument(), multiple=True, help="Another of the pipeline's call. Repeatable.")
@click.option(
    "--control",
    type=click.Choice(_CONTROLS),
    default="attention",
    show_default=True,
    help="The harmless change of the original that FP8 is held against.",
)
@click.option("--lpips/--no-lpips", default=None, help="Measure LPIPS; by default where the extra is installed.")
@click.option("--fail-below", metavar="PSNR", type=float, help="Exit with 1 if a frame's PSNR is lower, in dB.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="HTML page to write.")
@click.option(
    "--shown", type=click.IntRange(0), default=12, show_default=True, help="Cases on the page, the farthest first."
)
@click.option("--force", is_flag=True, help="Replace a file that is no page of compare.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where pipelines run.")
@click.option("--offload", is_flag=True, help="Keep components in the CPU's memory until they are needed.")
@ignored_layers_option
@compact_option
@weight_block_size_option
@manifest_option
@click.option("--fp8-revision", help="Branch, tag or commit of the FP8 repository; --revision is the original's.")
@hub_options
@json_option
@quiet_option
def compare_command(
    fp8: str,
    original: str | None,
    extra: tuple[tuple[str, Any], ...],
    device: str,
    ignored_layers: tuple[list[str], ...],
    compact: bool,
    weight_block_size: tuple[int, int] | None,
    manifest: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Run FP8 and ORIGINAL on the same prompts and tell how far their pictures are apart, and which layers are wrong.

    Without FP8, ORIGINAL is converted while it loads. Exit code 1 if something is wrong.

    \b
    Example:
      fp8-convert compare qwen-image-fp8 Qwen/Qwen-Image --prompts prompts.txt --seeds 2 -o report.html
      fp8-convert compare Qwen/Qwen-Image --ignored-layers img_mlp --prompts prompts.txt --steps 20
    """
    recipe = {"compact": compact, "manifest": manifest} | _config(together(ignored_layers), weight_block_size)
    asked = {name: value for name, value in recipe.items() if value}
    if original is not None and asked:
        raise click.UsageError(
            f"FP8 is converted already; drop {', '.join(_option(name) for name in asked)}, or drop FP8 to convert "
            "ORIGINAL while it loads."
        )
    with errors() as stopping, progress_of(stopping, options["quiet"]) as progress:
        from ...loader import compare

        found = compare(
            fp8 if original is not None else None,
            original if original is not None else fp8,
            extra=dict(extra),
            device=None if device == "auto" else device,
            progress=progress,
            **asked,
            **options,
        )
        progress.close()
        click.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))
        if not found.ok:
            sys.exit(1)


def _config(ignored_layers: list[str], block: tuple[int, int] | None) -> dict[str, Any]:
    """`quantization_config` of load_pipeline, if anything is asked for."""
    config: dict[str, Any] = {"ignored_layers": ignored_layers} if ignored_layers else {}
    if block is not None:
        config["weight_block_size"] = block
    return {"quantization_config": {"method": "fp8", **config}} if config else {}


def _option(name: str) -> str:
    return "--ignored-layers and --weight-block-size" if name == "quantization_config" else f"--{name}"
