"""What users of `from_pretrained` are used to pass: its names for device and dtype, and its other keywords.

A keyword that asks for what is done anyway is let pass; any other is refused with the reason. None asks for nothing.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..converter.telling.errors import SettingsError

_DTYPES = {
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
    "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64,
}  # fmt: skip
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_ONE_DEVICE = (
    "load_pipeline puts everything on one device: pass device='cuda', and where memory is short device='cpu' and then "
    "pipe.enable_model_cpu_offload() or pipe.enable_group_offload(...)"
)
_NO_CODE = "code that comes with a repository is never run"
_NO_ONNX = "FP8 weights run in PyTorch alone"

# Keyword of from_pretrained: the values that ask for what is done anyway, and why any other is refused.
_HABITS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "use_safetensors": ((True,), "nothing but safetensors is read"),
    "low_cpu_mem_usage": ((True,), "weights always go from the file straight to their module"),
    "disable_mmap": ((True, False), "files are read, not mapped"),
    "resume_download": ((True, False), "downloads always resume"),
    "force_download": ((False,), "files come from the Hub cache; delete the repository there to fetch it anew"),
    "proxies": ((), "set the environment's HTTPS_PROXY instead"),
    "use_auth_token": ((), "pass it as token"),
    "subfolder": ((), "give load_pipeline the pipeline's folder, or load_component the component's name"),
    "trust_remote_code": ((False,), _NO_CODE),
    "custom_pipeline": ((), f"{_NO_CODE}; build that class from the parts of this one: Custom(**pipe.components)"),
    "custom_revision": ((), _NO_CODE),
    "load_connected_pipeline": ((False,), "load each pipeline by itself"),
    "safety_checker": ((), "this pipeline has none"),
    "requires_safety_checker": ((False,), "this pipeline has no safety checker"),
    "output_loading_info": ((False,), "report(pipe) tells what was loaded"),
    "ignore_mismatched_sizes": ((False,), "weights that do not fit the config are an error"),
    "max_memory": ((), _ONE_DEVICE),
    "offload_folder": ((), _ONE_DEVICE),
    "offload_state_dict": ((False,), "no second copy of the weights is made, so that there is nothing to offload"),
    "use_flashpack": ((False,), "nothing but safetensors is read"),
    "use_onnx": ((False,), _NO_ONNX),
    "provider": ((), _NO_ONNX),
    "provider_options": ((), _NO_ONNX),
    "sess_options": ((), _NO_ONNX),
}


def without_habits(
    given: Mapping[str, Any], accepted: Collection[str], taker: str, options: Collection[str]
) -> dict[str, Any]:
    """`given` without from_pretrained's keywords that ask for what is done anyway.

    accepted: what `taker` takes. options: what else the caller takes, to name the nearest. Raises TypeError for a
    keyword that is not accepted, and says why, or what may have been meant.
    """
    kept = {}
    for name, value in given.items():
        if name in accepted:
            kept[name] = value
        elif name in _HABITS:
            harmless, why = _HABITS[name]
            if value is not None and not any(value is each for each in harmless):
                raise TypeError(f"{name}={value!r:.80} is refused: {why}; leave it out.")
        else:
            near = difflib.get_close_matches(name, sorted({*accepted, *options, *_HABITS}), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted({*accepted, *options}))}."
            raise TypeError(f"{taker} takes no argument {name!r}; {hint}")
    return kept


def choose_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype:
    """The dtype that `dtype`, or its older name `torch_dtype`, asks for; BF16 where neither does.

    Raises SettingsError (a ValueError) for what is no floating-point dtype to compute in, and for two that differ.
    """
    chosen = {_dtype(value) for value in (dtype, torch_dtype) if value is not None}
    if len(chosen) > 1:
        raise SettingsError(f"dtype is {dtype} and its older name torch_dtype is {torch_dtype}; pass dtype alone.")
    return chosen.pop() if chosen else torch.bfloat16


def _dtype(value: Any) -> torch.dtype:
    found = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if isinstance(found, torch.dtype) and found in _DTYPES.values():
        return found
    if isinstance(value, dict):
        why = "everything in a pipeline computes in one dtype; load a component of another one with load_component"
    elif value == "auto":
        why = "the file says FP8, which is not a dtype to compute in"
    else:
        why = "it is what everything that is not FP8 is held in, and what is computed in"
    raise SettingsError(f"dtype is {value!r:.80}: {why}; use torch.bfloat16 (the default), float16 or float32.")


def choose_device(device: Any, device_map: Any) -> torch.device:
    """The one device that `device`, or from_pretrained's `device_map`, names; CUDA where there is one, else the CPU.

    Raises SettingsError (a ValueError) for a map over several devices, for a device that is not there, and for two that
    differ.
    """
    chosen = {_device(value) for value in (device, _mapped(device_map)) if value is not None}
    if len(chosen) > 1:
        raise SettingsError(f"device is {device!r} and device_map is {device_map!r}; pass device alone.")
    return chosen.pop() if chosen else _device("cuda" if torch.cuda.is_available() else "cpu")


def _mapped(device_map: Any) -> Any:
    """The device of a map that names a single one."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        return device_map[""]
    if isinstance(device_map, Mapping) or device_map in _STRATEGIES:
        raise SettingsError(f"device_map={device_map!r:.80} spreads a model over devices, but {_ONE_DEVICE}.")
    return device_map


def _device(value: Any) -> torch.device:
    try:
        found = torch.device("cuda", value) if type(value) is int else torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f"{value!r:.80} is not a device; use 'cuda', 'cuda:0' or 'cpu'.") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise SettingsError(
            f"Weights cannot be loaded onto {found.type!r}; use 'cuda' or 'cpu', and move the pipeline."
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise SettingsError(f"torch {torch.__version__} finds no CUDA device for {str(found)!r}; use device='cpu'.")
    index = torch.cuda.current_device() if found.index is None else found.index
    if not 0 <= index < count:
        raise SettingsError(f"There is no device {str(found)!r}; the last one is 'cuda:{count - 1}'.")
    return torch.device("cuda", index)
