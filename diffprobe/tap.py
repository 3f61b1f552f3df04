"""The tap: the arguments of an attention's own call of scaled dot-product attention, and maps computed from them.

While a tapped attention module runs, a function mode sees its calls of `torch.nn.functional.scaled_dot_product_attention`, of
`torch.baddbmm` under the eager `AttnProcessor`, and of the attention backend that diffusers dispatches to.  So query and key are
caught after their norms and rotary embedding, with mask and scale, whatever the model's class is.  The call itself is
made as the network makes it, unless it is asked for with another mask: the output has the same bits with and without the tap.

Axes: query (row, head, place, width), key (row, head, token, width); maps (row, head, token, place).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Which positions of a sequence are meant: a slice for all rows, or (row, position), of which one row stands for all.
Index: TypeAlias = slice | Tensor
ALL = slice(None)
_CHUNK_BYTES = 32 * 2**20  # float32 scores held at once; larger is no faster and shows in the peak memory
_SOME_BYTES = 4 * 2**20  # the same where the kernel gave the normaliser; smaller is faster there
# Taps that wait at an attention backend other than torch's own, and that backend, by its name in diffusers' registry.
_LISTENING: dict[Any, tuple[Any, list[Tap]]] = {}
_SDPA = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None
)


@dataclass
class Call:
    """One call of attention.

    Attributes:
        query, key: as the softmax sees them; the key may have fewer heads than the query (grouped queries).
        value: None under the eager processor, which multiplies by it later.
        mask: bool (True is seen) or added to the scores; broadcasts to (row, head, place, token).
        scale: what the product of query and key is multiplied by.
        index: which call of its module's forward pass this is, from 0.
        output: (row, head, place, width), once the call was made.
        normaliser: (row, head, place) logarithm of the softmax's denominator, where it was asked for and the kernel has it.
    """

    query: Float[Tensor, "row head place width"]
    key: Float[Tensor, "row key_head token width"]
    value: Tensor | None
    mask: Tensor | None
    scale: float
    index: int = 0
    output: Tensor | None = None
    normaliser: Tensor | None = None


Run: TypeAlias = Callable[..., Tensor]  # makes a call as the network does, or with the mask that it is given
Attend: TypeAlias = Callable[[Call, Run], Tensor]
_UNSEEN: list[bool] = []  # one entry for each `unseen` that is open


def backend_of(attention: nn.Module) -> Any:
    """The backend that an attention's calls are dispatched to."""
    own = getattr(getattr(attention, "processor", None), "_attention_backend", None)
    return own or attention_dispatch._AttentionBackendRegistry._active_backend


class Tap(TorchFunctionMode):
    """Sees the attention calls of one module; entered when its forward pass begins, left when it ends.

    Args:
        attend: stands in for each call.  It is given the call and a function that makes it, with another mask if given
            one, and returns the output that the network goes on with.
        normaliser: ask the kernel for `Call.normaliser`.

    Attributes:
        changes: whether `attend` changes calls; only such a tap sees those that are made inside `unseen`.
    """

    changes = False

    def __init__(self, attention: nn.Module, attend: Attend, normaliser: bool = False) -> None:
        super().__init__()
        self.attention, self.attend, self.normaliser = attention, attend, normaliser
        self.calls = 0
        self._open, self._inside, self.busy = False, False, False
        self._backend: Any = None

    def open(self) -> None:
        """Begin to listen."""
        self.close()  # what an interrupt may have left
        self.calls, self._inside, self._open = 0, False, True
        backends = attention_dispatch._AttentionBackendRegistry
        self._backend = backend_of(self.attention)
        if self._backend != attention_dispatch.AttentionBackendName.NATIVE:
            _LISTENING.setdefault(self._backend, (backends._backends[self._backend], []))[1].append(self)
            backends._backends[self._backend] = partial(_dispatched, self._backend)
        self.__enter__()

    def close(self) -> None:
        """Listen no more; without effect on a tap that is closed."""
        if not self._open:
            return
        self._open = False
        self.__exit__(None, None, None)
        if self._backend in _LISTENING:
            backend, taps = _LISTENING[self._backend]
            taps.remove(self)
            if not taps:
                del _LISTENING[self._backend]
                attention_dispatch._AttentionBackendRegistry._backends[self._backend] = backend

    def attach(self) -> list[Any]:
        """Hooks that open and close the tap with the module's forward pass; the caller removes them."""
        return [
            self.attention.register_forward_pre_hook(lambda *_: self.open()),
            self.attention.register_forward_hook(lambda *_: self.close(), always_call=True),
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside:
            if func is F.scaled_dot_product_attention:
                given = _SDPA.bind(*args, **kwargs)
                given.apply_defaults()
                other = {**given.arguments, "is_causal": False}

                def made(mask: Tensor | None = None) -> Tensor:
                    return func(*args, **kwargs) if mask is None else func(**{**other, "attn_mask": mask})

                return self._seen(_call_of(**given.arguments), made)
            if func is torch.baddbmm and type(getattr(self.attention, "processor", None)) is AttnProcessor:
                return self._eager(partial(func, *args, **kwargs), *args, **kwargs)
        return func(*args, **kwargs)

    def _seen(self, call: Call, run: Run) -> Tensor:
        if _UNSEEN and not self.changes:
            return run()
        call.index, self.calls = self.calls, self.calls + 1

        def real(mask: Tensor | None = None) -> Tensor:
            kernel = _Normaliser() if self.normaliser else None
            with kernel or nullcontext():
                call.output = run(mask)
            if kernel is not None and kernel.found is not None and kernel.found.shape == call.query.shape[:3]:
                call.normaliser = kernel.found
            return call.output

        return self._stand_in(call, real)

    def _stand_in(self, call: Call, real: Run) -> Tensor:
        self.busy = True
        try:
            return self.attend(call, real)
        finally:
            self.busy = False

    def _eager(self, run: Run, bias: Tensor, query: Tensor, key: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        """The scores of `Attention.get_attention_scores`, whose rows and heads are one axis."""
        if _UNSEEN and not self.changes:
            return run()
        heads = (-1, self.attention.heads)
        mask = bias.unflatten(0, heads) if beta else None
        call = Call(query.unflatten(0, heads), key.mT.unflatten(0, heads), None, mask, alpha, self.calls)
        self.calls += 1

        def real(mask: Tensor | None = None) -> Tensor:
            if mask is None:
                return run()
            mask = mask.expand(*call.query.shape[:3], call.key.shape[2]).flatten(0, 1)
            return torch.baddbmm(mask, query, key, beta=1, alpha=alpha)

        return self._stand_in(call, real)


@contextmanager
def unseen() -> Iterator[None]:
    """A call that is made inside is shown to no tap but those that change calls."""
    _UNSEEN.append(True)
    try:
        yield
    finally:
        _UNSEEN.pop()


def _dispatched(name: Any, **kwargs: Any) -> Any:
    """An attention backend of diffusers, whose axes are (row, place, head, width), with the taps that listen before it."""
    backend, taps = _LISTENING[name]
    query, key, value = (kwargs[argument].transpose(1, 2) for argument in ("query", "key", "value"))

    def made(listeners: list[Tap], given: dict[str, Any]) -> Tensor:
        if not listeners:
            return backend(**kwargs, **given).transpose(1, 2)

        def run(mask: Tensor | None = None) -> Tensor:
            return made(listeners[:-1], given if mask is None else {"attn_mask": mask})

        return listeners[-1]._seen(_call_of(query, key, value, scale=kwargs.get("scale"), **given), run)

    first: dict[str, Any] = {name: kwargs.pop(name) for name in ("attn_mask", "is_causal") if name in kwargs}
    for tap in taps:
        tap._inside = True  # some of these call torch's function in their turn
    try:
        return made(taps, first).transpose(1, 2)
    finally:
        for tap in taps:
            tap._inside = False


class _Normaliser(TorchDispatchMode):
    """Keeps the logarithm of the softmax's denominator where a flash kernel returns it beside its output."""

    found: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:  # in inference mode it arrives whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if func in (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
            torch.ops.aten._scaled_dot_product_flash_attention.default,
        ):
            self.found = output[1]
        return output


def _call_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, is_causal: bool = False, scale: float | None = None,
    **_: Any,
) -> Call:  # fmt: skip
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise ValueError(f"An attention mask of type {type(attn_mask).__name__} cannot be read; use the backend 'native'.")
    if is_causal:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        attn_mask = (
            seen if attn_mask is None else attn_mask.masked_fill(~seen, False if attn_mask.dtype == torch.bool else -torch.inf)
        )
    if attn_mask is not None:
        if attn_mask.ndim == 2 and attn_mask.shape == (len(query), key.shape[2]) != query.shape[2:3] + key.shape[2:3]:
            attn_mask = attn_mask[:, None, None]  # as diffusers' backends read it
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
    return Call(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)


# --- maps from a call -------------------------------------------------------------------------------


def take(tensor: Tensor, index: Index, dim: int = 2) -> Tensor:
    """Positions of an axis, each row its own where the index says so."""
    if isinstance(index, slice):
        return tensor[(ALL,) * dim + (index,)]
    if len(index) == 1:
        return tensor.index_select(dim, index[0].to(tensor.device))
    return torch.stack([row.index_select(dim - 1, at) for row, at in zip(tensor, index.to(tensor.device), strict=True)])


def narrow(index: Index, chosen: list[int] | None, size: int) -> Index:
    """Some of the positions that an index means, by their order in it.

    >>> narrow(slice(3, 9), [0, 2], 20).tolist()
    [[3, 5]]
    """
    if chosen is None:
        return index
    every = torch.arange(size)[None, index] if isinstance(index, slice) else index
    if max(chosen) >= every.shape[1]:
        raise ValueError(f"Token {max(chosen)} was asked for, where there are {every.shape[1]}, counted from 0.")
    return every[:, chosen]


def probabilities(
    call: Call,
    places: Index = ALL,
    among: Index = ALL,
    *,
    over: Literal["all", "among"] = "all",
    heads: Literal["mean", "all"] = "mean",
    tokens: list[int] | None = None,
    sum_tokens: bool = False,
) -> Float[Tensor, "row kept_head kept_token place"]:
    """Softmax of the scaled scores in float32, in chunks of rows and places.

    Where not all keys are asked for, and the kernel gave its normaliser, only these keys' scores are computed.

    Args:
        places: which queries.
        among: which keys are kept.
        over: the softmax is over all keys, or only over those in `among`.
        tokens: which of these are kept in the end, by their order.
        sum_tokens: add up what is kept to one token.
    """
    size = call.key.shape[2]
    kept: Index = narrow(among, tokens, size)
    partial = not (isinstance(kept, slice) and kept == ALL)
    known = call.normaliser if over == "all" and partial else None
    scored: Index = kept if known is not None else among if over == "among" else ALL
    # After a softmax over the scored keys, those that are kept, by their place among the scored.
    after: Index = ALL if known is not None else narrow(ALL, tokens, size) if over == "among" else kept
    key = take(call.key, scored)
    if (groups := call.query.shape[1] // key.shape[1]) > 1:
        key = key.repeat_interleave(groups, dim=1)
    query = take(call.query, places)
    # Where few keys are scored, the float32 copy of the queries is the larger one.
    row_bytes = max(1, 4 * query.shape[1] * query.shape[2] * max(key.shape[2], 0 if known is None else key.shape[3]))
    row_bytes = 1 if query.is_meta else row_bytes  # shapes alone take no memory
    limit = _CHUNK_BYTES if known is None else _SOME_BYTES
    rows_at_once, places_at_once = max(1, limit // row_bytes), max(1, query.shape[2] * limit // row_bytes)
    results = []
    for row in range(0, len(query), rows_at_once):
        part = slice(row, row + rows_at_once)
        keys = key[part].float().transpose(-1, -2)
        bias = _bias(call.mask, part, places, scored)
        norm = None if known is None else take(known[part], _rows(places, part))
        pieces = []
        for start in range(0, query.shape[2], places_at_once):
            piece = slice(start, start + places_at_once)
            scores = torch.matmul(query[part, :, piece].float() * call.scale, keys)
            if bias is not None:
                scores = scores + (bias[:, :, piece] if bias.shape[2] > 1 else bias)
            maps = scores.softmax(-1) if norm is None else scores.sub_(norm[:, :, piece, None]).exp_()
            if sum_tokens:
                maps = take(maps, _rows(after, part), 3).sum(-1, keepdim=True)
                maps = maps.mean(1, keepdim=True) if heads == "mean" else maps
            else:
                maps = maps.mean(1, keepdim=True) if heads == "mean" else maps
                maps = take(maps, _rows(after, part), 3)
            pieces.append(maps.transpose(-1, -2))
        results.append(torch.cat(pieces, dim=-1))
    return torch.cat(results)


def _rows(index: Index, part: slice) -> Index:
    return index if isinstance(index, slice) or len(index) == 1 else index[part]


def _bias(mask: Tensor | None, part: slice, places: Index, tokens: Index) -> Tensor | None:
    """The mask of some rows, places and tokens as what is added to float32 scores."""
    if mask is None:
        return None
    mask = mask[part] if len(mask) > 1 else mask
    for dim, index in ((2, places), (3, tokens)):
        if mask.shape[dim] > 1:
            chosen = _rows(index, part)
            rows = 1 if isinstance(chosen, slice) else len(chosen)
            mask = take(mask.expand(max(len(mask), rows), *mask.shape[1:]), chosen, dim)
    return additive(mask)


def additive(mask: Tensor | None, device: torch.device | None = None) -> Tensor:
    """A mask as what is added to float32 scores."""
    if mask is None:
        return torch.zeros(1, 1, 1, 1, device=device)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.float()


def output_products(
    call: Call, places: Index, words: Index, *, heads: Literal["mean", "all"] = "mean", tokens: list[int] | None = None
) -> Float[Tensor, "row kept_head kept_token place"]:
    """Inner products of attention outputs at image places with those at words, before the output projection, in float32.

    With heads "mean" they are over the concatenated heads, as in ConceptAttention (Helbling et al. 2025); with "all" each
    head's share, whose sum this is.
    """
    if call.output is None:
        raise ValueError("The eager processor's attention output is not seen here; use the library's default processor.")
    image, words = take(call.output, places), narrow(words, tokens, call.output.shape[2])
    word = take(call.output, words).float()
    at_once = max(1, _CHUNK_BYTES // (4 * image[:, :, :1].numel()))
    pieces = [torch.matmul(word, piece.float().transpose(-1, -2)) for piece in image.split(at_once, dim=2)]
    found = torch.cat(pieces, dim=-1)
    return found.sum(1, keepdim=True) if heads == "mean" else found
