"""A DiT on several ranks: processes that torchrun started, each with a GPU of its own and this same program.

Three ways, all of diffusers or PyTorch. Context parallelism (`context_parallel.py`) divides the tokens, tensor
parallelism (`tensor_parallel.py`) the work and the weights of each linear, `fully_shard` (`fully_sharded.py`) the
weights alone. W8A8 linears quantise each token by itself, so that tokens may be anywhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from ..converter.snapshot.snapshot import Component
from ..converter.telling.errors import LoadError, SettingsError
from .context_parallel import check_heads
from .fully_sharded import spread_parameters
from .parts import Part
from .tensor_parallel import keep_one_bias, slice_linears


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
        """Whether a DiT is to be divided."""
        return any(how is not None for how in (self.context, self.tensor, self.mesh))

    def check(self, dits: Sequence[Component], others: Iterable[str], label: str) -> None:
        """Raise LoadError where a DiT cannot be divided so, or one would be whole on every rank.

        dits: the components with W8A8 linears that are to be loaded. others: the names of all else in the pipeline.
        label: what the whole is called.
        """
        if not self.several:
            return
        whole = [name for name in others if name.startswith("transformer")] or ([] if dits else [label])
        if whole:
            raise LoadError(
                f"{whole[0]} cannot be divided: parallel_config and fully_shard are for DiTs that are loaded here with "
                "W8A8 linears; leave them out, or divide it yourself."
            )
        for dit in dits:
            self._check(dit)

    def _check(self, dit: Component) -> None:
        import diffusers

        cls = getattr(diffusers, dit.class_name or "", None)
        for what, config, plan in (("context", self.context, "_cp_plan"), ("tensor", self.tensor, "_tp_plan")):
            if config is not None and getattr(cls, plan, None) is None:
                raise LoadError(
                    f"{dit.label} cannot be loaded with {what} parallelism: diffusers {version('diffusers')} has no "
                    f"plan for {dit.class_name}; pass fully_shard=True, which spreads the weights of any DiT."
                )
        heads = dit.config.get("num_attention_heads")
        if not isinstance(heads, int):
            return
        if self.context is not None:
            check_heads(self.context, heads, dit.label)
        if self.tensor is not None and heads % _degree(self.tensor):
            raise LoadError(
                f"{dit.label} has {heads} attention heads, which {_degree(self.tensor)} ranks cannot share equally."
            )

    def divide(self, model: Any, label: str) -> Mapping[str, Part]:
        """Leave `model`, which has no memory yet, this rank's parameters alone; tells what of which it is to hold."""
        if self.tensor is not None:
            return slice_linears(model, self.tensor, _degree(self.tensor), label)
        return {} if self.mesh is None else spread_parameters(model, self.mesh, label)

    def join(self, model: Any) -> None:
        """Once the model is filled: connect it with those of the other ranks."""
        if self.tensor is not None:
            keep_one_bias(model)
        if self.context is not None:
            model.enable_parallelism(config=self.context)


def choose_ranks(parallel_config: Any, fully_shard: Any, device: torch.device) -> Ranks:
    """What `load_pipeline`'s arguments ask for. Raises SettingsError (a ValueError) for what cannot be, or not here.

    On every rank alike, so that none waits for another in vain.
    """
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
    if context is not None:
        degrees = context.ulysses_degree * context.ring_degree
        _check_mesh("ContextParallelConfig", context.mesh, ("ring", "ulysses"), degrees)
    if tensor is not None:
        _check_mesh("TensorParallelConfig", tensor.mesh, (), tensor.tp_degree)
    return Ranks(context, tensor, _mesh(fully_shard, device) if fully_shard else None)


def _configs(given: Any) -> tuple[Any, Any]:
    from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig

    if given is None:
        return None, None
    if isinstance(given, ContextParallelConfig):
        return given, None
    if isinstance(given, TensorParallelConfig):
        return None, given
    if isinstance(given, ParallelConfig) and (given.context_parallel_config or given.tensor_parallel_config):
        return given.context_parallel_config, given.tensor_parallel_config
    raise SettingsError(
        f"parallel_config is {given!r:.80}; use diffusers' ContextParallelConfig(ulysses_degree=2) or "
        "TensorParallelConfig(tp_degree=2)."
    )


def _degree(config: Any) -> int:
    """Of diffusers' TensorParallelConfig."""
    return int(config.mesh.size() if config.mesh is not None else config.tp_degree)


def _mesh(fully_shard: Any, device: torch.device) -> Any:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if fully_shard is True:
        return init_device_mesh(device.type, (dist.get_world_size(),))
    if not isinstance(fully_shard, DeviceMesh):
        raise SettingsError(f"fully_shard is {fully_shard!r:.80}; use True, or a DeviceMesh of one dimension.")
    _check_mesh("fully_shard", fully_shard, (), 0)
    return fully_shard


def _check_mesh(what: str, mesh: Any, names: tuple[str, ...], degree: int) -> None:
    """Raise SettingsError for a mesh without these dimensions (one, where none is named) or without this rank.

    degree: how many ranks there must be where no mesh is given.
    """
    if mesh is None:
        if degree != (count := dist.get_world_size()):
            raise SettingsError(
                f"{what} divides among {degree} ranks, and torchrun started {count}; let both be the same, or pass a "
                "mesh of those that share a DiT."
            )
        return
    found = mesh.mesh_dim_names or ()
    if not {*names} <= {*found} or (not names and mesh.ndim != 1):
        wanted = f"with the dimensions {' and '.join(names)}" if names else "of one dimension"
        raise SettingsError(f"The mesh of {what} has the dimensions {found or mesh.ndim}; pass one {wanted}.")
    if mesh.get_coordinate() is None:
        raise SettingsError(f"The mesh of {what} does not have rank {dist.get_rank()}, which loads a DiT too.")
