"""Calls into the compiled kernels: tensors in, tensors out, no autograd. Callers have checked `kernels.fits`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.models import kernels

# p pointer (a tensor, or none), l int64, f float; every kernel but `attention_*` ends with the number of threads.
_SIGNATURES = {
    "attention_forward": "p pp",
    "attention_backward": "p ppp pppp",
    "attention_cached": "p lll p lll p lll pp llllll ff l",
    "rms_norm_forward": "pppppp ll ff l",
    "rms_norm_backward": "ppppppp ll f l",
    "silu_mul_forward": "pp ll l",
    "silu_mul_backward": "pppp ll l",
    "heads_forward": "p lll p llll p ff pp ll l",
    "heads_backward": "p lll ppp llll p ff pp ll l",
    "embedding_backward": "ppp ll l",
    "cross_entropy": "pppp ll ff l",
    "entropy": "pppp ll ff l",
    "decoder_forward": "ppppp l p l pp",
    "sample": "p l pppp p ll l",
    "philox_blocks": "p l p l l",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float}
_TENSORS = ("q", "k", "v")
_STRIDES = tuple(f"{x}_{axis}" for x in _TENSORS for axis in ("row", "token", "head"))


_PLACES_A_THREAD = 32768  # of a vocabulary: ten microseconds of sampling, below which a second thread costs more than it does


class _AttentionArguments(ctypes.Structure):
    """The same fields in the same order as `AttentionArguments` in attention.cpp."""

    _fields_ = (
        *((x, ctypes.c_void_p) for x in _TENSORS),
        *((x, ctypes.c_int64) for x in _STRIDES),
        ("spans", ctypes.c_void_p),
        *((x, ctypes.c_int64) for x in ("spans_count", "T", "Hq", "Hkv", "D", "window")),
        *((x, ctypes.c_void_p) for x in ("q_weight", "k_weight", "cos", "sin")),
        *((x, ctypes.c_int64) for x in ("cos_row", "rotary")),
        *((x, ctypes.c_float) for x in ("scale", "cap", "eps", "offset")),
        ("threads", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class HeadPrep:
    """What happens to each query and key head before attention; nothing by default."""

    q_weight: Tensor | None = None  # [D] RMS norm weights, both or none
    k_weight: Tensor | None = None
    eps: float = 0.0
    unit_offset: bool = False  # multiply by weight + 1
    cos: Tensor | None = None  # [T,R] or [B,T,R] rotary positions, contiguous, both or none
    sin: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """Who sees whom: `spans` [n,3] of a Layout, and the knobs of the scores."""

    spans: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None


def call(name: str, *arguments: Tensor | ctypes.Structure | float | None) -> None:
    """Calls a kernel with the arguments of its C++ definition. Tensors pass their address."""
    function = getattr(kernels.library(), name)
    if function.argtypes is None:
        function.argtypes = [_TYPES[x] for x in _SIGNATURES[name].replace(" ", "")]
        function.restype = None
    function(*(_raw(x) for x in arguments))


def _raw(x: Tensor | ctypes.Structure | float | None) -> float | None:
    if isinstance(x, Tensor):
        return x.data_ptr()
    return ctypes.addressof(x) if isinstance(x, ctypes.Structure) else x


def rotary_strides(cos: Tensor | None, length: int) -> tuple[int, int]:
    """Floats between rows of cos and sin (0 where all rows share them), and how many dimensions turn."""
    if cos is None:
        return 0, 0
    assert cos.is_contiguous()
    return (0 if cos.dim() == 2 or cos.shape[0] == 1 else length * cos.shape[-1]), cos.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, prep: HeadPrep) -> _AttentionArguments:
    for x in (q, k, v):
        assert x.stride(3) == 1, "the numbers of one head must lie side by side"
    length = q.shape[1]
    cos_row, rotary = rotary_strides(prep.cos, length)
    pointers = {x: y.data_ptr() for x, y in zip(_TENSORS, (q, k, v), strict=True)}
    pointers |= {x: y.data_ptr() for x in ("q_weight", "k_weight", "cos", "sin") if (y := getattr(prep, x)) is not None}
    strides = dict(zip(_STRIDES, (s for x in (q, k, v) for s in x.stride()[:3]), strict=True))
    return _AttentionArguments(
        **pointers,
        **strides,
        spans=mask.spans.data_ptr(),
        spans_count=len(mask.spans),
        T=length,
        Hq=q.shape[2],
        Hkv=k.shape[2],
        D=q.shape[3],
        window=0 if mask.window is None or mask.window >= length else mask.window,
        cos_row=cos_row,
        rotary=rotary,
        scale=mask.scale,
        cap=mask.softcap or 0.0,
        eps=prep.eps,
        offset=float(prep.unit_offset),
        threads=torch.get_num_threads(),
    )


def covers(mask: Mask, rows: int, length: int) -> bool:
    """True when every token belongs to a segment, so that kernels leave nothing unwritten."""
    return int(mask.spans[:, 2].sum()) == rows * length


def attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, prep: HeadPrep) -> tuple[Tensor, Tensor]:
    """Attention output [B,T,Hq,D], and the log-sum of scores [B,Hq,T] that the backward pass needs."""
    rows, length, heads, _ = q.shape
    make = torch.empty if covers(mask, rows, length) else torch.zeros
    out, lse = make(q.shape, dtype=torch.float32), torch.empty(rows, heads, length)
    call("attention_forward", _attention(q, k, v, mask, prep), out, lse)
    return out, lse


def attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    d_qkv: tuple[Tensor, Tensor, Tensor],
    mask: Mask,
    prep: HeadPrep,
) -> Tensor:
    """Fills `d_qkv` (strides as `qkv`; padding is left as it is), gives the gradients [2,D] of the norm weights."""
    assert all(x.stride() == d.stride() for x, d in zip(qkv, d_qkv, strict=True))
    grad = grad.contiguous()
    d_weights = torch.empty(2, grad.shape[3])
    call("attention_backward", _attention(*qkv, mask, prep), out, lse, grad, *d_qkv, d_weights)
    return d_weights


def attention_cached(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """q [S,t,Hq,D] against caches [S,L,Hkv,D] of which lengths [S] int64 tokens are valid -> [S,t,Hq,D]."""
    assert len(lengths) == len(q) == len(k) and int(lengths.max()) <= k.shape[1], "a length beyond the cache"
    out = torch.empty(q.shape, dtype=torch.float32)
    places: list[Tensor | int] = []
    for x in (q, k, v):
        places += [x, *x.stride()[:3]]
    sequences, new, heads, width = q.shape
    call(
        "attention_cached",
        *places,
        *(lengths, out, sequences, new, heads, k.shape[2], width, window or 0),
        *(scale, softcap or 0.0, torch.get_num_threads()),
    )
    return out


def heads_forward(x: Tensor, weight: Tensor | None, prep: HeadPrep) -> Tensor:
    """Norm with `weight` [D] (none: no norm) and rotary positions of `prep`, on x [B,T,H,D] of any strides -> contiguous."""
    assert x.stride(3) == 1
    out = torch.empty(x.shape, dtype=torch.float32)
    strides = rotary_strides(prep.cos, x.shape[1])
    call(
        "heads_forward",
        *(x, *x.stride()[:3], out, *x.shape, weight, prep.eps, float(prep.unit_offset), prep.cos, prep.sin, *strides),
        torch.get_num_threads(),
    )
    return out


def heads_backward(x: Tensor, grad: Tensor, weight: Tensor | None, prep: HeadPrep) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (contiguous) and of `weight`; `grad` is left alone."""
    work, dx = grad.clone(memory_format=torch.contiguous_format), torch.empty(x.shape, dtype=torch.float32)
    dw = None if weight is None else torch.empty_like(weight)
    strides = rotary_strides(prep.cos, x.shape[1])
    call(
        "heads_backward",
        *(x, *x.stride()[:3], work, dx, dw, *x.shape, weight, prep.eps, float(prep.unit_offset), prep.cos, prep.sin, *strides),
        torch.get_num_threads(),
    )
    return dx, dw


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, add: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normed rows, 1 / rms of each row, and x + add where there is an `add`. All contiguous."""
    width = x.shape[-1]
    rows = x.numel() // width
    out, rstd = torch.empty_like(x), torch.empty(rows)
    total = None if add is None else torch.empty_like(x)
    call("rms_norm_forward", x, add, weight, out, total, rstd, rows, width, eps, float(unit_offset), torch.get_num_threads())
    return out, rstd, total


def rms_norm_backward(
    x: Tensor, weight: Tensor, rstd: Tensor, grad: Tensor, unit_offset: bool, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x (with `rest`, what reached x by another way, added) and of the weight."""
    width = x.shape[-1]
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    call(
        "rms_norm_backward",
        *(x, weight, rstd, grad, rest, dx, dw, x.numel() // width, width, float(unit_offset), torch.get_num_threads()),
    )
    return dx, dw


def silu_mul_forward(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width))
    call("silu_mul_forward", gate_up, out, out.numel() // width, width, torch.get_num_threads())
    return out


def silu_mul_backward(gate_up: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of gate_up; the forward result goes to `out` once more, which may be `grad` itself."""
    width = grad.shape[-1]
    result = torch.empty_like(gate_up)
    call("silu_mul_backward", gate_up, grad, result, out, grad.numel() // width, width, torch.get_num_threads())
    return result


def embedding_backward(ids: Tensor, grad: Tensor, vocabulary: int) -> Tensor:
    """[V,H] gradient of a table from that of its looked-up rows."""
    width = grad.shape[-1]
    out = torch.zeros(vocabulary, width)
    call("embedding_backward", ids, grad, out, ids.numel(), width, torch.get_num_threads())
    return out


def cross_entropy(z: Tensor, targets: Tensor, weights: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Loss of each row of raw logits z [n,V] (overwritten: by the gradient of sum(weights * loss), if there are weights)."""
    _check_targets(z, targets)
    loss = torch.empty(len(z))
    call("cross_entropy", z, targets, weights, loss, len(z), z.shape[1], scale, softcap or 0.0, torch.get_num_threads())
    return loss


def entropy(z: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Loss of each row of raw logits z [n,V] (overwritten), and the entropy of its distribution."""
    _check_targets(z, targets)
    loss, out = torch.empty(len(z)), torch.empty(len(z))
    call("entropy", z, targets, loss, out, len(z), z.shape[1], scale, softcap or 0.0, torch.get_num_threads())
    return loss, out


def sample(scores: Tensor, top: Tensor, temperature: Tensor, keys: Tensor, noisy: Tensor | None = None) -> Tensor:
    """A token [S] int64 of each row of scores [S,V], whose numbers lie side by side: the largest of (scores - top) / temperature
    + noise; where temperature is 0 the first of the largest scores. top and temperature are [S], keys [S,3] int64: seed, sample,
    token index. With `noisy` [S,V] the noisy scores go there."""
    assert scores.stride(1) == 1 and all(x.is_contiguous() for x in (top, temperature, keys)) and keys.dtype == torch.int64
    rows, size = scores.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    threads = min(torch.get_num_threads(), 1 + scores.numel() // _PLACES_A_THREAD)
    call("sample", scores, scores.stride(0), top, temperature, keys, tokens, noisy, rows, size, threads)
    return tokens


def philox(counters: Tensor, key: int) -> Tensor:
    """The four words of each counter [n,4], 32 bits in an int32, by Philox4x32-10 under a key of 64 bits (signed)."""
    out = torch.empty_like(counters)
    call("philox_blocks", counters, key, out, len(counters), torch.get_num_threads())
    return out


def _check_targets(z: Tensor, targets: Tensor) -> None:
    if len(z) and not (int(targets.min()) >= 0 and int(targets.max()) < z.shape[1]):
        raise IndexError(f"a target outside the vocabulary of {z.shape[1]}: {int(targets.min())} to {int(targets.max())}")
