"""What a machine without CUDA forces on vLLM 0.30 and vLLM-Omni 0.30: import this before either of them.

Each function is one patch with its reason. None touches a name, a shape, a skip rule or a copy of a weight.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

import torch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def stub_torchvision() -> None:
    """Image-to-video pipelines import its transforms, and its wheel wants its own torch; nothing here runs them."""
    import transformers.utils

    transformers.utils.is_torchvision_available()  # first: it must go on saying no
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[name])


def leave_out_processors() -> None:
    """Processors of the image-editing pipelines need torchvision to be built; no weight depends on them."""
    import transformers

    transformers.Qwen2VLProcessor.from_pretrained = classmethod(lambda cls, *_, **__: None)


def be_a_cpu() -> None:
    """The CUDA wheel finds no CUDA and calls its platform "unspecified", for which it has no FP8 kernel at all."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()


def give_omni_a_cpu() -> None:
    """vLLM-Omni has no CPU platform: attention by PyTorch, one device, gloo."""
    import vllm_omni.platforms
    from vllm_omni.platforms.interface import UnspecifiedOmniPlatform

    class CpuOmniPlatform(UnspecifiedOmniPlatform):
        dist_backend = "gloo"

        @classmethod
        def get_diffusion_attn_backend_cls(cls, *_: Any, **__: Any) -> str:
            return "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"

        @classmethod
        def get_device_count(cls) -> int:
            return 1

        @classmethod
        def set_device(cls, device: torch.device) -> None:
            pass

    vllm_omni.platforms._current_omni_platform = CpuOmniPlatform()


def emulate_operators() -> None:
    """Two CUDA operators, in PyTorch: quantisation with a given scale, and what Z-Image's feed-forward asks for."""
    import vllm._custom_ops

    def scaled_fp8_quant(
        input: torch.Tensor, scale: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (input.float() * (1.0 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
        half = input.shape[-1] // 2
        out.copy_(torch.nn.functional.silu(input[..., :half]) * input[..., half:])

    vllm._custom_ops.scaled_fp8_quant = scaled_fp8_quant
    _operators.define("silu_and_mul(Tensor(a!) out, Tensor input) -> ()")
    _operators.impl("silu_and_mul", silu_and_mul, "CPU")


_operators = torch.library.Library("_C", "FRAGMENT")
stub_torchvision()
leave_out_processors()
be_a_cpu()
give_omni_a_cpu()
emulate_operators()
