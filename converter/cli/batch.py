"""`fp8-convert batch`: a catalogue of conversions, here or on a Ray cluster."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from .options import json_option, quiet_option
from .session import errors, progress_of

_HERE = "here"  # what --ray alone stands for


class _Batch(click.Command):
    """--ray takes the word after it for an address: say so where that was the file of jobs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for option, word in itertools.pairwise(args):
            if option == "--ray" and (word.endswith(".jsonl") or Path(word).is_file()):
                raise click.UsageError(f"Put {word} before --ray, which takes the word after it for an address.", ctx)
        return super().parse_args(ctx, args)


@click.command("batch", cls=_Batch)
@click.argument("jobs", type=click.Path(dir_okay=False, path_type=Path), metavar="JOBS.jsonl")
@click.option(
    "--ray",
    is_flag=False,
    flag_value=_HERE,
    metavar="[ADDRESS]",
    help="Run the jobs on Ray: on the cluster at ADDRESS (auto, host:6379), or started on this machine.",
)
@click.option(
    "--cpus-per-job", type=click.IntRange(1), default=2, show_default=True, help="On Ray: what each job is given."
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="How often a job is tried again that was stopped from outside: by the network, a full disk, a lost worker.",
)
@click.option("--dry-run", is_flag=True, help="Plan every job, from headers alone; no weights are downloaded.")
@click.option("--token", help="Hub token for all jobs; by default the one that each machine is logged in with.")
@json_option
@quiet_option
def batch_command(
    jobs: Path,
    ray: str | None,
    cpus_per_job: int,
    retries: int,
    dry_run: bool,
    token: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert many snapshots: a line of JOBS.jsonl each, with the arguments of a conversion.

    A job that fails stops no other; what is finished is left as it is when the command is run again. Exit code 1 if
    any failed.

    \b
    Example:
      fp8-convert batch jobs.jsonl
      fp8-convert batch jobs.jsonl --ray --cpus-per-job 4 --json > summary.json
      fp8-convert batch jobs.jsonl --ray 10.0.0.1:6379
    where a line of jobs.jsonl is
      {"source": "me/my-finetune", "output": "fp8/my-finetune", "compact": true}
    """
    if ray is None and click.get_current_context().get_parameter_source("cpus_per_job") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--cpus-per-job says what a job is given on Ray; pass --ray too.")
    with errors("run the same command again to resume") as stopping, progress_of(stopping, quiet) as progress:
        from .. import batch

        with contextlib.redirect_stdout(sys.stderr):  # where Ray would print what it has to say of lost workers
            done = batch(
                jobs,
                ray=ray == _HERE or ray,
                cpus_per_job=cpus_per_job,
                retries=retries,
                dry_run=dry_run,
                token=token,
                progress=progress,
            )
        progress.close()
        click.echo(json.dumps(done.to_json(), indent=2) if as_json else "\n".join(done.lines()))
        if not done.ok:
            sys.exit(1)
