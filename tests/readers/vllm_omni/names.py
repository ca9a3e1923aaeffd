"""What vLLM-Omni calls the tensors of a diffusers checkpoint, and what a loaded pipeline is worth, layer by layer.

The names are written here by hand and compared with every parameter: a name that the reader has changed is a fault.
"""

from __future__ import annotations

from pathlib import Path

import omni
import torch
from snapshot import dequantised
from vllm.model_executor.layers.linear import LinearBase

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_kv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "w13": ("w1", "w3"),
}
RENAMED = {".ffn.net.0.": ".ffn.net_0.", ".ffn.net.2.": ".ffn.net_2.", ".to_out.0.": ".to_out."}
SCALES = (".weight_scale", ".weight_scale_inv", ".input_scale")


def faults(snapshot: Path, *, worth: Path | None = None, quantization: str | None = None) -> list[str]:
    """What is wrong with a snapshot once vLLM-Omni has loaded it; an error that it raises is a fault, too.

    worth: the snapshot that says what its weights are worth, itself if None. quantization: as for `omni.load`.
    """
    try:
        loaded = omni.load(snapshot, quantization)
    except Exception as error:  # whatever the reader raises is the answer
        return [f"{type(error).__name__}: {error}"]
    found = [f"{name} was not set" for name in loaded.unset]
    for source in loaded.pipeline.weights_sources:
        found += _differences(loaded, source.subfolder, dequantised((worth or snapshot) / source.subfolder))
    return found


def _differences(loaded: omni.Loaded, folder: str, ours: dict[str, torch.Tensor]) -> list[str]:
    """Where a component's parameters are not worth what its files say, before and after vLLM has processed them."""
    found, seen = [], set()
    for name, tensor in ours.items():
        parameter, part = _place(f"{folder}.{name}", loaded.raw)
        seen.add(parameter)
        if parameter not in loaded.raw:
            found.append(f"{name}: there is no {parameter}")
            continue
        for when, theirs in (("loaded", _raw(loaded, parameter, part)), ("served", _served(loaded, parameter, part))):
            same = theirs.shape == tensor.shape and torch.equal(theirs, tensor.to(theirs.dtype))
            found += [] if same else [f"{name}: differs as {when}"]
    # A tied head has no tensor of its own; Loaded.unset has told whether it got the embedding's.
    missed = {x for x in loaded.raw if x.startswith(f"{folder}.") and not x.endswith(SCALES)} - seen
    return found + [f"{name} has no tensor" for name in sorted(missed - {"text_encoder.lm_head.weight"})]


def _place(name: str, parameters: dict[str, torch.Tensor]) -> tuple[str, int | None]:
    """The parameter that a tensor belongs to, and which of its parts it is."""
    *front, module, leaf = name.split(".")
    for fused, members in FUSED.items():
        whole = ".".join([*front, fused, leaf])
        if module in members and whole in parameters:
            return whole, members.index(module)
    if name in parameters:
        return name, None
    for diffusers, theirs in RENAMED.items():
        name = name.replace(diffusers, theirs)
    return _moved(name), None


def _moved(name: str) -> str:
    """Wan's last modulation has a module of its own."""
    folder, _, rest = name.partition(".")
    return f"{folder}.output_scale_shift_prepare.{rest}" if rest == "scale_shift_table" else name


def _raw(loaded: omni.Loaded, parameter: str, part: int | None) -> torch.Tensor:
    """A tensor as the weight loaders have left it: codes times the scale of their part."""
    tensor = loaded.raw[parameter]
    rows = _rows(loaded, parameter, part)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor[rows]
    return tensor[rows].float() * loaded.raw[f"{parameter}_scale"].reshape(-1)[part or 0]


def _served(loaded: omni.Loaded, parameter: str, part: int | None) -> torch.Tensor:
    """A tensor as it is multiplied with: vLLM requantises a fused layer with its largest scale, and transposes it."""
    tensor = loaded.pipeline.get_parameter(parameter).data
    rows = _rows(loaded, parameter, part)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor[rows]
    scale = loaded.pipeline.get_parameter(f"{parameter}_scale").data
    out, inner = loaded.raw[parameter].shape
    return tensor.t()[:out, :inner][rows].float() * scale


def _rows(loaded: omni.Loaded, parameter: str, part: int | None) -> slice:
    if part is None:
        return slice(None)
    layer = loaded.pipeline.get_submodule(parameter.rpartition(".")[0])
    assert isinstance(layer, LinearBase)
    first = sum(layer.output_partition_sizes[:part])
    return slice(first, first + layer.output_partition_sizes[part])
