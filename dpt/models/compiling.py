"""How blocks are compiled: torch.compile's options, where its defaults are slow at a DiT's shapes (docs/performance.md)."""

from typing import Any

LONGEST_ROW = 2048
"""Norms of rows up to this length are computed in one pass over a row; PyTorch's limit is 1024, and XL's rows have 1152."""


def options() -> dict[str, Any]:
    """Options for torch.compile's own backend; they apply to whatever is compiled from now on."""
    from torch._inductor import config

    _set_choices()
    # SwiGLU's gradient is two halves side by side: written in one pass over its inputs, not one for each half.
    # torch 2.11 has the first limit alone, which does not reach two halves.
    limits = ("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs")
    return {name: 1 for name in limits if hasattr(config, name)}


def _set_choices() -> None:
    """Extend the compiler's own choices through the extension point that `InductorChoices` documents."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            along_rows = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
            return along_rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW)

    V.set_choices_handler(Choices())
