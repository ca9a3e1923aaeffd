"""`fp8-convert batch`: a catalogue of conversions, here or on a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click

from .options import json_option, quiet_option
from .session import errors, progress_of

_HERE = "here"  # what --ray alone stands for


@click.command("batch")
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
    with errors("run the same command again to resume") as stopping, progress_of(stopping, quiet) as progress:
        from .. import batch

        with contextlib.redirect_stdout(sys.stderr):  # where Ray would print what it has to say of lost workers
            done = batch(
                jobs,
                ray=False if ray is None else ray == _HERE or ray,
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
