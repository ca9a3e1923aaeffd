"""Linears that are given the same activations, one after the other: q, k and v of an attention, gate and up of an MLP.

The first to be called quantises the activations for all. Of few tokens it also multiplies them with the weights of all
at once, which is one product where the weights lie in memory side by side, as loading puts them. The others take what
was kept for them. Results have the bits of each linear called alone.

Nothing is wrapped or renamed: modules, weights, state dicts, hooks and LoRAs stay what they are. What is kept is for
the very tensor that it was computed of, as long as nobody has written into that; linears that turn out to have
different inputs (cross attention) are left alone from then on. Compiled code shares nothing: there each quantisation is
part of the operation before it, and what checking a group cost before each call was more than sharing saved.
"""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .kernels import E4M3
from .product import Product, Quantized, multiply, quantize, takes_bias
from .weights import SCALES

if TYPE_CHECKING:
    from .linear import W8A8LinearMixin

# Names of siblings that models call on one input.
SIBLINGS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("w1", "w3"))

# Up to here one product of all is faster, measured on an H100; beyond, results that lie in one memory would make the
# operations after them slower and live longer.
_JOINT_TOKENS = 1024

_JOINT = ("weight", "bias", *SCALES[:2])  # what lies side by side

_ABANDONED = 3  # so often may results be left behind before a group gives up
_AT_ONCE = 2  # groups that may be under way in one thread: a model may call those of its two streams in turn


@dataclass(eq=False)
class _Kept:
    """What one linear of a group has computed for the others, and for whom it is.

    waiting: the others that have not been called yet, by id so that none is kept alive, each with its result where that
    is there already.
    """

    group: "SharedInput"
    x: "weakref.ref[Tensor]"
    version: int
    stream: int
    quantized: Quantized
    waiting: dict[int, Tensor | None]

    def is_of(self, x: Tensor) -> bool:
        return self.x() is x and self.version == x._version and self.stream == _stream(x)

    def take(self, member: "W8A8LinearMixin", kind: Product) -> Tensor:
        out = self.waiting.pop(id(member))
        if not self.waiting:
            _here.kept.remove(self)
        return _multiply(member, kind, self.quantized) if out is None else out

    def abandon(self) -> None:
        """Drop what some did not fetch: their input was another, or they were not called at all."""
        _here.kept.remove(self)
        self.group.abandoned += 1
        self.group.apart = self.x() is not None or self.group.abandoned >= _ABANDONED


class SharedInput:
    """A group of linears of one kind of product. Not thread-safe in itself: what is kept is kept for each thread."""

    def __init__(self, members: "Sequence[W8A8LinearMixin]") -> None:
        self._members = tuple(map(weakref.ref, members))  # they hold this: models are to go with the last name for them
        self.apart = False  # given up: members are on their own
        self.abandoned = 0
        self._agreed: tuple[tuple[int, int], ...] = ()
        self._alike = len({member.out_features for member in members}) == 1

    @property
    def members(self) -> "tuple[W8A8LinearMixin, ...]":
        """Those that are still there."""
        return tuple([member for held in self._members if (member := held()) is not None])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "_members": tuple(map(weakref.ref, state["_members"]))})

    def product(self, member: "W8A8LinearMixin", kind: Product, x: Tensor) -> Tensor | None:
        """`member`'s FP8 product with `x` [..., K] as [M, N]; None where it is to be computed by itself."""
        if self.apart or x.is_inference():
            return None
        for kept in _here.kept:
            if kept.group is self:
                if id(member) in kept.waiting and kept.is_of(x):
                    return kept.take(member, kind)
                kept.abandon()
                break
        members = self.members
        if self.apart or len(members) < 2 or member not in members or not self._agree(members):
            return None  # a copy of a member has its group, and is none
        return self._begin(members, member, kind, x)

    def settle(self, *leaves: str) -> None:
        """Put the members' tensors of these names (codes, biases and scales) side by side, once all are on one CUDA
        device, and not spread over ranks.
        """
        for leaf in leaves or _JOINT:
            tensors = [m._parameters.get(leaf, m._buffers.get(leaf)) for m in self.members]
            held = [t for t in tensors if t is not None and t.is_cuda and t.dim() and not hasattr(t, "to_local")]
            alike = len({(t.device, t.dtype) for t in held}) == 1
            if len(held) < len(tensors) or not alike or side_by_side(held) is not None:
                continue
            joint = torch.cat([t.detach() for t in held])
            for tensor, piece in zip(held, torch.split(joint, [len(t) for t in held]), strict=True):
                tensor.data = piece

    def _begin(
        self, members: "tuple[W8A8LinearMixin, ...]", member: "W8A8LinearMixin", kind: Product, x: Tensor
    ) -> Tensor:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        ids = [id(each) for each in members]
        waiting: dict[int, Tensor | None] = dict.fromkeys(ids)
        joint = self._joint(members, rows, x.dtype) if rows <= _JOINT_TOKENS else None
        quantized = quantize(kind, flat, member.scale, member.static_scale, kept=joint is not None)
        if joint is not None:
            out = multiply(kind, quantized, *joint)
            # Each contiguous, as if computed alone: operations on slices of a row, such as `cat`, take several times as
            # long as this copy.
            outputs = out.view(rows, len(members), -1).transpose(0, 1).contiguous()
            waiting = dict(zip(ids, outputs.unbind(), strict=True))
        mine = waiting.pop(id(member))
        if len(_here.kept) == _AT_ONCE:
            _here.kept[0].abandon()
        _here.kept.append(_Kept(self, weakref.ref(x), x._version, _stream(x), quantized, waiting))
        return _multiply(member, kind, quantized) if mine is None else mine

    def _agree(self, members: "tuple[W8A8LinearMixin, ...]") -> bool:
        """Whether all members have the same single scales, of which the quantised activations depend."""
        first = members[0]
        scales = [] if first.scale.dim() else [m.scale for m in members]
        if first.static_scale is not None:
            scales += [cast(Tensor, m.static_scale) for m in members]
        if not scales:
            return True
        stamp = tuple([(scale.data_ptr(), 0 if scale.is_inference() else scale._version) for scale in scales])
        if stamp == self._agreed:
            return True
        if len({scale.device for scale in scales}) > 1 or first.scale.is_meta:
            return False  # offloading brings each layer's where it is used
        if scales[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # reading them now is not possible, and is tried again later
        values = torch.stack(scales).view(-1, len(members)).cpu()
        self.apart = not bool((values == values[:, :1]).all())
        self._agreed = stamp
        return not self.apart

    def _joint(
        self, members: "tuple[W8A8LinearMixin, ...]", rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Codes, scale and bias of all members as one linear's; None where that would not have each one's bits, or they
        do not lie side by side.
        """
        first = members[0]
        if not self._alike:
            return None
        codes = side_by_side([m._parameters["weight"] for m in members])
        if codes is None:
            return None
        scale: Tensor | None = first.scale
        if first.scale.dim():
            if first.block is not None and first.out_features % first.block[0]:
                return None
            scale = side_by_side([m.scale for m in members])
        if scale is None:
            return None
        bias = None
        if any(m._parameters["bias"] is not None for m in members):
            bias = side_by_side([m._parameters["bias"] for m in members])
            whole, n, k = codes.shape[0], first.out_features, first.in_features
            if bias is None or bias.dtype != dtype or takes_bias(rows, whole, k) != takes_bias(rows, n, k):
                return None
        return codes.view(E4M3), scale, bias


def _multiply(member: "W8A8LinearMixin", kind: Product, quantized: Quantized) -> Tensor:
    return multiply(kind, quantized, member.codes, member.scale, member.bias_in(quantized.dtype))


def _stream(x: Tensor) -> int:
    """The stream that computes; what another one has computed may not be there yet."""
    return int(torch._C._cuda_getCurrentRawStream(x.get_device())) if x.is_cuda else 0


class _Here(threading.local):
    """What is kept in this thread."""

    def __init__(self) -> None:
        self.kept: list[_Kept] = []


_here = _Here()


def side_by_side(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One view over contiguous tensors of one dtype that follow each other in memory, joined along the first dimension.

    None where they do not, or all of their memory is not the first one's.
    """
    first = tensors[0]
    if first is None:
        return None
    start = end = first.data_ptr()
    rows = 0
    for tensor in tensors:
        if tensor is None or tensor.data_ptr() != end or not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return None
        rows += tensor.shape[0]
        end += tensor.nbytes
    room = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
    if not start or end - start > room:
        return None
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def share_inputs(model: nn.Module) -> None:
    """Let the linears of `model` that are given the same activations share what they compute of them.

    They are W8A8 siblings with the names of `SIBLINGS`, of one width and one kind of scales.
    """
    for parent in model.modules():
        for names in SIBLINGS:
            members = [cast("W8A8LinearMixin", parent._modules.get(name)) for name in names]
            if not all(hasattr(member, "wanted") for member in members):
                continue
            kinds = {(m.in_features, m.format, m.wanted, m.backend) for m in members}
            if len(kinds) == 1 and members[0].wanted != "dequantize":
                group = SharedInput(members)
                for member in members:
                    member.shared = group


def groups_of(model: nn.Module) -> list[SharedInput]:
    """The groups of linears that share their input, each once."""
    shared = (getattr(module, "shared", None) for module in model.modules())
    return list(dict.fromkeys(group for group in shared if isinstance(group, SharedInput)))


def settle(model: nn.Module) -> None:
    """Put the weights of each group side by side, where they are on a CUDA device."""
    for group in groups_of(model):
        group.settle()
