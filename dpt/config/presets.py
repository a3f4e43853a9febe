"""Model sizes by name: plain data, so that a recipe can be checked without torch.

Sizes: DiT (S, B, L, XL), Scaling Properties of Diffusion Models for Perceptual Tasks, Tables 1 and 2 (a1-a6), DiT-MoE (…E2A).
MoE presets, trained from scratch, have SwiGLU experts of width 4 d without biases and one shared expert of width 2 d.

"-E16" and "-E48": fine experts as in DSMoE (Liu et al., "Efficient Training of Diffusion Mixture-of-Experts Models: A
Practical Recipe", 2025): 16 of which a token uses 2, or 48 of which it uses 5, and a shared one about as wide; sigmoid gates,
normalised, balanced by a bias. Theirs are in every second block; ours are in every block and narrower: the experts that a token
passes through take exactly the MACs of the dense preset's MLP (L/2: 0.1% less), so that quality compares at equal compute.
"""

from typing import Any

from dpt.errors import UserError

_DENSE_WIDTHS: dict[str, tuple[int, int, int]] = {  # hidden_size, depth, num_heads
    "a1": (256, 12, 16),
    "a2": (512, 16, 16),
    "a3": (768, 20, 16),
    "a4": (1024, 24, 16),
    "a5": (1536, 28, 16),
    "a6": (1792, 32, 16),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "G": (1408, 40, 16),
}


def _dense(name: str, patch_size: int = 2) -> dict[str, Any]:
    sizes = dict(zip(("hidden_size", "depth", "num_heads"), _DENSE_WIDTHS[name], strict=True))
    return {**sizes, "patch_size": patch_size, "expert_activation": "gelu", "normalize_top_k": True}


def _moe(name: str, num_experts: int) -> dict[str, Any]:
    dense = _dense(name)
    experts = {"num_experts": num_experts, "top_k": 2, "expert_activation": "swiglu", "normalize_top_k": False}
    return dense | experts | {"shared_expert_width": 2 * dense["hidden_size"]}


_FINE: dict[tuple[str, int], tuple[int, int, int]] = {  # top_k, width of an expert, width of the shared one
    ("S", 16): (2, 344, 336),
    ("S", 48): (5, 168, 184),
    ("L", 16): (2, 912, 904),
    ("L", 48): (5, 456, 448),
}
"""3 d (top_k width + shared) = 8 d^2, the dense MLP's MACs, in multiples of 8."""


def _fine(name: str, num_experts: int) -> dict[str, Any]:
    dense, (top_k, width, shared) = _dense(name), _FINE[name, num_experts]
    experts = {"num_experts": num_experts, "top_k": top_k, "mlp_ratio": width / dense["hidden_size"]}
    gates = {"router_gate": "sigmoid", "router_bias_balancing": True}
    return dense | experts | gates | {"expert_activation": "swiglu", "shared_expert_width": shared}


PRESETS: dict[str, dict[str, Any]] = {
    **{name: _dense(name) for name in ("a1", "a2", "a3", "a4", "a5", "a6")},
    **{f"{name}/{patch}": _dense(name, patch) for name in ("S", "B", "L", "XL") for patch in (2, 4, 8)},
    **{f"{name}/2-8E2A": _moe(name, 8) for name in ("S", "B", "L", "XL")},
    "S/2-16E2A": _moe("S", 16),
    "G/2-16E2A": _moe("G", 16),
    **{f"{name}/2-E{num_experts}": _fine(name, num_experts) for name, num_experts in _FINE},
}


def preset_values(name: str) -> dict[str, Any]:
    """The fields that preset `name` sets, as `ModelConfig` keywords; UserError if there is no such preset."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f'dpt.model.preset: there is no preset "{name}"; choose one of {", ".join(PRESETS)}.')
    return {"preset": name, **PRESETS[name]}
