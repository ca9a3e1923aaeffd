"""An original component as diffusers' own `from_pretrained` meets it: its files and a config, and the plan for them."""

from dataclasses import replace
from pathlib import Path

from ..converter.format import layout
from ..converter.format.header import read_header
from ..converter.plan.manifest import choose_manifest
from ..converter.plan.plan import ComponentPlan
from ..converter.plan.planning import make_plan
from ..converter.plan.settings import Settings
from ..converter.snapshot.files import LocalFiles, read_json
from ..converter.snapshot.snapshot import CONFIG, MODEL_INDEX, Component, Shard, Snapshot
from .checkpoint import Fp8Modules
from .fp8_config import Fp8Config


def planned_modules(plan: ComponentPlan) -> Fp8Modules:
    """The FP8 modules that a conversion will make of a component."""
    modules = {t.module: t.decision.format for t in plan.tensors if t.decision.format is not None}
    return Fp8Modules(modules, (plan.config or {}).get(layout.CONFIG_KEY) or {})


class ChosenFiles(LocalFiles):
    """The files that diffusers chose and reads itself, wherever they link to."""

    def local(self, path: str) -> Path:
        return self.root / path


def component_of(files: list[Path], config: Fp8Config) -> tuple[Component, Path]:
    """The component that exactly `files` make up, as its folder and the pipeline around it describe it."""
    folder = files[0].parent
    local = LocalFiles(folder)
    settings = read_json(local, CONFIG) if (folder / CONFIG).is_file() else {}
    settings[layout.CONFIG_KEY] = config.to_dict()
    shards = tuple(Shard(f.name, f.stat().st_size, read_header(f, f"{f.name} in {folder}")) for f in sorted(files))
    name = folder.name if (folder.parent / MODEL_INDEX).is_file() else ""
    class_name = settings.get("_class_name")
    return Component(name, "diffusers", class_name, settings, files[0].name.split(".")[0], shards, None), folder


def plan_of(component: Component, folder: Path, config: Fp8Config) -> ComponentPlan:
    """The plan for one original component, by the manifest that its whole pipeline would get."""
    pipeline, classes = None, {component.name: component.class_name}
    if component.name:
        index = read_json(LocalFiles(folder.parent), MODEL_INDEX)
        pipeline = index.get("_class_name")
        classes = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    original = {k: v for k, v in component.config.items() if k != layout.CONFIG_KEY}
    component = replace(component, config=original)
    stated = ("ignored_layers", "weight_block_size", "activation_scheme")
    settings = Settings.read({key: getattr(config, key) for key in stated})
    # No pipeline: the manifest is not to miss the other components.
    snapshot = Snapshot(str(folder), None, None, None, (component,), {})
    return make_plan(snapshot, settings.resolve(snapshot, choose_manifest(None, pipeline, classes))).components[0]
