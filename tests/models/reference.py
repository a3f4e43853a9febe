"""Independent references for imported weights: the published key and shape lists, filled at random, and networks made of them.

Written from the papers and key lists alone, as the textbook's network is, so that they share no computation with dpt.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import textbook
from dpt.config.sections import ModelConfig

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


def network(state, *, hidden, depth, patch=2, size=8, classes=10, channels=4, out=8, experts=0, kind="swiglu", shared=False,
            flash=False, tasks=0, heads=4):  # fmt: skip
    """The textbook's network with the weights of `random_state(shapes(...))`."""
    config = ModelConfig(
        hidden_size=hidden, depth=depth, num_heads=heads, patch_size=patch, input_size=size, num_classes=classes,
        num_conditions=channels // 4 - 1, learn_sigma=out == 8, num_experts=experts, expert_activation=kind,
        shared_expert_width=2 * hidden if shared else 0, qk_norm=flash, patch_embed_tasks=tasks,
    )  # fmt: skip
    plain = textbook.DiT(config)
    names = {n: n.replace("Wqkv", "qkv").replace("out_proj", "proj") for n in state if n != "pos_embed"}
    plain.load_state_dict({names[n]: state[n] for n in names})
    return plain


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
