"""CUDA graphs of a DiT's repeated blocks: what the host launches kernel by kernel is recorded once and replayed.

For hosts that cannot launch as fast as the GPU computes. A block is recorded the second time that it is called with the
same kind of inputs, compared bit by bit with what it just computed, and replayed from then on. Each call makes sure
that what was recorded still stands: the same modules, settings, adapters, memory of weights and states of PyTorch. What
changes any of them records anew; hooks (offloading, caches), gradients, and inputs that are no plain CUDA tensors run
as ever, and so does for good a block that cannot be recorded, which is logged once.

A replay reads its inputs from memory that all blocks share and results are copies, so that nothing a caller holds is
written over. It costs three passes over the hidden states and the memory of two of them. While one thread records,
others run as ever.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

logger = logging.getLogger(__name__)

_MOST = 8  # recordings that a block keeps: kinds of inputs times states of its modules
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device, type)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}  # its own dicts, which are looked at by name
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FOREIGN = ("_hf_hook", "_diffusers_hook", "forward")  # of accelerate, of diffusers, of whoever replaces a forward


class _Constant(NamedTuple):
    """A part of inputs or results that is no tensor."""

    kind: type
    value: Any


class _NotPlainError(TypeError):
    """Something else than tensors and simple values in tuples, lists and dicts."""


@dataclass
class _Place:
    """What recordings of one thread on one stream share: they run one after the other."""

    pool: Any
    held: dict[Any, list[Tensor]] = field(default_factory=dict)

    def like(self, use: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Memory for such tensors, the same whenever it is asked for."""
        key = use, *_kinds(tensors)
        if key not in self.held:
            with torch.inference_mode(False):
                self.held[key] = [torch.empty_like(tensor) for tensor in tensors]
        return self.held[key]


@dataclass
class _Recording:
    """A graph that reads `inputs` and writes `outputs`; `form` says how the block returns them."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]
    form: Any
    place: _Place

    def replay(self, tensors: Sequence[Tensor]) -> Any:
        _copy(self.inputs, tensors)
        self.graph.replay()
        return _put_together(self.form, iter([held.clone() for held in self.outputs]))


@dataclass
class _Graphs:
    """The recordings of one block, the latest used last; None for what was called once."""

    made: "OrderedDict[Any, _Recording | None]" = field(default_factory=OrderedDict)
    refused: bool = False


_graphs: "WeakKeyDictionary[nn.Module, _Graphs]" = WeakKeyDictionary()
_recording = threading.Lock()  # PyTorch cannot record in two threads at once
_places: "WeakValueDictionary[tuple[int, int, int], _Place]" = WeakValueDictionary()


class GraphedBlock(nn.Module):
    """Mixin over a block's class; see `record_blocks`."""

    plain_class: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graphs = _graphs.get(self)
        state = _state(self) if graphs is not None and not graphs.refused and _allowed() else None
        if graphs is None or state is None:
            return super().__call__(*args, **kwargs)
        tensors: list[Tensor] = []
        try:
            form = _taken_apart((args, kwargs), tensors)
        except _NotPlainError:
            return super().__call__(*args, **kwargs)
        device = torch.cuda.current_device()
        if not tensors or any(type(t) not in _PLAIN_TENSORS or t.get_device() != device for t in tensors):
            return super().__call__(*args, **kwargs)
        here = threading.get_ident(), device, int(torch._C._cuda_getCurrentRawStream(device))
        key = here, form, _kinds(tensors), state, _state_of_torch()
        if key not in graphs.made:
            graphs.made[key] = None
            if len(graphs.made) > _MOST:
                graphs.made.popitem(last=False)
            return super().__call__(*args, **kwargs)
        graphs.made.move_to_end(key)
        recording = graphs.made[key]
        if recording is not None:
            return recording.replay(tensors)
        if not _recording.acquire(blocking=False):
            return super().__call__(*args, **kwargs)
        try:
            return self._record(graphs, key, tensors)
        finally:
            _recording.release()

    def _record(self, graphs: _Graphs, key: Any, tensors: list[Tensor]) -> Any:
        """Run the block as ever, and record it if a replay has the same bits."""
        here, form = key[:2]
        before = [tensor.clone() for tensor in tensors]
        args, kwargs = _put_together(form, iter(tensors))
        expected = super().__call__(*args, **kwargs)
        if not _same(before, tensors):
            return self._refuse(graphs, "it writes into its inputs", expected)
        place = _places.get(here)
        if place is None:
            place = _places[here] = _Place(torch.cuda.graph_pool_handle())
        try:
            recording = _recorded(super().__call__, form, tensors, expected, place)
            found: list[Tensor] = []
            wanted: list[Tensor] = []
            same_form = _taken_apart(recording.replay(tensors), found) == _taken_apart(expected, wanted)
        except (RuntimeError, _NotPlainError) as error:
            return self._refuse(graphs, str(error).splitlines()[0], expected)
        if not (same_form and _same(found, wanted)):
            return self._refuse(graphs, "a replay has other bits", expected)
        graphs.made[key] = recording
        return expected

    def _refuse(self, graphs: _Graphs, why: str, result: Any) -> Any:
        graphs.refused = True
        graphs.made.clear()
        logger.warning("a %s runs without CUDA graphs: %s", type(self).__name__, why)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is plain: recordings are of this block's memory.
        return _new, (self.plain_class,), self.__getstate__()  # type: ignore[no-untyped-call]


def _new(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def record_blocks(model: nn.Module) -> int:
    """Let the blocks that `model` names in `_repeated_blocks` be recorded and replayed; returns how many there are."""
    names = getattr(model, "_repeated_blocks", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in blocks:
        if not isinstance(block, GraphedBlock):
            block.__class__ = _class_of(type(block))
            _graphs[block] = _Graphs()
    return len(blocks)


def recorded_blocks(model: nn.Module) -> tuple[int, int, int]:
    """How many blocks may be recorded, of how many of these there are recordings, and how many cannot be recorded."""
    graphs = [_graphs[m] for m in model.modules() if isinstance(m, GraphedBlock) and m in _graphs]
    allowed = [one for one in graphs if not one.refused]
    recorded = sum(any(made is not None for made in one.made.values()) for one in allowed)
    return len(allowed), recorded, len(graphs) - len(allowed)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _class_of(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `plain`, of the same name: libraries find repeated blocks by it."""
    if plain not in _classes:
        fields = {"plain_class": plain, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
        _classes[plain] = type(plain.__name__, (GraphedBlock, plain), fields)
    return _classes[plain]


def _allowed() -> bool:
    """Whether what runs now may be recorded or replayed at all."""
    return torch.cuda.is_initialized() and not (  # type: ignore[no-untyped-call]
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.cuda.is_current_stream_capturing()
    )


def _kinds(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """How a value is made of tensors, which are appended, and of constants: something to compare."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor
    if isinstance(value, _SIMPLE):
        return _Constant(type(value), value)
    if type(value) is dict:
        return (dict, *[(key, _taken_apart(item, tensors)) for key, item in value.items()])
    if type(value) in (tuple, list):
        return (type(value), *[_taken_apart(item, tensors) for item in value])
    raise _NotPlainError(f"a {type(value).__name__} goes in or comes out")


def _put_together(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The value that was taken apart, of these tensors."""
    if form is Tensor:
        return next(tensors)
    if isinstance(form, _Constant):
        return form.value
    made, *items = form
    if made is dict:
        return {key: _put_together(item, tensors) for key, item in items}
    return made(_put_together(item, tensors) for item in items)


def _state(block: nn.Module) -> tuple[Any, ...] | None:
    """What a recording of the block depends on beside its inputs; None where hooks take part."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    state: list[Any] = []
    for module in block.modules():
        held = module.__dict__
        if any(held[name] for name in _HOOKS) or any(name in held for name in _FOREIGN):
            return None
        state.append((id(module), type(module)))
        for tensors in (held["_parameters"], held["_buffers"]):
            state += [None if tensor is None else _of_tensor(tensor) for tensor in tensors.values()]
        state += [_of(value) for name, value in held.items() if name not in _OF_EVERY_MODULE]
    return tuple(state)


def _of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.dtype, tensor.shape, version


def _of(value: Any, depth: int = 0) -> Any:
    """A value as something to compare: what it holds, as far as that is simple, and which object it is."""
    if isinstance(value, _SIMPLE):
        return type(value), value
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, nn.Module) or depth > 2:
        return id(value)
    if isinstance(value, tuple | list | set):
        return (type(value), *(_of(item, depth + 1) for item in value))
    if isinstance(value, dict):
        return tuple((_of(key, depth + 1), _of(item, depth + 1)) for key, item in value.items())
    return id(value), _of(getattr(value, "__dict__", None), depth + 1)


def _state_of_torch() -> tuple[Any, ...]:
    """PyTorch's own settings that decide which kernels run."""
    cuda: Any = torch.backends.cuda
    return (
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        _attention_backend(),
    )


def _attention_backend() -> Any:
    """The one that diffusers' `attention_backend` context chose."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry.get_active_backend()[0]


def _recorded(
    call: Callable[..., Any], form: Any, tensors: Sequence[Tensor], expected: Any, place: _Place
) -> _Recording:
    """`call` as a graph, on inputs and with results like these. Raises RuntimeError for what cannot be recorded."""
    wanted: list[Tensor] = []
    out_form = _taken_apart(expected, wanted)
    inputs, outputs = place.like("inputs", tensors), place.like("outputs", wanted)
    _copy(inputs, tensors)
    args, kwargs = _put_together(form, iter(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=place.pool, capture_error_mode="thread_local"):
        found: list[Tensor] = []
        if _taken_apart(call(*args, **kwargs), found) != out_form or _kinds(found) != _kinds(wanted):
            raise RuntimeError("what it returns changes")
        _copy(outputs, found)
    return _Recording(graph, inputs, outputs, out_form, place)


def _copy(held: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    for memory, tensor in zip(held, given, strict=True):
        memory.copy_(tensor)


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether tensors are the same to the bit, NaN included."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(*(t.reshape(-1).view(torch.uint8) for t in pair)) for pair in pairs)
