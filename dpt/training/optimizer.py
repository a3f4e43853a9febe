"""AdamW with running averages of the weights, and the learning-rate schedule."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from dpt.config.checks import trains_with_muon
from dpt.config.sections import TrainingConfig
from dpt.errors import UserError
from dpt.training.averages import exponent, new_share

DEFAULTS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
"""DiT's recipe (Peebles and Xie 2023, section 4), used where "optimizer.params" is silent."""


class AdamWEMA(torch.optim.AdamW):
    """torch's fused AdamW, with exponential moving averages of the weights as further optimizer states.

    As states `ema0`, `ema1`, ... beside `exp_avg`, the averages are float32 whatever the compute type, and ZeRO shards them
    with the moments. They start as the initial weights: ema <- decay ema + (1 - decay) weights after every update.
    Power-function averages (`dpt.training.averages`) are the states `power0`, `power1`, ...: their first update sets them to
    the weights.

    Args:
        params: Parameters or groups of them.
        options: `lr`, `betas`, `eps`, `weight_decay`.
        ema_decays: One decay per average; averages of decay 0 are the weights themselves and are not stored.
        ema_warmup: Use decay min(d, (1 + n) / (10 + n)) at the n-th update.
        ema_lengths: One relative length per power-function average.
    """

    def __init__(
        self,
        params: Iterable[Any],
        options: Mapping[str, Any],
        *,
        ema_decays: Sequence[float] = (),
        ema_warmup: bool = False,
        ema_lengths: Sequence[float] = (),
    ) -> None:
        super().__init__(params, fused=True, **options)
        self.ema_decays = {f"ema{index}": decay for index, decay in enumerate(ema_decays) if decay > 0}
        self.ema_warmup = ema_warmup
        self.ema_lengths = {f"power{index}": length for index, length in enumerate(ema_lengths)}
        self._exponents = {name: exponent(length) for name, length in self.ema_lengths.items()}
        self.updates = 0
        """Updates made so far, counted by the caller; skipped steps do not count."""

    def state_names(self) -> list[str]:
        """Names of the states that have the parameters' shape."""
        return ["exp_avg", "exp_avg_sq", *self._averages()]

    def names_of(self, param: torch.Tensor) -> list[str]:
        """Names of the states that `param` has."""
        return [*self._moments(param), *self._averages()]

    def _moments(self, param: torch.Tensor) -> list[str]:
        return ["exp_avg", "exp_avg_sq"]

    def _averages(self) -> list[str]:
        return [*self.ema_decays, *self.ema_lengths]

    @torch.no_grad()
    def ensure_state(self, param: torch.Tensor) -> dict[str, Any]:
        """The states of `param`, made on first use: the count of updates, zero moments, averages equal to the weights."""
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(float(self.updates), device=param.device)
            state.update({name: torch.zeros_like(param) for name in self._moments(param)})
            state.update({name: param.detach().clone() for name in self._averages()})
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the current groups' parameters that have gradients. DeepSpeed calls it once per group."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        states = [self.ensure_state(p) for p in params]
        self._update()
        if not params:
            return
        for name, share in self._new_shares().items():
            torch._foreach_lerp_([state[name] for state in states], params, share)

    def _update(self) -> None:
        """Update the current groups' parameters, whose states exist."""
        super().step()

    def _new_shares(self) -> dict[str, float]:
        """The new weights' share in each average."""
        number = self.updates + 1  # not read from a state, which may be on a GPU
        longest = (1 + number) / (10 + number) if self.ema_warmup else 1.0
        shares = {name: 1.0 - min(decay, longest) for name, decay in self.ema_decays.items()}
        return shares | {name: new_share(power, number) for name, power in self._exponents.items()}


def optimizer_options(block: Mapping[str, Any]) -> dict[str, Any]:
    """The options in DeepSpeed's "optimizer" object over the defaults; UserError for unknown options."""
    kind = "Muon" if trains_with_muon(block) else "AdamW"
    defaults = DEFAULTS | ({"momentum": 0.95} if kind == "Muon" else {})
    given = dict(block.get("params", {}))
    for name in ("torch_adam", "adam_w_mode"):  # DeepSpeed's choice of implementation; there is only one here
        given.pop(name, None)
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise UserError(f"optimizer.params.{unknown[0]} is unknown; {kind} takes {', '.join(defaults)}.")
    options = defaults | given
    options["betas"] = tuple(float(beta) for beta in options["betas"])  # torch refuses 0 beside 0.99
    return options


def learning_rate(config: TrainingConfig, base: float, step: int) -> float:
    """Learning rate of `step` (0 is the first): linear warm-up to `base`, then `config.lr_schedule` to `config.lr_final`."""
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    span = max(config.steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    if config.lr_schedule == "exponential":
        return float(base * (config.lr_final / base) ** progress)
    if config.lr_schedule == "cosine":
        return config.lr_final + 0.5 * (base - config.lr_final) * (1 + math.cos(math.pi * progress))
    return base
