"""Puts a diffusers pipeline together from its folder and the components that are loaded already.

diffusers' own `from_pretrained` loads optional components from disk even where they are handed over (Wan's transformers
are optional), so the model index is followed here: each remaining component by its class's `from_pretrained`.
"""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..converter.source import MODEL_INDEX, LocalFiles, read_json
from .checkpoint import LoadError


def assemble(root: Path, given: Mapping[str, Any], dtype: torch.dtype, variant: str | None) -> Any:
    """The pipeline that `root`'s model index names. `given` are components to use as they are, and other arguments.

    Raises LoadError for a class that is not installed, TypeError for an argument that the pipeline does not take.
    """
    index = read_json(LocalFiles(root), MODEL_INDEX)
    pipeline_class = _pipeline_class(str(index.get("_class_name")))
    accepted = set(inspect.signature(pipeline_class.__init__).parameters) - {"self", "args", "kwargs"}
    if unknown := sorted(set(given) - accepted):
        raise TypeError(f"{pipeline_class.__name__} takes no argument {unknown[0]!r}.")
    arguments = dict(given)
    for name, value in index.items():
        if name.startswith("_") or name in arguments or name not in accepted:
            continue
        if isinstance(value, list) and len(value) == 2:
            arguments[name] = None if value[0] is None else _component(root, name, value[0], value[1], dtype, variant)
        else:
            arguments[name] = value
    pipe = pipeline_class(**arguments)
    pipe.register_to_config(_name_or_path=str(root))
    return pipe


def _pipeline_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise LoadError(f"diffusers {diffusers.__version__} has no pipeline {name}; upgrade it.")
    return found


def _component(root: Path, name: str, library: str, class_name: str, dtype: torch.dtype, variant: str | None) -> Any:
    cls = _component_class(name, library, class_name)
    options: dict[str, Any] = {"local_files_only": True}
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
        options["dtype"] = dtype
        if variant is not None and any(f".{variant}." in path.name for path in (root / name).iterdir()):
            options["variant"] = variant
    loaded = cls.from_pretrained(str(root / name), **options)
    return loaded.eval() if isinstance(loaded, torch.nn.Module) else loaded


def _component_class(name: str, library: str, class_name: str) -> Any:
    """The class, from diffusers, transformers, or a module of diffusers' pipelines; nothing else is imported."""
    modules = [library] if library in ("diffusers", "transformers") else [f"diffusers.pipelines.{library}"]
    for module in modules:
        try:
            found = getattr(importlib.import_module(module), class_name, None)
        except ImportError as error:
            raise LoadError(f"The component {name} needs {library}.{class_name} ({error}); install it.") from error
        if found is not None:
            return found
    raise LoadError(f"The component {name} is a {library}.{class_name}, which is not installed; upgrade {library}.")
