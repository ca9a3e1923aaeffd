"""Puts a diffusers pipeline together from its folder and the components that are loaded already.

diffusers' own `from_pretrained` loads optional components from disk even where they are handed over (Wan's transformers
are optional), so the model index is followed here: each remaining component by its class's `from_pretrained`. No code
of the snapshot runs, and nobody is asked whether it may.
"""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..converter.snapshot.building import default_dtype
from ..converter.snapshot.files import LocalFiles, read_json
from ..converter.snapshot.snapshot import MODEL_INDEX
from ..converter.telling.errors import LoadError, one_clause


def assemble(root: Path, given: Mapping[str, Any], dtype: torch.dtype, variant: str | None) -> Any:
    """The pipeline that `root`'s model index names. `given` are components to use as they are, and other arguments.

    Raises LoadError for a class that is not installed, and for a component that its library cannot load.
    """
    index = read_json(LocalFiles(root), MODEL_INDEX)
    cls = pipeline_class(index.get("_class_name"))
    accepted = accepted_arguments(cls)
    arguments = dict(given)
    for name, value in index.items():
        if name.startswith("_") or name in arguments or name not in accepted:
            continue
        if isinstance(value, list) and len(value) == 2:
            arguments[name] = _component(root, name, value, dtype, variant)
        else:
            arguments[name] = value
    try:
        pipe = cls(**arguments)
    except Exception as error:  # whatever a class raises for parts that are not its own
        raise LoadError(
            f"{cls.__name__} cannot be built from {MODEL_INDEX} in {root} ({one_clause(error)}); download it again, or "
            "pass what it lacks to load_pipeline."
        ) from error
    pipe.register_to_config(_name_or_path=str(root))
    return pipe


def pipeline_class(name: Any) -> Any:
    """The pipeline class of the installed diffusers. Raises LoadError where it has none of this name."""
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise LoadError(
            f"diffusers {diffusers.__version__} has no pipeline {name!s:.80}; upgrade it (a pipeline that comes with "
            "code of its own is not run)."
        )
    return found


def accepted_arguments(cls: Any) -> set[str]:
    """What a pipeline's constructor takes: its components and settings."""
    return set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}


def _component(root: Path, name: str, entry: list[Any], dtype: torch.dtype, variant: str | None) -> Any:
    library, class_name = entry
    if library is None:
        return None
    if not (isinstance(library, str) and isinstance(class_name, str)):
        raise LoadError(f"{MODEL_INDEX} in {root} has {entry!r:.80} for {name}; download it again.")
    cls = _component_class(name, library, class_name)
    options: dict[str, Any] = {"local_files_only": True}
    if any(base.__module__.startswith("transformers.") for base in getattr(cls, "__mro__", ())):
        options["trust_remote_code"] = False  # unset, transformers asks on the terminal, and waits
    folder = root / name if (root / name).is_dir() else root  # where diffusers looks too
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
        options |= {"dtype": dtype, "use_safetensors": True}
        if variant is not None and any(f".{variant}." in path.name for path in folder.iterdir()):
            options["variant"] = variant
    try:
        with default_dtype(torch.get_default_dtype()):  # which libraries change, and leave so when they fail
            loaded = cls.from_pretrained(str(folder), **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a missing file, broken JSON, a package that the class needs: anything
        raise LoadError(_failure(root, name, class_name, error)) from error
    return loaded.eval() if isinstance(loaded, torch.nn.Module) else loaded


def _failure(root: Path, name: str, class_name: str, error: Exception) -> str:
    said = f"The component {name} of {root} cannot be loaded by {class_name}"
    yourself = f"load it yourself and pass {name}=... to load_pipeline"
    if "trust_remote_code" in str(error):
        return f"{said}: it wants to run code that comes with the snapshot, which never happens here; {yourself}."
    if isinstance(error, ImportError):
        return f"{said} ({one_clause(error)}); install what it needs, or {yourself}."
    return f"{said} ({one_clause(error)}); download or convert the snapshot again, or {yourself}."


def _component_class(name: str, library: str, class_name: str) -> Any:
    """The class, from diffusers, transformers, or a module of diffusers' pipelines; nothing else is imported."""
    modules = [library] if library in ("diffusers", "transformers") else [f"diffusers.pipelines.{library}"]
    for module in modules:
        try:
            found = getattr(importlib.import_module(module), class_name, None)
        except (ImportError, RuntimeError) as error:  # diffusers and transformers wrap the first in the second
            raise LoadError(
                f"The component {name} needs {library}.{class_name} ({one_clause(error)}); install it."
            ) from error
        if found is not None:
            return found
    raise LoadError(f"The component {name} is a {library}.{class_name}, which is not installed; upgrade {library}.")
