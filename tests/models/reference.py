"""Independent references for imported weights: the published key and shape lists filled at random, and DiT's function of them.

Written from the papers and key lists alone, as plain functions of a state dict, so that they share nothing with dpt.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

SWIGLU = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def position_table(side, hidden):
    """numpy sin-cos table [1, side^2, hidden], column first."""
    omega = 1.0 / 10000 ** (np.arange(hidden // 4, dtype=np.float64) / (hidden / 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    parts = [f(np.outer(p, omega)) for p in (columns, rows) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]


def shapes(*, hidden, depth, patch=2, size=8, classes=10, channels=4, out=8, experts=0, kind="swiglu", shared=False,
           flash=False, tasks=0, heads=4):  # fmt: skip
    """Names and shapes of a public checkpoint."""
    d = hidden
    result = {"pos_embed": (1, (size // patch) ** 2, d)}
    convolutions = [f"x_embedder.proj.conv_in_{i + 1}" for i in range(tasks)] or ["x_embedder.proj"]
    for name in convolutions:
        result |= {f"{name}.weight": (d, channels, patch, patch), f"{name}.bias": (d,)}
    result |= {"t_embedder.mlp.0.weight": (d, 256), "t_embedder.mlp.0.bias": (d,)}
    result |= {"t_embedder.mlp.2.weight": (d, d), "t_embedder.mlp.2.bias": (d,)}
    result["y_embedder.embedding_table.weight"] = (classes + 1, d)
    for i in range(depth):
        b = f"blocks.{i}"
        qkv, proj = ("Wqkv", "out_proj") if flash else ("qkv", "proj")
        result |= {f"{b}.attn.{qkv}.weight": (3 * d, d), f"{b}.attn.{qkv}.bias": (3 * d,)}
        if flash:
            result |= {f"{b}.attn.{n}_norm.{k}": (d // heads,) for n in "qk" for k in ("weight", "bias")}
        result |= {f"{b}.attn.{proj}.weight": (d, d), f"{b}.attn.{proj}.bias": (d,)}
        mlp = {"fc1.weight": (4 * d, d), "fc1.bias": (4 * d,), "fc2.weight": (d, 4 * d), "fc2.bias": (d,)}
        if experts:
            one = mlp if kind == "gelu" else dict(zip(SWIGLU, ((4 * d, d), (4 * d, d), (d, 4 * d)), strict=True))
            result |= {f"{b}.moe.experts.{e}.{n}": s for e in range(experts) for n, s in one.items()}
            result[f"{b}.moe.gate.weight"] = (experts, d)
            if shared:
                wide = dict(zip(SWIGLU, ((2 * d, d), (2 * d, d), (d, 2 * d)), strict=True))
                result |= {f"{b}.moe.shared_experts.{n}": s for n, s in wide.items()}
        else:
            result |= {f"{b}.mlp.{n}": s for n, s in mlp.items()}
        result |= {f"{b}.adaLN_modulation.1.weight": (6 * d, d), f"{b}.adaLN_modulation.1.bias": (6 * d,)}
    result |= {"final_layer.linear.weight": (patch * patch * out, d), "final_layer.linear.bias": (patch * patch * out,)}
    result |= {"final_layer.adaLN_modulation.1.weight": (2 * d, d), "final_layer.adaLN_modulation.1.bias": (2 * d,)}
    return result


def random_state(names_and_shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(s, generator=generator) * 0.1 for n, s in names_and_shapes.items()}
    if "pos_embed" in state:
        _, tokens, hidden = state["pos_embed"].shape
        state["pos_embed"] = position_table(math.isqrt(tokens), hidden)
    return state


def dit(s, x, t, y, *, heads, top_k=2):
    """The public networks' function of a state dict `s`: x [B, C, h, h], t [B], y [B] -> [B, out, h, h]."""

    def linear(name, z):
        return F.linear(z, s[f"{name}.weight"], s.get(f"{name}.bias"))

    def modulated(z, shift, scale):
        return F.layer_norm(z, z.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    if "x_embedder.proj.weight" in s:
        patch = s["x_embedder.proj.weight"].shape[-1]
        h = F.conv2d(x, s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=patch)
    else:
        patch = s["x_embedder.proj.conv_in_1.weight"].shape[-1]
        names = [f"x_embedder.proj.conv_in_{label - 999}" for label in y.tolist()]
        h = torch.cat([F.conv2d(x[i : i + 1], s[f"{n}.weight"], s[f"{n}.bias"], stride=patch) for i, n in enumerate(names)])
    h = h.flatten(2).transpose(1, 2) + s["pos_embed"]
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = c + s["y_embedder.embedding_table.weight"][y]
    depth = 1 + max(int(n.split(".")[1]) for n in s if n.startswith("blocks."))
    for i in range(depth):
        b = f"blocks.{i}"
        m = linear(f"{b}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
        h = h + m[2][:, None] * _attention(s, f"{b}.attn", modulated(h, m[0], m[1]), heads, linear)
        z = modulated(h, m[3], m[4])
        z = _experts(s, f"{b}.moe", z, top_k, linear) if f"{b}.moe.gate.weight" in s else _mlp(s, f"{b}.mlp", z, linear)
        h = h + m[5][:, None] * z
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    h = linear("final_layer.linear", modulated(h, shift, scale))
    side = math.isqrt(h.shape[1])
    h = h.reshape(len(x), side, side, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, side * patch, side * patch)


def activated(hidden, kind):
    """GELU of [..., F], or SwiGLU of gate and up [..., 2 F]."""
    if kind == "gelu":
        return F.gelu(hidden, approximate="tanh")
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def mlp(x, kind, weights, e):
    """Expert `e` of stacked weights, those of both layers with biases or None: x [..., D] -> [..., D]."""
    w_in, b_in, w_out, b_out = (None if w is None else w[e] for w in weights)
    return F.linear(activated(F.linear(x, w_in, b_in), kind), w_out, b_out)


def _attention(s, name, z, heads, linear):
    batch, tokens, d = z.shape
    flash = f"{name}.Wqkv.weight" in s
    q, k, v = linear(f"{name}.{'Wqkv' if flash else 'qkv'}", z).view(batch, tokens, 3, heads, -1).unbind(2)
    if flash:
        size = (d // heads,)
        q = F.layer_norm(q, size, s[f"{name}.q_norm.weight"], s[f"{name}.q_norm.bias"], 1e-6)
        k = F.layer_norm(k, size, s[f"{name}.k_norm.weight"], s[f"{name}.k_norm.bias"], 1e-6)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d // heads)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(batch, tokens, d)
    return linear(f"{name}.{'out_proj' if flash else 'proj'}", out)


def _mlp(s, name, z, linear):
    if f"{name}.fc1.weight" in s:
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", z), approximate="tanh"))
    return linear(f"{name}.down_proj", F.silu(linear(f"{name}.gate_proj", z)) * linear(f"{name}.up_proj", z))


def _experts(s, name, z, top_k, linear):
    """Every token alone, as the definition reads; top-k probabilities are not renormalised in the released models."""
    flat = z.flatten(0, 1)
    probs = linear(f"{name}.gate", flat).softmax(-1)
    out = torch.zeros_like(flat)
    for token in range(len(flat)):
        for p, e in zip(*probs[token].topk(top_k), strict=True):
            out[token] += p * _mlp(s, f"{name}.experts.{int(e)}", flat[token], linear)
    if f"{name}.shared_experts.up_proj.weight" in s:
        out = out + _mlp(s, f"{name}.shared_experts", flat, linear)
    return out.view_as(z)
