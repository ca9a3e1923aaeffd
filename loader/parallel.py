"""A DiT on several ranks: processes that torchrun started, each with a GPU of its own and this same program.

Three ways, all of diffusers or PyTorch. Context parallelism divides the tokens, tensor parallelism
(`tensor_parallel.py`) the work and the weights of each linear, `fully_shard` (`fully_sharded.py`) the weights alone.
W8A8 linears quantise each token by itself, so that tokens may be anywhere.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from ..converter.telling.errors import LoadError, SettingsError
from .fully_sharded import spread_parameters
from .parts import Part
from .tensor_parallel import keep_one_bias, slice_linears

_MASK = "encoder_hidden_states_mask"


@dataclass(frozen=True)
class Ranks:
    """How DiTs lie on the ranks.

    context, tensor: diffusers' configs. mesh: the DeviceMesh over which parameters are spread.
    """

    context: Any = None
    tensor: Any = None
    mesh: Any = None

    @property
    def several(self) -> bool:
        """Whether there is more than this process."""
        return any(how is not None for how in (self.context, self.tensor, self.mesh))

    def divide(self, model: Any, label: str) -> Mapping[str, Part]:
        """Leave `model`, which has no memory yet, this rank's parameters alone; tells what of which it is to hold."""
        for what, wanted, plan in (("context", self.context, "_cp_plan"), ("tensor", self.tensor, "_tp_plan")):
            if wanted is not None and getattr(model, plan, None) is None:
                raise LoadError(
                    f"{label} cannot be loaded with {what} parallelism: diffusers {version('diffusers')} has no plan "
                    f"for {type(model).__name__}; pass fully_shard=True, which spreads the weights of any DiT."
                )
        if self.tensor is not None:
            return slice_linears(model, self.tensor, label)
        return {} if self.mesh is None else spread_parameters(model, self.mesh, label)

    def join(self, model: Any) -> None:
        """Once the model is filled: connect it with those of the other ranks."""
        if self.tensor is not None:
            keep_one_bias(model)
        if self.context is not None:
            model.enable_parallelism(config=self.context)

    def check(self, components: Mapping[str, Any]) -> None:
        """Raise LoadError where a DiT was to be divided and is whole on each rank: one that has no W8A8 linears, or
        that was given and not loaded.
        """
        if not self.several:
            return
        dits = [name for name, part in components.items() if _is_dit(name, part)]
        if whole := [name for name in dits if not _is_divided(components[name])] or ([] if dits else [*components]):
            raise LoadError(
                f"parallel_config and fully_shard divide DiTs that are loaded with W8A8 linears, and {whole[0]} is "
                "none; leave them out, or divide it yourself."
            )


def _is_dit(name: str, part: Any) -> bool:
    if not hasattr(part, "enable_parallelism"):  # a text encoder
        return False
    return name.startswith("transformer") or any(getattr(part, plan, None) for plan in ("_cp_plan", "_tp_plan"))


def _is_divided(part: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return getattr(part, "_parallel_config", None) is not None or isinstance(part, FSDPModule)


def choose_ranks(parallel_config: Any, fully_shard: Any, device: torch.device) -> Ranks:
    """What `load_pipeline`'s arguments ask for. Raises SettingsError (a ValueError) for what cannot be, or not here."""
    if parallel_config is None and not fully_shard:
        return Ranks()
    if not (dist.is_available() and dist.is_initialized()):
        raise SettingsError(
            "parallel_config and fully_shard are for several processes: start them with `torchrun --nproc-per-node 2 "
            "FILE.py`, and call torch.distributed.init_process_group() first."
        )
    context, tensor = _configs(parallel_config)
    if tensor is not None and fully_shard:
        raise SettingsError("A TensorParallelConfig divides the weights already; leave fully_shard out.")
    return Ranks(context, tensor, _mesh(fully_shard, device) if fully_shard else None)


def _configs(given: Any) -> tuple[Any, Any]:
    from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig

    if isinstance(given, ParallelConfig):
        return given.context_parallel_config, given.tensor_parallel_config
    if isinstance(given, ContextParallelConfig):
        return given, None
    if isinstance(given, TensorParallelConfig):
        return None, given
    if given is not None:
        raise SettingsError(
            f"parallel_config is {given!r:.80}; use diffusers' ContextParallelConfig(ulysses_degree=2) or "
            "TensorParallelConfig(tp_degree=2)."
        )
    return None, None


def _mesh(fully_shard: Any, device: torch.device) -> Any:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if fully_shard is True:
        return init_device_mesh(device.type, (dist.get_world_size(),))
    if isinstance(fully_shard, DeviceMesh) and fully_shard.ndim == 1:
        return fully_shard
    raise SettingsError(f"fully_shard is {fully_shard!r:.80}; use True, or a DeviceMesh of one dimension.")


def guard_parallelism(model: Any) -> None:
    """Let the FP8 model's `enable_parallelism` be `enable_parallelism` below."""
    if hasattr(model, "enable_parallelism"):
        model.enable_parallelism = partial(enable_parallelism, model)


def enable_parallelism(model: Any, *, config: Any, cp_plan: Any = None) -> None:
    """diffusers' own, for context parallelism; a mask, which goes wrong there in any precision, is dropped or refused.

    Raises ValueError for tensor parallelism, for which each rank reads its part: that is for `load_pipeline` to do.
    """
    if _configs(config)[1] is not None:
        raise SettingsError(
            "FP8 weights are cut for tensor parallelism while they are loaded; pass "
            "parallel_config=TensorParallelConfig(...) to load_pipeline."
        )
    type(model).enable_parallelism(model, config=config, cp_plan=cp_plan)
    parameters = [*inspect.signature(type(model).forward).parameters]
    if _MASK in parameters:
        model.register_forward_pre_hook(_MaskHook(parameters.index(_MASK) - 1), with_kwargs=True)


class _MaskHook:
    """Before a forward under context parallelism: drops a mask that masks nothing, and refuses any other.

    diffusers' attention gives NaN of a mask there, in BF16 as well, or takes each rank's tokens for all (ring).
    position: of the mask among positional arguments.
    """

    def __init__(self, position: int) -> None:
        self.position = position

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        mask = args[self.position] if len(args) > self.position else kwargs.get(_MASK)
        if mask is None:
            return None
        if not bool(mask.all()):
            raise ValueError(
                f"{_MASK} leaves tokens out, of which diffusers' attention gives NaN under context parallelism; run "
                "prompts of one length, or one at a time."
            )
        if len(args) > self.position:
            return (*args[: self.position], None, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, _MASK: None}
