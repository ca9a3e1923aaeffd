"""The command line: options in, one library call, errors as one sentence. No logic of its own."""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click_default_group import DefaultGroup

from ..output.work import DEVICES
from ..plan.recipe import ACTIVATION_SCHEMES, tool_version
from ..plan.refused import PlanRefusedError
from ..snapshot.access import HubAccess
from ..targets.choosing import TARGETS
from .batch import batch_command
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
from .quality import calibrate_command, compare_command, sensitivity_command
from .session import errors, progress_of

# What a command does is imported in it: PyTorch takes seconds, and help and first words should not.

_COMMANDS = (
    "convert", "batch", "inspect", "verify", "compare", "sensitivity", "calibrate", "push", "dequantize", "import",
    "manifests", "demo",
)  # fmt: skip


class Commands(DefaultGroup):  # type: ignore[misc]
    """`fp8-convert SOURCE` is `fp8-convert convert SOURCE`, and the root help is that command's."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        command = self.get_command(ctx, "convert")
        assert command is not None
        formatter.write_usage("fp8-convert", "SOURCE -o OUT [OPTIONS]   or   fp8-convert COMMAND …")
        command.format_help_text(ctx, formatter)
        command.format_options(click.Context(command, info_name="fp8-convert", parent=ctx), formatter)
        with formatter.section("Version"):
            formatter.write_dl([("-V, --version", "Show the version and exit.")])
        self.format_commands(ctx, formatter)


class Conversion(click.Command):
    """The default command; a SOURCE that looks like a mistyped command is caught before the Hub is asked."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        self._suggest(args[0] if args else "")  # before click complains of what follows it
        rest = super().parse_args(ctx, args)
        self._suggest(ctx.params.get("source") or "")
        return rest

    def _suggest(self, source: str) -> None:
        if "/" not in source and not Path(source).exists():
            near = difflib.get_close_matches(source, _COMMANDS, n=1, cutoff=0.7)
            if near:
                raise click.UsageError(f"{source!r} is not a folder; did you mean the command `fp8-convert {near[0]}`?")


@click.group(cls=Commands, default="convert", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tool_version(), "-V", "--version", prog_name="fp8-convert")
def main() -> None:
    """FP8 checkpoints for diffusion pipelines."""


for _command in (batch_command, compare_command, sensitivity_command, calibrate_command):
    main.add_command(_command)


@main.command("convert", cls=Conversion, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write the FP8 snapshot to.")
@click.option("--dry-run", is_flag=True, help="Print the plan, from headers alone; no weights are downloaded.")
@json_option
@click.option("--quantization", type=click.Choice(["fp8"]), default="fp8", show_default=True, help="The format.")
@manifest_option
@ignored_layers_option
@click.option(
    "--component",
    "components",
    metavar="NAME",
    multiple=True,
    help="Convert only this one; others are copied (comfyui: left out). Repeatable.",
)
@compact_option
@weight_block_size_option
@click.option(
    "--activation-scheme",
    type=click.Choice(ACTIVATION_SCHEMES),
    default="dynamic",
    show_default=True,
    help="Activation scales: computed while running, or stored.",
)
@click.option(
    "--input-scales",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Safetensors file of NAME.input_scale scalars, for static activations.",
)
@click.option(
    "--merge-lora",
    metavar="FILE[:SCALE]",
    multiple=True,
    help="Add a LoRA to the weights first; COMPONENT=FILE where there are two DiTs. Repeatable.",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Where the arithmetic runs; the bytes are the same.",
)
@click.option("--workers", type=click.IntRange(1), help="CPU threads for the arithmetic, for all shards.")
@click.option("--shards", type=click.IntRange(1), help="How many shards are converted at the same time.")
@click.option("--read-back", is_flag=True, help="Read what was written from the disk again, and compare it.")
@click.option(
    "--target",
    type=click.Choice([*TARGETS]),
    default="native",
    show_default=True,
    help="Who is to read the output; native is fp8-convert's own loader.",
)
@click.option("--stream", is_flag=True, help="Hub id: download shard by shard and keep none; needs room for two.")
@click.option("--max-shard-size", metavar="SIZE", help="Cut larger output files, as in diffusers: 5GB, 500MB.")
@click.option("--force", is_flag=True, help="Replace a finished FP8 snapshot.")
@click.option("--check", is_flag=True, help="If the snapshot is finished already, read it and compare its digests.")
@hub_options
@quiet_option
def convert_command(
    source: str,
    output: Path | None,
    dry_run: bool,
    as_json: bool,
    ignored_layers: tuple[list[str], ...],
    quiet: bool,
    **settings: Any,
) -> None:
    """Convert a diffusers snapshot (a folder or a Hub id) to FP8.

    \b
    Example:
      fp8-convert Qwen/Qwen-Image -o qwen-image-fp8
      fp8-convert Qwen/Qwen-Image --dry-run
      fp8-convert ./my-pipeline -o out --ignored-layers img_mlp,transformer_blocks.0
    """
    settings["ignored_layers"] = together(ignored_layers)
    if not dry_run and output is None:
        raise click.UsageError("Name the output folder with -o, or pass --dry-run.")
    with errors("run the same command again to resume") as stopping, progress_of(stopping, quiet) as progress:
        from .. import convert, plan_conversion

        if dry_run:
            for unused in ("device", "workers", "shards", "read_back", "stream", "force", "check"):
                del settings[unused]
            hub = ("revision", "token", "cache_dir", "local_files_only", "variant")
            options = HubAccess(**{name: settings.pop(name) for name in hub}, quiet=quiet)
            refusal = None
            try:
                plan = plan_conversion(source, options=options, progress=progress, **settings)
            except PlanRefusedError as error:  # the plan shows why
                plan, refusal = error.plan, error
            from .render import render_plan, terminal_width

            click.echo(json.dumps(plan.to_json(), indent=2) if as_json else render_plan(plan, terminal_width()))
            if refusal is not None:
                raise refusal
            return
        assert output is not None
        result = convert(source, output, progress=progress, quiet=quiet, **settings)
        from .render import render_result

        progress.close()
        click.echo(json.dumps(result.to_json(), indent=2) if as_json else render_result(result))


@main.command("inspect")
@click.argument("source")
@click.option("--worst", type=click.IntRange(1), metavar="N", help="Also the N layers whose FP8 codes miss most.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a page with a plot of them."
)
@hub_options
@json_option
def inspect_command(source: str, worst: int | None, html: Path | None, as_json: bool, **hub: Any) -> None:
    """Show what is FP8, what is not, and why: a folder, a Hub id (not downloaded) or a .safetensors file.

    Exit code 1 if something is wrong with it.

    \b
    Example:
      fp8-convert inspect qwen-image-fp8
      fp8-convert inspect qwen-image-fp8 --worst 10 --html qwen-image-fp8.html
      fp8-convert inspect Qwen/Qwen-Image
      fp8-convert inspect flux1-dev-fp8.safetensors
    """
    with errors():
        from .. import inspect
        from .render import render_inspection, terminal_width

        inspection = inspect(source, options=HubAccess(**hub))
        if html is not None:
            from ..output.writing import write_small
            from .inspection_page import inspection_page

            write_small(html, inspection_page(inspection).encode(), str(html))
        if as_json:
            click.echo(json.dumps(inspection.to_json(), indent=2))
        else:
            click.echo(render_inspection(inspection, terminal_width(), worst or 0))
        if not inspection.ok:
            sys.exit(1)


@main.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--source", help="Folder or Hub id it was converted from: compare codes and scales with it.")
@click.option("--manifest", metavar="NAME|PATH", help="The manifest it was converted with, if it was your own.")
@click.option("--merge-lora", metavar="FILE[:SCALE]", multiple=True, help="With --source: each LoRA that was merged.")
@hub_options
@json_option
@quiet_option
def verify_command(
    path: Path,
    source: str | None,
    manifest: str | None,
    merge_lora: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **hub: Any,
) -> None:
    """Check every digest, header, scale, index and config; exit code 1 if something is wrong.

    \b
    Example:
      fp8-convert verify qwen-image-fp8
      fp8-convert verify qwen-image-fp8 --source Qwen/Qwen-Image
    """
    if source is None and (manifest is not None or merge_lora or any(hub.values())):
        raise click.UsageError(
            "Name the source with --source; --manifest, --merge-lora and the Hub's options say how to read it."
        )
    with errors() as stopping, progress_of(stopping, quiet) as progress:
        from .. import verify
        from .render import render_verification

        options = HubAccess(**hub, quiet=quiet)
        found = verify(
            path, source=source, manifest=manifest, merge_lora=merge_lora, options=options, progress=progress
        )
        progress.close()
        click.echo(json.dumps(found.to_json(), indent=2) if as_json else render_verification(found))
        if not found.ok:
            sys.exit(1)


@main.command("push")
@click.argument("path", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--revision", help="Branch to push to, created if need be; main by default.")
@click.option("--message", help="The commit's message.")
@click.option("--token", help="Hub token with write access; by default the one you logged in with.")
@click.option("--dry-run", is_flag=True, help="Print the model card and what would be uploaded; no connection is made.")
@json_option
@quiet_option
def push_command(path: Path, repo: str, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Upload a converted snapshot to the Hub, with a model card of its own.

    \b
    Example:
      fp8-convert push qwen-image-fp8 me/qwen-image-fp8
      fp8-convert push qwen-image-fp8 me/qwen-image-fp8 --dry-run
    """
    advice = "run the same command again; what the Hub has is not sent twice"
    # The Hub's client would try to send for a while yet.
    with errors(advice, at_once=True) as stopping, progress_of(stopping, quiet) as progress:
        from .. import push

        pushed = push(path, repo, progress=progress, quiet=quiet, **settings)
        from .render import render_push

        for note in pushed.notes:
            progress.say(f"note: {note}")
        progress.close()
        click.echo(json.dumps(pushed.to_json(), indent=2) if as_json else render_push(pushed))


@main.command("dequantize")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write the plain snapshot to."
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Of the weights that are FP8; the others stay as they are.",
)
@json_option
@quiet_option
def dequantize_command(path: Path, output: Path, dtype: str, as_json: bool, quiet: bool) -> None:
    """Write an FP8 snapshot with plain weights, as stock diffusers and transformers load it.

    \b
    Example:
      fp8-convert dequantize qwen-image-fp8 -o qwen-image-bf16
    """
    with errors("run the same command again to resume") as stopping, progress_of(stopping, quiet) as progress:
        from .. import dequantize

        result = dequantize(path, output, dtype=dtype, progress=progress)
        progress.close()
        click.echo(json.dumps(result.to_json(), indent=2) if as_json else f"wrote {result.summary}")


@main.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write the FP8 snapshot to.")
@click.option("--base", metavar="FOLDER|HUB_ID", help="Snapshot that gives config, classes and other components.")
@click.option("--component", metavar="NAME", help="Which of the base's components SOURCE is, if several fit.")
@manifest_option
@click.option("--dry-run", is_flag=True, help="Print the plan, from headers and scales alone.")
@click.option("--force", is_flag=True, help="Replace a finished FP8 snapshot.")
@hub_options
@json_option
@quiet_option
def import_command(
    source: Path, output: Path | None, dry_run: bool, force: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Take over the FP8 weights of another tool's checkpoint: a .safetensors file or a folder.

    \b
    Example:
      fp8-convert import qwen_image_fp8.safetensors --base Qwen/Qwen-Image -o qwen-image-fp8
      fp8-convert import modelopt-pipeline -o out
    """
    if not dry_run and output is None:
        raise click.UsageError("Name the output folder with -o, or pass --dry-run.")
    with errors("run the same command again to resume") as stopping, progress_of(stopping, quiet) as progress:
        from .. import import_checkpoint, plan_import_checkpoint
        from .render import render_plan, render_result, terminal_width

        if dry_run:
            own = {name: options.pop(name) for name in ("base", "component", "manifest")}
            plan = plan_import_checkpoint(source, **own, options=HubAccess(**options, quiet=quiet))
            click.echo(json.dumps(plan.to_json(), indent=2) if as_json else render_plan(plan, terminal_width()))
            return
        assert output is not None
        result = import_checkpoint(source, output, force=force, progress=progress, quiet=quiet, **options)
        progress.close()
        click.echo(json.dumps(result.to_json(), indent=2) if as_json else render_result(result))


@main.group("manifests", invoke_without_command=True)
@json_option
@click.pass_context
def manifests_command(context: click.Context, as_json: bool) -> None:
    """List the shipped manifests and what their rules rest on; show one, or check one against a model.

    \b
    Example:
      fp8-convert manifests
      fp8-convert manifests show qwen-image > mine.toml
      fp8-convert manifests check mine.toml Qwen/Qwen-Image
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError(f"Put --json behind `manifests {context.invoked_subcommand}`.")
        return
    from ..plan.evidence import evidence
    from ..plan.manifest import shipped

    manifests = list(shipped().values())
    if as_json:
        entries = [
            {
                "name": m.name,
                "description": m.description,
                "repos": m.repos,
                "pipelines": m.pipelines,
                "evidence": asdict(evidence(m)),
            }
            for m in manifests
        ]
        click.echo(json.dumps(entries, indent=2))
    else:
        from .render import render_manifests, terminal_width

        click.echo(render_manifests(manifests, terminal_width()))


@manifests_command.command("show")
@click.argument("manifest", metavar="NAME|PATH")
@json_option
def show_command(manifest: str, as_json: bool) -> None:
    """Print a manifest's TOML with the evidence of every pattern, to read or as a start for your own.

    \b
    Example: fp8-convert manifests show qwen-image > mine.toml
    """
    with errors():
        from .. import load_manifest

        found = load_manifest(manifest)
        click.echo(json.dumps(found.to_json(), indent=2) if as_json else found.text, nl=as_json)


@manifests_command.command("check")
@click.argument("manifest", metavar="NAME|PATH")
@click.argument("source")
@hub_options
@json_option
def check_command(manifest: str, source: str, as_json: bool, **hub: Any) -> None:
    """Show what each entry of a manifest matches in SOURCE; exit code 1 if one matches nothing that must.

    \b
    Example: fp8-convert manifests check mine.toml Qwen/Qwen-Image
    """
    with errors():
        from .. import check_manifest
        from .render import render_manifest_check, terminal_width

        found = check_manifest(manifest, source, options=HubAccess(**hub))
        click.echo(json.dumps(found.to_json(), indent=2) if as_json else render_manifest_check(found, terminal_width()))
        if not found.ok:
            sys.exit(1)


@main.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder to write to; an earlier demo in it is replaced.",
)
def demo_command(output: Path) -> None:
    """Run everything once on a small built-in model that paints emoji, in BF16 and in FP8.

    \b
    Example: fp8-convert demo
    """
    with errors():
        from .demo import run_demo

        run_demo(output, click.echo)
