"""diffusers' DiTPipeline with the timestep frequencies that DiT and dpt train with; needs only diffusers.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline="pipeline", trust_remote_code=True)

Plain DiTPipeline uses frequencies 10000^(-i / 127); these networks were trained with 10000^(-i / 128), which no config states.
"""

from typing import Any

from diffusers import DiTPipeline


class DptDiTPipeline(DiTPipeline):
    """Class-conditional images exactly as the network was trained."""

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, id2label: dict[int, str] | None = None) -> None:
        super().__init__(transformer=transformer, vae=vae, scheduler=scheduler, id2label=id2label)
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
