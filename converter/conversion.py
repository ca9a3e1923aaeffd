"""`convert`: from a source and a few options to an FP8 snapshot on disk. The door of a conversion."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .format.untrusted import check_text
from .output.work import Work
from .plan.manifest import choose_manifest
from .plan.settings import Settings
from .snapshot.access import HubAccess
from .snapshot.describing import outline
from .snapshot.files import Files
from .snapshot.locate import describe_source, open_files
from .telling.errors import ConvertError
from .telling.notebook import one_line
from .telling.progress import Progress, Silent
from .telling.quantities import change

if TYPE_CHECKING:
    from .plan.plan import Plan

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True, repr=False)
class Result:
    """What a conversion did. Bytes are those of the weights' files.

    snapshot_sha256: the record's digest of itself, which covers source, recipe and every file. peak_rss: the process's
    peak memory in bytes, None where the platform does not tell. already_done: the snapshot was there, and is what this
    call would have written.
    """

    plan: Plan
    output: Path
    bytes_before: int
    bytes_after: int
    seconds: float
    resumed_shards: int
    peak_rss: int | None
    snapshot_sha256: str
    already_done: bool = False

    def __repr__(self) -> str:
        return one_line(self, self._summary)

    def _repr_html_(self) -> str:
        from .plan.showing import plan_html

        return plan_html(self.plan, self._summary)

    @property
    def _summary(self) -> str:
        done = ", already done" if self.already_done else f" in {self.seconds:.1f} s"
        return f"{self.output}: {change(self.bytes_before, self.bytes_after)}{done}"

    @property
    def gigabytes_per_second(self) -> float:
        """Source bytes over the whole time, download included."""
        return self.bytes_before / 1e9 / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The summary for scripts; the plan's tensors are left out."""
        return {
            "output": str(self.output),
            "source": self.plan.snapshot.label,
            "commit": self.plan.snapshot.commit,
            "manifest": self.plan.recipe.manifest.name,
            "target": self.plan.recipe.target,
            "recipe_sha256": self.plan.recipe.sha256(),
            "snapshot_sha256": self.snapshot_sha256,
            "already_done": self.already_done,
            "notes": list(self.plan.notes),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": round(self.seconds, 3),
            "gigabytes_per_second": round(self.gigabytes_per_second, 3),
            "resumed_shards": self.resumed_shards,
            "peak_rss": self.peak_rss,
        }


def plan_conversion(
    source: str | os.PathLike[str],
    *,
    quantization: str = "fp8",
    manifest: str | None = None,
    ignored_layers: Sequence[str] = (),
    components: Sequence[str] = (),
    compact: bool = False,
    weight_block_size: Sequence[int] | None = None,
    activation_scheme: str = "dynamic",
    input_scales: str | os.PathLike[str] | None = None,
    max_shard_size: int | str | None = None,
    target: str = "native",
    merge_lora: Sequence[Any] = (),
    options: HubAccess | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan a conversion from headers alone; a Hub id is not downloaded. Arguments are those of `convert`."""
    settings, access = Settings.among(locals()), options or HubAccess()
    return _plan(open_files(source, access), settings, access, progress or Silent())


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quantization: str = "fp8",
    manifest: str | None = None,
    ignored_layers: Sequence[str] = (),
    components: Sequence[str] = (),
    compact: bool = False,
    weight_block_size: Sequence[int] | None = None,
    activation_scheme: str = "dynamic",
    input_scales: str | os.PathLike[str] | None = None,
    max_shard_size: int | str | None = None,
    target: str = "native",
    merge_lora: Sequence[Any] = (),
    device: str = "auto",
    workers: int | None = None,
    shards: int | None = None,
    read_back: bool = False,
    stream: bool = False,
    force: bool = False,
    check: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Result:
    """Convert a diffusers snapshot into an FP8 snapshot.

    source: a folder (a pipeline, or one component) or a Hub repo id. output: the folder to create.
    manifest: a shipped manifest's name or a path to a TOML file; None chooses by repo id and class names.
    ignored_layers: patterns of DiT layers that stay in the source dtype, beside the manifest's.
    components: restricts the conversion; the other components are copied.
    compact: FP8 storage for the layers that W8A8 must skip, where the manifest names them.
    weight_block_size: (rows, columns) of a scale's block in the DiT; None is the manifest's choice (per tensor).
    activation_scheme: "dynamic", or "static" with input_scales, a safetensors file of `NAME.input_scale` scalars.
    max_shard_size: cuts larger output files, as in diffusers: bytes or such as "5GB"; None keeps the source's shards.
    target: who is to read the output: "native" (this project's loader), "vllm-omni", "sglang", or "comfyui" (one file a
    component, for ComfyUI's folders).
    merge_lora: LoRAs to add to the weights first: each "[COMPONENT=]FILE.safetensors[:SCALE]", or file and scale.
    device: "cpu", "cuda" or "auto"; the bytes are the same.
    workers: CPU threads for the arithmetic, for all shards. shards: how many are converted at the same time. None is
    what fits the machine's cores and memory.
    read_back: read what was written from the disk again, and compare it.
    stream: for a Hub id, download shard by shard beside the conversion and keep none; needs room for two.
    force: replace a finished FP8 snapshot. check: read a finished one again and compare its digests.
    revision, token, cache_dir, local_files_only: as in huggingface_hub.
    variant: takes `*.VARIANT.safetensors` where a component has them.
    progress: is told how far the work is. quiet: without it the Hub's client draws bars on a terminal.

    Memory stays bounded whatever the model's size. An interrupted conversion is resumed by the same call, and a
    finished one is left as it is (`already_done`); an unfinished one never looks like a snapshot. Raises ConvertError
    with a sentence for the user.
    """
    settings = Settings.among(locals())
    access = HubAccess(revision, token, cache_dir, local_files_only, variant, quiet=quiet)
    work = Work(
        device=device, workers=workers, shards=shards, read_back=read_back, stream=stream, force=force, check=check
    )
    return convert_with(settings, source, Path(output), access, work, progress or Silent())


def convert_with(
    settings: Settings,
    source: str | os.PathLike[str],
    output: Path,
    access: HubAccess,
    work: Work,
    progress: Progress,
) -> Result:
    """As `convert`, from its settings."""
    started = time.monotonic()
    files = open_files(source, access)
    plan = _plan(files, settings, access, progress)
    check_outside(output, source)
    digest = None if work.force else finished_already(plan, files, output, work.check, progress)
    already, resumed = digest is not None, 0
    if digest is None:
        from .output.run import run

        digest, resumed = run(plan, files, output, work, progress)
    progress.say(
        f"commit {plan.snapshot.commit or 'none (a folder)'}, recipe {plan.recipe.sha256()}, snapshot {digest}"
    )
    return Result(
        plan,
        output,
        plan.bytes_to_read,
        plan.weight_bytes,
        time.monotonic() - started,
        resumed,
        peak_rss(),
        digest,
        already,
    )


def _plan(files: Files, settings: Settings, access: HubAccess, progress: Progress) -> Plan:
    own = settings.own_manifest()
    if headline := _headline(files, own.name if own else None):
        progress.say(headline)
    # Only now, since it imports PyTorch: what is begun was said.
    from .plan.planning import make_plan

    snapshot = describe_source(files, access)
    return make_plan(snapshot, settings.resolve(snapshot, own))


def peak_rss() -> int | None:
    """The process's peak resident memory in bytes, None where the platform does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def finished_already(plan: Plan, files: Files, output: Path, check: bool, progress: Progress) -> str | None:
    """The digest of the finished snapshot in `output`, if that is what `plan` gives; None if there is none.

    Raises ConvertError for a finished snapshot that is another one, or damaged.
    """
    from .finished import check_finished
    from .output.journal import journalled_key
    from .output.record import check_record, load_record
    from .output.run import conversion_key

    if journalled_key(output) == conversion_key(plan):
        return None  # this conversion was interrupted when all but the record's name was done: finish it
    try:
        record = load_record(output)
        if record is None or check_record(output) is not None:
            return None
    except ConvertError:  # no record that can be used
        return None
    check_finished(record, plan, files, output, check=check, progress=progress)
    return record.record_sha256


def _headline(files: Files, manifest: str | None) -> str | None:
    """Source, commit and manifest in one line, from the model index alone; None if it is not a snapshot."""
    pipeline, classes = outline(files)
    if not classes:
        return None
    name = manifest or choose_manifest(files.repo, pipeline, classes).name
    where = f"commit {files.commit}" if files.commit else "a folder"
    return f"{files.label} ({where}), manifest {name}"


def check_outside(output: Path, source: str | os.PathLike[str]) -> None:
    check_text(output, "The output folder")
    if not Path(source).is_dir():
        return
    if output.resolve().is_relative_to(Path(source).resolve()):
        raise ConvertError(f"{output} is the source or is inside it; choose another folder for the output.")
