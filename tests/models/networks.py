"""Small networks with random weights, and inputs for them."""

import torch

from dpt.config.sections import ModelConfig
from dpt.models import build_model

SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 4, "input_size": 8, "num_classes": 10}
VARIANTS = {
    "dense": {},
    "swiglu": {"num_experts": 4, "shared_expert_width": 64, "expert_activation": "swiglu"},
    "gelu": {"num_experts": 4, "expert_activation": "gelu", "normalize_top_k": True},
    "convolutions": {"mlp_kernel_size": 3, "num_conditions": 1},
    "router": {"patch_embed_tasks": 4, "num_conditions": 2, "clip_embedding_size": 6, "qk_norm": True},
}


def random_model(seed=0, *, std=0.1, **fields):
    """A network of SIZES and further fields, with random weights everywhere, zero-initialised layers included."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(**SIZES | fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def batch(model, size=None):
    """Four latents of the network's size or another one, timesteps, and the last labels: tasks', or the null one too."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    latents = torch.randn(4, model.in_channels, *(size or (config.input_size,) * 2), generator=generator)
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    labels = torch.arange(4) + config.num_classes - (4 if config.patch_embed_tasks else 3)
    return latents, timesteps, labels


def gradients(model, inputs):
    """The network's output, and the gradients of all its parameters under a loss that takes in the routers' two."""
    model.zero_grad()
    out = model(*inputs)
    (out.prediction.float().square().mean() + out.load_balancing_loss + out.router_z_loss).backward()
    return out, {name: parameter.grad for name, parameter in model.named_parameters()}
