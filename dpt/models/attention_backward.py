"""Backward pass of attention over short sequences on Hopper GPUs, in Triton: one gradient for queries, keys and values.

cuDNN's backward pass adds to the queries' gradient in float32, converts it, and leaves three gradients to be joined: at 256
tokens and 72 channels a head that takes 1.3 times as long (docs/performance.md). Here one kernel makes the queries' gradient
and another that of keys and values (Dao, "FlashAttention-2", 2023, algorithm 2), straight into one tensor; nothing is added
atomically, so results repeat. The 72 channels of XL's heads are multiplied as 64 + 16, not as 128.

Import this only where `triton` is installed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten

_LOG2E = tl.constexpr(1.4426950408889634)
MOST_TOKENS = 256
"""Longer sequences are left to cuDNN, which gets faster with length."""
TILES = {"queries": (64, 64, 4, 2), "keys": (64, 64, 4, 3)}
"""Rows of queries, rows of keys, warps and stages of each kernel."""


def serves(qkv: Tensor) -> bool:
    """Whether the kernels support qkv [B, T, 3, H, d]."""
    tokens, size = qkv.shape[1], qkv.shape[4]
    if tokens > MOST_TOKENS or not 64 <= size <= 80 or size % 8:
        return False
    return torch.cuda.get_device_capability(qkv.device)[0] == 9


def attention(qkv: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of qkv [B, T, 3, H, d], 16-bit: [B, T, H, d]. The forward pass is cuDNN's."""
    result: Tensor = _Attention.apply(qkv, scale)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        qkv, out, lse = ctx.saved_tensors
        return gradient(qkv, out.transpose(1, 2), lse, grad, ctx.scale), None


@torch.library.custom_op("dpt::attention_gradient", mutates_args=())
def gradient(qkv: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float) -> Tensor:
    """The gradient of qkv [B, T, 3, H, d], given the result and its gradient [B, T, H, d], and the natural logarithms of the
    softmaxes' sums, float32 [B, H, T] or [B, H, T, 1]."""
    samples, tokens, _, heads, size = qkv.shape
    qkv, out, lse, grad = qkv.contiguous(), out.contiguous(), lse.contiguous(), grad.contiguous()
    d_qkv = torch.empty_like(qkv)
    dots = torch.empty(samples, heads, tokens, dtype=torch.float32, device=qkv.device)
    for kernel, (rows_q, rows_k, warps, stages) in ((_queries, TILES["queries"]), (_keys, TILES["keys"])):
        rows = rows_q if kernel is _queries else rows_k
        whole = tokens % rows_q == 0 and tokens % rows_k == 0
        kernel[(triton.cdiv(tokens, rows), samples * heads)](
            qkv, out, grad, d_qkv, lse, dots, scale, tokens, heads, size, 16 if size > 64 else 0, rows_q, rows_k, whole,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return d_qkv


@gradient.register_fake
def _(qkv: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


# A tile [R, d] is kept as its first 64 channels and a tail of 16, zero beyond d; without one (TAIL 0) the tail is not used.


@triton.jit
def _load(ptr, rows, stride, first: tl.constexpr, width: tl.constexpr, size: tl.constexpr, tokens: tl.constexpr,
          whole: tl.constexpr):  # fmt: skip
    columns = first + tl.arange(0, width)
    at = ptr + rows[:, None] * stride + columns[None, :]
    if whole:
        if first + width <= size:
            return tl.load(at)
        return tl.load(at, mask=columns[None, :] < size, other=0.0)
    return tl.load(at, mask=(columns[None, :] < size) & (rows[:, None] < tokens), other=0.0)


@triton.jit
def _store(ptr, rows, stride, tile, first: tl.constexpr, width: tl.constexpr, size: tl.constexpr, tokens: tl.constexpr):
    columns = first + tl.arange(0, width)
    at = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(columns[None, :] < size) & (rows[:, None] < tokens))


@triton.jit
def _place(tokens: tl.constexpr, heads: tl.constexpr, size: tl.constexpr):
    """The program's sample and head as one number, and where they begin in [B, T, H, d] and in [B, T, 3, H, d]."""
    pair = tl.program_id(1).to(tl.int64)
    first = (pair // heads) * (tokens * heads * size)
    within = (pair % heads) * size
    return pair, first + within, 3 * first + within


@triton.jit
def _queries(qkv, out, grad, d_qkv, lse, dots, scale, tokens: tl.constexpr, heads: tl.constexpr, size: tl.constexpr,
             TAIL: tl.constexpr, ROWS_Q: tl.constexpr, ROWS_K: tl.constexpr, whole: tl.constexpr):  # fmt: skip
    """dq = scale (p * (g v^T - dots)) k, with p = softmax(scale q k^T) and dots = sum(g * out); keeps `dots`."""
    pair, of_head, packed = _place(tokens, heads, size)
    stride: tl.constexpr = 3 * heads * size
    q_ptr, k_ptr, v_ptr = qkv + packed, qkv + packed + heads * size, qkv + packed + 2 * heads * size
    m = tl.program_id(0) * ROWS_Q + tl.arange(0, ROWS_Q)
    q = _load(q_ptr, m, stride, 0, 64, size, tokens, whole)
    g = _load(grad + of_head, m, heads * size, 0, 64, size, tokens, whole)
    o = _load(out + of_head, m, heads * size, 0, 64, size, tokens, whole)
    dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    dq = tl.zeros([ROWS_Q, 64], tl.float32)
    if TAIL:
        q_tail = _load(q_ptr, m, stride, 64, TAIL, size, tokens, whole)
        g_tail = _load(grad + of_head, m, heads * size, 64, TAIL, size, tokens, whole)
        o_tail = _load(out + of_head, m, heads * size, 64, TAIL, size, tokens, whole)
        dot += tl.sum(g_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
        dq_tail = tl.zeros([ROWS_Q, TAIL], tl.float32)
    tl.store(dots + pair * tokens + m, dot, mask=m < tokens)
    log_sum = tl.load(lse + pair * tokens + m, mask=m < tokens, other=float("inf")) * _LOG2E
    for start in range(0, tokens, ROWS_K):
        n = start + tl.arange(0, ROWS_K)
        k = _load(k_ptr, n, stride, 0, 64, size, tokens, whole)
        v = _load(v_ptr, n, stride, 0, 64, size, tokens, whole)
        scores, dp = tl.dot(q, tl.trans(k)), tl.dot(g, tl.trans(v))
        if TAIL:
            k_tail = _load(k_ptr, n, stride, 64, TAIL, size, tokens, whole)
            v_tail = _load(v_ptr, n, stride, 64, TAIL, size, tokens, whole)
            scores, dp = tl.dot(q_tail, tl.trans(k_tail), scores), tl.dot(g_tail, tl.trans(v_tail), dp)
        p = tl.exp2(scores * (scale * _LOG2E) - log_sum[:, None])
        ds = (p * (dp - dot[:, None])).to(k.dtype)  # keys beyond the last are zero and add nothing
        dq = tl.dot(ds, k, dq)
        if TAIL:
            dq_tail = tl.dot(ds, k_tail, dq_tail)
    to = d_qkv + packed
    _store(to, m, stride, dq * scale, 0, 64, size, tokens)
    if TAIL:
        _store(to, m, stride, dq_tail * scale, 64, TAIL, size, tokens)


@triton.jit
def _keys(qkv, out, grad, d_qkv, lse, dots, scale, tokens: tl.constexpr, heads: tl.constexpr, size: tl.constexpr,
          TAIL: tl.constexpr, ROWS_Q: tl.constexpr, ROWS_K: tl.constexpr, whole: tl.constexpr):  # fmt: skip
    """dv = p^T g and dk = scale (p * (g v^T - dots))^T q, where `_queries` has left `dots`."""
    pair, of_head, packed = _place(tokens, heads, size)
    stride: tl.constexpr = 3 * heads * size
    q_ptr, k_ptr, v_ptr, g_ptr = qkv + packed, qkv + packed + heads * size, qkv + packed + 2 * heads * size, grad + of_head
    n = tl.program_id(0) * ROWS_K + tl.arange(0, ROWS_K)
    k, v = _load(k_ptr, n, stride, 0, 64, size, tokens, whole), _load(v_ptr, n, stride, 0, 64, size, tokens, whole)
    dk, dv = tl.zeros([ROWS_K, 64], tl.float32), tl.zeros([ROWS_K, 64], tl.float32)
    if TAIL:
        k_tail = _load(k_ptr, n, stride, 64, TAIL, size, tokens, whole)
        v_tail = _load(v_ptr, n, stride, 64, TAIL, size, tokens, whole)
        dk_tail, dv_tail = tl.zeros([ROWS_K, TAIL], tl.float32), tl.zeros([ROWS_K, TAIL], tl.float32)
    for start in range(0, tokens, ROWS_Q):
        m = start + tl.arange(0, ROWS_Q)
        q = _load(q_ptr, m, stride, 0, 64, size, tokens, whole)
        g = _load(g_ptr, m, heads * size, 0, 64, size, tokens, whole)
        log_sum = tl.load(lse + pair * tokens + m, mask=m < tokens, other=float("inf")) * _LOG2E
        dot = tl.load(dots + pair * tokens + m, mask=m < tokens, other=0.0)
        scores, dp = tl.dot(k, tl.trans(q)), tl.dot(v, tl.trans(g))  # [keys, queries]
        if TAIL:
            q_tail = _load(q_ptr, m, stride, 64, TAIL, size, tokens, whole)
            g_tail = _load(g_ptr, m, heads * size, 64, TAIL, size, tokens, whole)
            scores, dp = tl.dot(k_tail, tl.trans(q_tail), scores), tl.dot(v_tail, tl.trans(g_tail), dp)
        p = tl.exp2(scores * (scale * _LOG2E) - log_sum[None, :])  # zero for queries beyond the last
        ds = (p * (dp - dot[None, :])).to(q.dtype)
        p = p.to(q.dtype)
        dv, dk = tl.dot(p, g, dv), tl.dot(ds, q, dk)
        if TAIL:
            dv_tail, dk_tail = tl.dot(p, g_tail, dv_tail), tl.dot(ds, q_tail, dk_tail)
    to_k, to_v = d_qkv + packed + heads * size, d_qkv + packed + 2 * heads * size
    _store(to_k, n, stride, dk * scale, 0, 64, size, tokens)
    _store(to_v, n, stride, dv, 0, 64, size, tokens)
    if TAIL:
        _store(to_k, n, stride, dk_tail * scale, 64, TAIL, size, tokens)
        _store(to_v, n, stride, dv_tail, 64, TAIL, size, tokens)
