"""Imported before SGLang: processors of vision models import torchvision's transforms, which nothing here runs.

The released torchvision goes with a CUDA torch alone, so empty modules stand in for it.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

import transformers

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"BICUBIC": 3, "__init__": lambda *_, **__: None})


transformers.utils.is_torchvision_available()  # asked first, it goes on saying no
for _name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules[_name] = _Empty(_name)
    sys.modules[_name].__spec__ = importlib.machinery.ModuleSpec(_name, None)
    sys.modules[_name].__path__ = []
