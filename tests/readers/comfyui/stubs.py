"""What ComfyUI imports for images and sound, as empty modules; none of it is called while a model is loaded."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

NAMES = ("torchvision", "torchaudio", "simpleeval", "kornia", "spandrel", "av", "blake3")


class Anything:
    """Stands for whatever is imported from such a module."""


class Empty(types.ModuleType):
    __path__ = ()  # a package

    def __getattr__(self, name: str) -> type[Anything]:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Empty:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return


def install() -> None:
    """Let those that are not installed be found."""
    sys.meta_path.append(Finder(tuple(name for name in NAMES if importlib.util.find_spec(name) is None)))
