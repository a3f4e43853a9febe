"""Maps from our tensors to those of diffusers' DiTTransformer2DModel, and architectures from and to its config.json."""

from collections.abc import Mapping
from typing import Any

from dpt.config.recipe import type_in_words
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.weight_maps import Source, infer_channels, named

_EMBEDDERS = {  # every block of diffusers' model carries a copy
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_INSIDE = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}


def diffusers_map(name: str, config: ModelConfig) -> Source:
    """The map to diffusers' names; embedders are those of block 0 (`embedder_copies` names the others)."""
    layer, kind = name.rsplit(".", 1)
    if layer in _OUTSIDE:
        return Source([[f"{_OUTSIDE[layer]}.{kind}"]])
    if layer in _EMBEDDERS:
        return Source([[f"transformer_blocks.0.norm1.emb.{_EMBEDDERS[layer]}.{kind}"]])
    _, block, part = layer.split(".", 2)
    return Source([[f"transformer_blocks.{block}.{n}.{kind}" for n in _INSIDE[part]]])


def embedder_copies(name: str, config: ModelConfig) -> list[str]:
    """Names of the further copies of an embedder's tensor in diffusers' blocks 1, 2, ...; none for other tensors."""
    layer, kind = name.rsplit(".", 1)
    if layer not in _EMBEDDERS:
        return []
    return [f"transformer_blocks.{i}.norm1.emb.{_EMBEDDERS[layer]}.{kind}" for i in range(1, config.depth)]


_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "upcast_attention": False,
}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "in_channels", "num_layers"), (int,)),
    **dict.fromkeys(("norm_num_groups", "sample_size", "patch_size", "num_embeds_ada_norm"), (int,)),
    "out_channels": (int, type(None)),
    "norm_eps": (float, int),
    "timestep_features": (str,),
}
_ABSENT = (  # parts of Transformer2DModel (older DiT folders are of that class) that a DiT does not have
    *("cross_attention_dim", "num_vector_embeds", "use_linear_projection", "only_cross_attention"),
    *("double_self_attention", "caption_channels", "interpolation_scale", "use_additional_conditions"),
)


def config_from_diffusers(values: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a DiTTransformer2DModel's config.json describes; UserError for what our model does not support."""
    fixed = {**_FIXED, "attention_type": "default"}
    for name, value in values.items():
        if name in fixed and value != fixed[name]:
            raise UserError(f"{name} is {value!r}; only {fixed[name]!r} is supported.")
        if name in _ABSENT and value not in (None, False):
            raise UserError(f"{name} is {value!r}; a DiT has no such part.")
        if (kinds := _KINDS.get(name)) and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise UserError(f"{name} is {value!r}; it must be {type_in_words(kinds[0])}.")
        if not name.startswith("_") and name not in {*fixed, *_KINDS, *_ABSENT}:
            raise UserError(f'there is no field "{name}" in a DiTTransformer2DModel; remove it, or check the file.')
    if (features := values.get("timestep_features", "diffusers")) not in ("dit", "diffusers"):
        raise UserError(f"timestep_features is {features!r}; choose dit or diffusers.")
    heads, total_in = values.get("num_attention_heads", 16), values.get("in_channels", 4)
    if min(heads, total_in) < 1:
        raise UserError(f"num_attention_heads is {heads} and in_channels {total_in}; both must be at least 1.")
    config = ModelConfig(
        input_size=values.get("sample_size", 32),
        patch_size=values.get("patch_size", 2),
        hidden_size=heads * values.get("attention_head_dim", 72),
        depth=values.get("num_layers", 28),
        num_heads=heads,
        num_classes=values.get("num_embeds_ada_norm", 1000),
        mlp_norm_eps=values.get("norm_eps", 1e-5),
        timestep_features=features,
        **infer_channels(total_in, values.get("out_channels") or total_in),
    )
    return named(config)


def config_to_diffusers(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the DiTTransformer2DModel with this architecture; UserError if there is none."""
    lacking = {"num_experts": 0, "patch_embed_tasks": 0, "clip_embedding_size": 0, "mlp_kernel_size": 0, "qk_norm": False}
    for name, expected in lacking.items():
        if getattr(config, name) != expected:
            raise UserError(f"dpt.model.{name} is {getattr(config, name)}; diffusers' DiTTransformer2DModel has no such part.")
    if config.mlp_ratio != 4.0:
        raise UserError(f"dpt.model.mlp_ratio is {config.mlp_ratio}; diffusers' DiTTransformer2DModel has 4.0 only.")
    # A key that diffusers reports and ignores, for our own way back.
    features = {} if config.timestep_features == "diffusers" else {"timestep_features": config.timestep_features}
    return {
        "_class_name": "DiTTransformer2DModel",
        **features,
        **_FIXED,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels * (1 + config.num_conditions),
        "out_channels": config.in_channels * (2 if config.learn_sigma else 1),
        "num_layers": config.depth,
        "norm_num_groups": 32,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
    }
