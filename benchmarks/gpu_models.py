"""Models of the published sizes with random BF16 weights on the GPU, and their FP8 form by the shipped manifests."""

import gc
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from timing import DEVICE
from torch import Tensor, nn

from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.format.layout import WEIGHT
from fp8_convert.converter.plan.decide import Decision, decide
from fp8_convert.converter.plan.manifest import shipped
from fp8_convert.converter.snapshot.building import build_on_meta
from fp8_convert.converter.snapshot.modules import ModuleMap
from fp8_convert.converter.snapshot.naming import stays_float32
from fp8_convert.loader import kernels
from fp8_convert.loader.install import install
from fp8_convert.loader.shared_input import settle, share_inputs
from fp8_convert.loader.weights import Fp8Weight

KINDS = {"Linear": nn.Linear, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}


def random_model(library: str, class_name: str, config: Mapping[str, Any]) -> Any:
    """The class built as the loader builds it, its weights normal with deviation 0.02, the same in every call."""
    gc.collect()
    torch.cuda.empty_cache()
    model = build_on_meta(library, class_name, config, dtype=torch.bfloat16, buffers=True)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in [*model.named_parameters()]:
        owner, leaf = _owner(model, name)
        dtype = torch.float32 if stays_float32(model, name, torch.bfloat16) else torch.bfloat16
        weight = torch.empty(parameter.shape, dtype=dtype, device=DEVICE)
        if parameter.dim() == 1 and leaf == "weight":
            weight.fill_(1)  # of a norm
        else:
            weight.normal_(0, 0.02, generator=generator)
        owner._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
    for name, buffer in [*model.named_buffers()]:
        owner, leaf = _owner(model, name)
        owner._buffers[leaf] = buffer.to(DEVICE)
    return model.eval()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def decisions(
    model: nn.Module, manifest: str, component: str, class_name: str, compact: bool = False
) -> dict[str, Decision]:
    """What a shipped manifest makes FP8 of a plain model, by module; as for a snapshot of `class_name`."""
    rules = shipped()[manifest].rules_for(component, class_name)
    assert rules is not None
    tensors, kinds, kept = [], {}, set()
    for name, module in model.named_modules():
        kind = next((kind for kind, cls in KINDS.items() if isinstance(module, cls)), None)
        if kind is not None:
            weight = module.weight
            tensors.append(TensorInfo(name + WEIGHT, "BF16", tuple(weight.shape), 0, 2 * weight.numel()))
            kinds[name] = kind
            if stays_float32(model, name + WEIGHT, torch.float16):
                kept.add(name)
    modules = ModuleMap(kinds, frozenset(kept))
    decided, _ = decide(tensors, rules, modules, compact=compact, block=rules.weight_block_size)
    return {tensor.module: tensor.decision for tensor in decided if tensor.decision.fp8}


def make_fp8(model: nn.Module, decided: Mapping[str, Decision]) -> None:
    """Turn the decided layers of a model on the GPU into FP8 ones in place, one after the other, as loading would."""
    amaxes: dict[str, list[Tensor]] = defaultdict(list)
    for name, decision in decided.items():
        if decision.group is not None:
            amaxes[decision.group].append(model.get_submodule(name).weight.abs().max())
    for name, decision in decided.items():
        module = model.get_submodule(name)
        weight = module.weight.data
        assert decision.format is not None
        layer = install(module, decision.format, device=DEVICE, name=name)
        fill(layer, weight, torch.stack(amaxes[decision.group]).max() if decision.group else None)
    share_inputs(model)
    settle(model)


def fill(layer: Fp8Weight, weight: Tensor, amax: Tensor | None = None) -> None:
    """Give an FP8 layer the codes and scales of `weight` by the contract's formula; `amax` is that of its group."""
    wide = weight.float()
    full: Tensor
    if layer.block is not None:
        n, k = layer.block
        padded = nn.functional.pad(wide, (0, -wide.shape[1] % k, 0, -wide.shape[0] % n))
        tiles = padded.view(padded.shape[0] // n, n, padded.shape[1] // k, k)
        scale = tiles.abs().amax((1, 3)).clamp(min=1e-4) / 448
        full = kernels.expand_scale(scale, layer.block, weight.shape)
    elif layer.format.channel:
        full = scale = wide.abs().amax(1, keepdim=True) / 448
    else:
        full = scale = (wide.abs().max() if amax is None else amax.float()) / 448
    layer.scale.copy_(scale)
    layer.codes.copy_((wide * (1 / full)).clamp(-448, 448))


def linears_of(decided: Mapping[str, Decision]) -> set[str]:
    """The names of those that run as W8A8."""
    return {name for name, decision in decided.items() if decision.mode == "w8a8"}
