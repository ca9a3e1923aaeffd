"""`import_checkpoint`: an FP8 checkpoint that another tool made becomes a snapshot here; the codes keep their bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks.digests import as_recorded
from .checks.intact import check_recorded, read_intact
from .conversion import Result, check_outside, finished_already, peak_rss
from .format import layout
from .format.record import RecordedLora
from .format.untrusted import check_regular, check_text
from .output.work import Work
from .plan.manifest import choose_manifest, load_manifest
from .plan.recipe import Recipe
from .snapshot.access import HubAccess
from .snapshot.describing import describe
from .snapshot.files import LocalFiles, read_json
from .snapshot.foreign import Foreign, read_foreign
from .snapshot.locate import fetch, open_files
from .snapshot.overlay import OverlayFiles
from .snapshot.snapshot import CONFIG, MODEL_INDEX, Component, Shard, Snapshot
from .targets.adopting import Adopted, Shapes, adopt, matches, real_shapes
from .telling.errors import ConvertError
from .telling.progress import Progress, Silent

if TYPE_CHECKING:
    from .plan.plan import Plan

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")


@dataclass(frozen=True)
class _Found:
    """What is to be imported: the snapshot that it makes, its files, and the components that another tool quantised.

    merged: the LoRAs that its base was made with.
    """

    snapshot: Snapshot
    files: LocalFiles
    adopted: dict[str, Adopted]
    merged: tuple[RecordedLora, ...] = ()


def plan_import_checkpoint(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    component: str | None = None,
    manifest: str | None = None,
    options: HubAccess | None = None,
) -> Plan:
    """Plan an import from headers and scales. Arguments are those of `import_checkpoint`."""
    return _plan(_find(Path(source), base, component, options or HubAccess()), manifest)


def import_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    component: str | None = None,
    manifest: str | None = None,
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Result:
    """Take over the FP8 weights of a checkpoint that another tool made, codes and scales as they are.

    source: a .safetensors file, a folder of them, or a snapshot's folder in diffusers' layout, which is its own base.
    Read are ComfyUI's layouts, bare casts, ModelOpt, compressed-tensors, scales of rows (LightX2V) and of blocks
    (DeepSeek). output: the folder to create.
    base: a snapshot (a folder, or a Hub id) that gives config, classes and all other components, which are copied.
    component: which of base's components the source is; None finds out by its tensors.
    manifest: says which weights are run in FP8, as in `convert`; the others are stored in FP8.
    force: replace a finished FP8 snapshot. The others are as in `convert`, for a base on the Hub.

    Nothing is quantised: weights that are not FP8 stay as they are, and an FP8 tensor that no layer can hold in FP8 is
    made BF16, which is said. Raises ConvertError with a sentence for the user.
    """
    from .output.run import run

    started, folder, progress = time.monotonic(), Path(output), progress or Silent()
    access = HubAccess(revision, token, cache_dir, local_files_only, variant, quiet=quiet)
    for place in (source, base):
        if place is not None:
            check_outside(folder, place)
    found = _find(Path(source), base, component, access)
    plan = _plan(found, manifest)
    digest = None if force else finished_already(plan, found.files, folder, False, progress)
    already, resumed = digest is not None, 0
    if digest is None:
        digest, resumed = run(plan, found.files, folder, Work(force=force), progress)
    written = sum(shard.size for shard in plan.shards)
    seconds = time.monotonic() - started
    return Result(plan, folder, plan.bytes_to_read, written, seconds, resumed, peak_rss(), digest, already)


def _plan(found: _Found, manifest: str | None) -> Plan:
    from .plan.importing import plan_import

    snapshot = found.snapshot
    rules = load_manifest(manifest) if manifest is not None else None
    rules = rules or choose_manifest(snapshot.base_repo, snapshot.pipeline, snapshot.classes)
    return plan_import(snapshot, found.adopted, Recipe(rules, merged=found.merged))


def _find(source: Path, base: str | os.PathLike[str] | None, component: str | None, access: HubAccess) -> _Found:
    check_text(source, "The source")
    if not source.exists():
        raise ConvertError(f"{source} does not exist; give a .safetensors file or a folder.")
    if not source.is_dir():
        check_regular(source, str(source))
    if source.is_dir() and base is None:
        if not any((source / name).is_file() for name in (MODEL_INDEX, CONFIG)):
            raise ConvertError(_needs_base(source))
        if component is not None:
            raise ConvertError(f"{source} is its own base; drop --component.")
        return _own_base(LocalFiles(source), access)
    if base is None:
        raise ConvertError(_needs_base(source))
    return _onto_base(source, base, component, access)


def _needs_base(source: Path) -> str:
    return (
        f"{source} holds weights alone; name with --base a snapshot's folder or Hub id of the same model, such as "
        "Qwen/Qwen-Image."
    )


def _own_base(files: LocalFiles, access: HubAccess) -> _Found:
    """A folder in diffusers' layout, some of whose components another tool quantised."""
    snapshot = describe(files, variant=access.variant)
    adopted = _adopt_own(snapshot.components, files)
    if not adopted:
        raise ConvertError(f"{files.label} is not quantised; convert it instead: fp8-convert {files.label} -o OUT.")
    return _Found(_with_adopted(snapshot, adopted), files, adopted)


def _adopt_own(components: Sequence[Component], files: LocalFiles) -> dict[str, Adopted]:
    """The quantised ones among components, under their own names."""
    adopted = {}
    for component in components:
        if (foreign := read_foreign(component, files)) is not None:
            adopted[component.name] = adopt(foreign, component, component, real_shapes(component, foreign))
    return adopted


def _with_adopted(snapshot: Snapshot, adopted: dict[str, Adopted]) -> Snapshot:
    components = (adopted[c.name].component if c.name in adopted else c for c in snapshot.components)
    return replace(snapshot, components=tuple(components))


# Checkpoints without a snapshot of their own


@dataclass(frozen=True)
class _Checkpoint:
    """The files of one component, by the paths that they take. component: which one, None where that is to be found.

    digests: of the files, where a record states them.
    """

    paths: dict[str, Path]
    component: str | None
    digests: Mapping[str, str] = field(default_factory=dict)


def _onto_base(source: Path, base: str | os.PathLike[str], component: str | None, access: HubAccess) -> _Found:
    base_files = open_files(base, access)
    record = read_intact(base_files)
    snapshot = describe(base_files, variant=access.variant, allow_converted=True)
    if snapshot.single_files:
        raise ConvertError(f"{snapshot.label} has no configs; name with --base a snapshot in diffusers' layout.")
    adopted, paths, digests = {}, dict[str, Path](), dict[str, str]()
    for checkpoint in _checkpoints(source, component):
        taken = _take(source, checkpoint, snapshot)
        adopted[taken.component.name] = taken
        paths |= checkpoint.paths
        digests |= checkpoint.digests
    if not any(taken.scales for taken in adopted.values()):
        raise ConvertError(f"{source} has no FP8 weights; there is nothing to import.")
    replaced = frozenset(adopted)
    # Of the base's own weights for these components none is needed.
    rest = [replace(c, shards=(), index=None) if c.name in adopted else c for c in snapshot.components]
    here = fetch(replace(snapshot, components=tuple(rest)), base_files)
    if record is not None:
        here, notes = as_recorded(here, record)
        snapshot = replace(snapshot, sidecars=_sidecars(snapshot, here), remarks=(*snapshot.remarks, *notes))
    files = OverlayFiles(here, paths, str(source), digests)
    adopted |= _adopt_own([c for c in rest if c.name not in adopted], files)
    snapshot = replace(
        snapshot, label=str(source), repo=None, commit=None, base_repo=base_files.repo, base_commit=base_files.commit
    )
    # A LoRA that went into a component that is replaced is gone with it.
    merged = () if record is None else tuple(x for x in record.recipe.merged_loras if x.component not in replaced)
    return _Found(_with_adopted(snapshot, adopted), files, adopted, merged)


def _sidecars(snapshot: Snapshot, files: LocalFiles) -> dict[str, int]:
    """What is carried over of a base whose files lie as they did before it was pushed."""
    return {p: size for p, size in files.sizes().items() if p in snapshot.sidecars or p == layout.CARD}


def _checkpoints(source: Path, component: str | None) -> list[_Checkpoint]:
    """What a file or folder holds: one component, or each that this project wrote as a single file of its own."""
    if source.is_file() or not (source / layout.RECORD_FILE).is_file():
        root = source if source.is_dir() else source.parent
        paths = {name: root / name for name in _shards_of(source)}
        for path in paths.values():
            check_recorded(path)
        return [_Checkpoint(paths, component)]
    files = LocalFiles(source)
    read_intact(files)
    written = describe(files, allow_converted=True)
    if not written.single_files:
        raise ConvertError(f"{source} was converted by fp8-convert, and there is nothing to import.")
    found = [
        _Checkpoint(
            {s.path: source / s.path for s in c.shards},
            c.name or component,  # one that was converted on its own has no name
            {s.path: s.sha256 for s in c.shards if s.sha256},
        )
        for c in written.components
        if c.shards and (not c.name or component in (None, c.name))
    ]
    if not found:
        names = ", ".join(c.name for c in written.components if c.shards)
        raise ConvertError(f"{source} has no file of {component!r:.80}; it has those of {names}.")
    return found


def _take(source: Path, checkpoint: _Checkpoint, base: Snapshot) -> Adopted:
    """A checkpoint as the component of the base that it is."""
    root = source if source.is_dir() else source.parent
    # What the user names may be a link to anywhere.
    files = OverlayFiles(LocalFiles(root), checkpoint.paths, str(source))
    shards = tuple(
        Shard(p, file.stat().st_size, files.header(p), checkpoint.digests.get(p))
        for p, file in checkpoint.paths.items()
    )
    read = _as_component(source, shards, files)
    foreign = read_foreign(read, files) or Foreign("plain", {}, frozenset())
    chosen = _choose(base, checkpoint.component, real_shapes(read, foreign), source)
    return adopt(foreign, read, chosen, _base_shapes(chosen))


def _shards_of(source: Path) -> list[str]:
    """The names of the source's safetensors files. Raises ConvertError where it has none."""
    names = [source.name] if source.is_file() else sorted(p.name for p in source.iterdir() if p.is_file())
    found = [name for name in names if name.endswith(".safetensors")]
    if found:
        return found
    if pickle := next((name for name in names if name.lower().endswith(_PICKLES)), None):
        raise ConvertError(f"{pickle} is no safetensors file, and nothing else is imported; save it as safetensors.")
    if below := min(source.rglob("*.safetensors"), default=None) if source.is_dir() else None:
        raise ConvertError(f"{source} has no .safetensors files but in folders; give one, such as {below}.")
    raise ConvertError(f"{source} has no .safetensors files; give one, or a folder of them.")


def _as_component(source: Path, shards: tuple[Shard, ...], files: LocalFiles) -> Component:
    """The checkpoint under no class's name yet, with what a config beside it says of its quantisation."""
    config: dict[str, Any] = {}
    if source.is_dir() and (source / CONFIG).is_file():
        stated = read_json(files, CONFIG).get(layout.CONFIG_KEY)
        config = {layout.CONFIG_KEY: stated} if stated is not None else {}
    seen: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.header.tensors:
            if (other := seen.setdefault(tensor.name, shard.path)) != shard.path:
                raise ConvertError(f"{tensor.name} is in both {other} and {shard.path} of {source}; keep one of them.")
    return Component(source.name, "", None, config, "", shards, None)


def _base_shapes(component: Component) -> Shapes:
    """The shapes of a base component's own tensors; an FP8 one's scales are not among them."""
    suffixes = layout.SCALE_SUFFIXES
    weights = {t.name.removesuffix(layout.WEIGHT) for t in component.tensors if t.name.endswith(layout.WEIGHT)}
    return {
        t.name: t.shape
        for t in component.tensors
        if not any(t.name.endswith(s) and t.name.removesuffix(s) in weights for s in suffixes)
    }


def _choose(base: Snapshot, asked: str | None, given: Shapes, source: Path) -> Component:
    """The component of the base that the checkpoint is. Raises ConvertError where that is not certain."""
    by_name = {c.name: c for c in base.components}
    if asked is not None:
        if asked not in by_name:
            raise ConvertError(
                f"{base.label} has no component {asked!r:.80} with weights; it has {', '.join(by_name)}."
            )
        return by_name[asked]
    if len(by_name) == 1:
        return base.components[0]
    fitting = [c for c in base.components if matches(c, given, _base_shapes(c))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(c.name for c in fitting)
        raise ConvertError(f"{source} could be {names} of {base.label}; say which one with --component.")
    raise ConvertError(
        f"{source} is none of the components of {base.label} ({', '.join(by_name)}); name the one that it should be "
        "with --component to see what does not fit."
    )
