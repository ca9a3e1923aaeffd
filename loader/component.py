"""One component: built, its FP8 layers installed, filled from its files, checked, and made its library's own."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..converter.format import layout
from ..converter.format.header import TensorInfo
from ..converter.plan.plan import ComponentPlan
from ..converter.snapshot.files import LocalFiles
from ..converter.snapshot.snapshot import Component
from ..converter.stream.engine import Engine
from ..converter.stream.supply import FolderSupply
from ..converter.telling.errors import LoadError, one_clause
from ..converter.telling.progress import Bar, Progress, Silent
from .backend import Backend
from .build import build, install_all, tensor_names
from .checkpoint import Fp8Modules, check_record, fp8_modules
from .cuda_graphs import record_blocks
from .diffusers_quantizer import Fp8DiffusersQuantizer
from .fill import Filler, fill_from_shards, fill_from_stream
from .fp8_config import Fp8Config
from .original import planned_modules
from .parallel import Ranks
from .settings import Planned
from .transformers_quantizer import Fp8TransformersQuantizer
from .weights import Fp8Weight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What components are loaded for.

    dtype: of all that is not FP8, and of the computation. strict: refuse one that is not what its record and config
    promise, instead of a warning. cuda_graphs: record the repeated blocks of models with W8A8 linears. ranks: how
    these models lie on several.
    """

    device: torch.device
    dtype: torch.dtype
    backend: Backend = "auto"
    strict: bool = True
    cuda_graphs: bool = False
    ranks: Ranks = field(default_factory=Ranks)


def load(component: Component, root: Path, planned: Planned, target: Target) -> nn.Module:
    """Load a component of the snapshot in `root`; one that is `planned` is converted on its way. Raises LoadError."""
    plan, supply = planned.get(component.name), FolderSupply(LocalFiles(root))
    fp8 = _fp8_of(component, plan)
    model = build(component, target.dtype)
    tensors = _tensors(component, plan)
    names = tensor_names(model, [t.name for t in tensors], fp8.modules)
    install_all(model, fp8, names, dtype=target.dtype, backend=target.backend, label=component.label)
    ranks = target.ranks if _has_w8a8(fp8) else Ranks()
    filler = Filler(model, names, target.dtype, target.device, component.label, ranks.divide(model, component.label))
    filler.check_dtypes(tensors)
    if plan is None:
        with _progress(component) as progress:
            fill_from_shards(filler, component.shards, supply, progress)
    else:
        workers = max(1, (os.cpu_count() or 2) - 1)
        with Engine(target.device, workers=workers, readers=8) as engine, _progress(component) as progress:
            fill_from_stream(filler, plan, supply, engine, progress)
    filler.finish()
    _warn_of_unexpected(component, filler.unexpected)
    problem = check_record(root, component, fp8) if plan is None else None
    _refuse(component, problem or _plain_linear(model, fp8, names), target.strict)
    _adopt(model, component, root, fp8, names)
    ranks.join(model)
    if target.cuda_graphs and _has_w8a8(fp8) and not record_blocks(model):
        logger.warning("%s names no repeated blocks, so that cuda_graphs=True changes nothing", type(model).__name__)
    return model


def is_dit(component: Component, planned: Planned) -> bool:
    """Whether it is a component that will have W8A8 linears."""
    return _has_w8a8(_fp8_of(component, planned.get(component.name)))


def _fp8_of(component: Component, plan: ComponentPlan | None) -> Fp8Modules:
    return fp8_modules(component) if plan is None else planned_modules(plan)


def _has_w8a8(fp8: Fp8Modules) -> bool:
    return any(how.mode == layout.W8A8 for how in fp8.modules.values())


@contextmanager
def _progress(component: Component) -> Iterator[Progress]:
    """A bar of its bytes on a terminal, unless diffusers was told to draw none; otherwise nothing."""
    from diffusers.utils import logging as diffusers_logging

    shown = sys.stderr.isatty() and diffusers_logging.is_progress_bar_enabled()
    progress = Bar(sys.stderr, label=f"Loading {component.label}") if shown else Silent()
    try:
        yield progress
    finally:
        progress.close()


def _tensors(component: Component, plan: ComponentPlan | None) -> list[TensorInfo]:
    """The tensors that the model is filled from, by checkpoint name."""
    if plan is None:
        return [*component.tensors]
    return [output for shard in plan.shards for output in shard.schedule.outputs]


def _warn_of_unexpected(component: Component, unexpected: list[str]) -> None:
    if unexpected:
        logger.warning(
            "%s: %d tensors of the checkpoint belong to no module, such as %s",
            component.label,
            len(unexpected),
            unexpected[0],
        )


def _plain_linear(model: nn.Module, fp8: Fp8Modules, names: Mapping[str, str]) -> str | None:
    """A linear that config.json does not ignore and that is not FP8, as a clause; None if there is none."""
    if not fp8.config or not fp8.modules:
        return None
    listed = set(fp8.config.get("ignored_layers") or ())
    parts = dict(model.named_modules())
    for key, own in names.items():
        module = parts.get(own.removesuffix(layout.WEIGHT)) if own.endswith(layout.WEIGHT) else None
        name = key.removesuffix(layout.WEIGHT)
        if isinstance(module, nn.Linear) and not isinstance(module, Fp8Weight) and name not in listed:
            return f"config.json does not ignore {name}, but its weight is not FP8"
    return None


def _refuse(component: Component, problem: str | None, strict: bool) -> None:
    if problem is None:
        return
    message = f"{component.label} is not what it promises: {problem}; convert the snapshot again."
    if strict:
        raise LoadError(message + " strict=False loads it all the same.")
    logger.warning("%s", message)


def _adopt(model: Any, component: Component, root: Path, fp8: Fp8Modules, names: Mapping[str, str]) -> None:
    """Give the model its config, generation settings and quantizer, as `from_pretrained` does."""
    folder = str(root / component.name) if component.name else str(root)
    quantizer: Fp8DiffusersQuantizer | Fp8TransformersQuantizer
    if component.library == "diffusers":
        quantizer = Fp8DiffusersQuantizer(Fp8Config(**fp8.config))
        model.register_to_config(_name_or_path=folder)
    else:
        quantizer = Fp8TransformersQuantizer(Fp8Config(**fp8.config))
        model.name_or_path = folder
        _generation_config(model, folder)
    quantizer.fp8 = fp8
    quantizer.names = {module: names[module + layout.WEIGHT].removesuffix(layout.WEIGHT) for module in fp8.modules}
    quantizer.attach(model)


def _generation_config(model: Any, folder: str) -> None:
    if hasattr(model, "can_generate") and model.can_generate() and Path(folder, "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # whatever transformers raises for a file it cannot use
            raise LoadError(
                f"generation_config.json in {folder} cannot be used ({one_clause(error)}); download it again."
            ) from error
