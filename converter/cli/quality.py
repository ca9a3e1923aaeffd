"""The commands that run pipelines to tell what FP8 did to them. Like the demo they use the loader, imported late."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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
_METHODS = ("max", "percentile", "mse")
_UNITS = ("layer", "block", "pattern")
_DTYPES = ("bfloat16", "float16", "float32")

F = TypeVar("F", bound=Callable[..., Any])


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


def _sampling_options(function: F) -> F:
    """What is run, and where."""
    whole = click.IntRange(1)
    for option in reversed(
        (
            click.option(
                "--prompts",
                required=True,
                type=click.Path(path_type=Path),
                help="File of prompts: a line each, .json or .jsonl.",
            ),
            click.option("--seeds", type=whole, default=1, show_default=True, help="How many for each prompt."),
            click.option("--steps", type=whole, help="Sampling steps; the pipeline's own number by default."),
            click.option("--height", type=whole, help="Pixels."),
            click.option("--width", type=whole, help="Pixels."),
            click.option("--frames", type=whole, help="Of a video."),
            click.option("--guidance", type=float, help="Scale of classifier-free guidance."),
            click.option(
                "--argument",
                "extra",
                type=Argument(),
                multiple=True,
                help="Another of the pipeline's call. Repeatable.",
            ),
            click.option(
                "--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where pipelines run."
            ),
        )
    ):
        function = option(function)
    return function


@click.command("compare")
@click.argument("fp8", metavar="[FP8]")
@click.argument("original", required=False, metavar="ORIGINAL")
@_sampling_options
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


@click.command("calibrate")
@click.argument("original")
@_sampling_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Safetensors file to write.")
@click.option("--method", type=click.Choice(_METHODS), default="max", show_default=True, help="How ranges are chosen.")
@click.option("--percentile", type=float, default=99.9, show_default=True, help="Of --method percentile.")
@ignored_layers_option
@click.option("--component", "components", metavar="NAME", multiple=True, help="Calibrate only this one. Repeatable.")
@manifest_option
@click.option("--dtype", type=click.Choice(_DTYPES), default="bfloat16", show_default=True, help="Of the pipeline.")
@click.option("--force", is_flag=True, help="Replace the output file.")
@hub_options
@json_option
@quiet_option
def calibrate_command(original: str, as_json: bool, **options: Any) -> None:
    """Run ORIGINAL and choose the static activation scale of every W8A8 layer, for --input-scales.

    \b
    Example:
      fp8-convert calibrate Qwen/Qwen-Image --prompts prompts.txt -o scales.safetensors
      fp8-convert Qwen/Qwen-Image -o out --activation-scheme static --input-scales scales.safetensors
    """
    with errors() as stopping, progress_of(stopping, options["quiet"]) as progress:
        from ...loader import calibrate

        found = calibrate(original, progress=progress, **_asked(options))
        progress.close()
        click.echo(json.dumps(found.to_json(), indent=2) if as_json else f"{found}\nwrote {options['output']}")


@click.command("sensitivity")
@click.argument("original")
@_sampling_options
@click.option("--fp8", metavar="SNAPSHOT", help="Measure this snapshot of ORIGINAL, and name its wrong layers.")
@click.option("--by", type=click.Choice(_UNITS), default="layer", show_default=True, help="What is ranked as one.")
@click.option("--budget", metavar="40dB|200MB", help="Propose what to keep: dB of the models' output, or bytes.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Manifest to write the proposal to.")
@click.option("--check", is_flag=True, help="Also make every picture without and with the proposal.")
@ignored_layers_option
@click.option("--component", "components", metavar="NAME", multiple=True, help="Measure only this one. Repeatable.")
@compact_option
@weight_block_size_option
@click.option("--input-scales", type=click.Path(path_type=Path), help="Measure static activations with these scales.")
@manifest_option
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the pipeline; float32 by default where it fits.")
@click.option("--force", is_flag=True, help="Replace the output file.")
@hub_options
@json_option
@quiet_option
def sensitivity_command(original: str, as_json: bool, **options: Any) -> None:
    """Rank ORIGINAL's layers by what FP8 of each does to the output, and propose what to keep for a budget.

    Exit code 1 if a layer of --fp8 is not what FP8 of the original would be.

    \b
    Example:
      fp8-convert sensitivity Qwen/Qwen-Image --prompts prompts.txt --steps 20 --budget 200MB -o mine.toml
      fp8-convert Qwen/Qwen-Image -o out --manifest mine.toml
      fp8-convert sensitivity Qwen/Qwen-Image --fp8 out --prompts prompts.txt --steps 20
    """
    if options["input_scales"] is not None:
        options["activation_scheme"] = "static"
    with errors() as stopping, progress_of(stopping, options["quiet"]) as progress:
        from ...loader import sensitivity

        found = sensitivity(original, progress=progress, **_asked(options))
        progress.close()
        click.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))
        if options["output"] is not None and not as_json:
            click.echo(f"wrote {options['output']}")
        if not found.ok:
            sys.exit(1)


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the functions take them."""
    device = None if options["device"] == "auto" else options["device"]
    return options | {
        "ignored_layers": together(options["ignored_layers"]),
        "extra": dict(options["extra"]),
        "device": device,
    }


def _config(ignored_layers: list[str], block: tuple[int, int] | None) -> dict[str, Any]:
    """`quantization_config` of load_pipeline, if anything is asked for."""
    config: dict[str, Any] = {"ignored_layers": ignored_layers} if ignored_layers else {}
    if block is not None:
        config["weight_block_size"] = block
    return {"quantization_config": {"method": "fp8", **config}} if config else {}


def _option(name: str) -> str:
    return "--ignored-layers and --weight-block-size" if name == "quantization_config" else f"--{name}"
