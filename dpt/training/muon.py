"""Muon: orthogonalised momentum for the matrices of the blocks, AdamW for everything else.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled so that updates are as large as AdamW's
(root mean square 0.2 times the rate) by Liu et al., "Muon is Scalable for LLM Training", 2025, section 2.2. Matrices in one
parameter (queries, keys, values; the six parts of adaLN; SwiGLU's gate and input; experts) are orthogonalised separately.

ZeRO 1 and 2 cut a group's parameters into one run of numbers per rank. Most matrices lie within one rank's run, and that rank
orthogonalises them alone; the few that a cut divides are summed over ranks, one at a time, and each rank takes its part.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpt import distributed
from dpt.training.fragments import Fragment
from dpt.training.optimizer import AdamWEMA

ITERATIONS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan et al.: singular values end up in 0.7 to 1.2
_PARTS = (
    (re.compile(r"blocks\.\d+\.attn\.qkv\.weight"), 3),
    (re.compile(r"blocks\.\d+\.adaLN_modulation\.1\.weight"), 6),
    (re.compile(r"blocks\.\d+\.moe\.(shared\.gate_up\.|experts\.gate_up_)weight"), 2),
    (re.compile(r"blocks\.\d+\.(attn\.proj\.|mlp\.fc[12]\.|moe\.shared\.down\.|moe\.experts\.(down|fc1|fc2)_)weight"), 1),
)
"""Parameters that Muon trains, with the number of matrices in each (per expert)."""


def matrices(name: str, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """View the parameter as a stack of matrices: (how many, rows, columns); None if AdamW trains it."""
    for pattern, parts in _PARTS:
        if pattern.fullmatch(name):
            *experts, rows, columns = shape
            return math.prod(experts) * parts, rows // parts, columns
    return None


def orthogonal(stack: Tensor) -> Tensor:
    """Bring the singular values of the matrices [N, R, C] near 1 by Newton and Schulz's iteration; returns float32.

    Computed in bf16 on GPUs, in float32 elsewhere. A zero matrix stays zero.
    """
    x = stack / stack.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)  # so that no singular value is above 1
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return (wide.mT if x.shape[-2] > x.shape[-1] else wide).float().contiguous()


class Run(NamedTuple):
    """Neighbouring matrices of a parameter, as far as they lie in one fragment: elements low : high of the parameter."""

    fragment: Fragment
    matrices: range
    rows: int
    columns: int
    low: int
    high: int

    @property
    def is_whole(self) -> bool:
        """Whether all elements of the matrices are here."""
        return self.high - self.low == len(self.matrices) * self.rows * self.columns

    def of(self, flat: Tensor) -> Tensor:
        """A view of these elements in the tensor that holds the fragment."""
        return flat.view(-1).narrow(0, self.fragment.start + self.low - self.fragment.offset, self.high - self.low)


def runs(fragment: Fragment) -> Iterator[Run]:
    """Split a fragment into runs: its whole matrices together, each matrix divided by a cut separately."""
    stack = matrices(fragment.name, fragment.shape)
    assert stack is not None
    _, rows, columns = stack
    size, begin, end = rows * columns, fragment.offset, fragment.offset + fragment.numel
    first, last = -(-begin // size), end // size  # the whole ones
    cut = {begin // size, (end - 1) // size} - set(range(first, last))
    ranges = [range(number, number + 1) for number in cut] + ([range(first, last)] if first < last else [])
    for numbers in sorted(ranges, key=lambda numbers: numbers.start):
        low, high = max(begin, numbers.start * size), min(end, numbers.stop * size)
        yield Run(fragment, numbers, rows, columns, low, high)


class Muon(AdamWEMA):
    """Muon for the parameters of groups marked "muon", AdamW for the others, averages of all; states as in `AdamWEMA`.

    Parameters that Muon trains have `momentum` instead of the two moments. Call `set_layout` before the first step.
    """

    def __init__(self, params: Any, options: Mapping[str, Any], **averages: Any) -> None:
        options = dict(options)
        self.momentum: float = options.pop("momentum")
        super().__init__(params, options, **averages)
        self._whole: dict[int, list[Run]] = {}
        self._cut: dict[int, dict[tuple[str, int, int, int], Run | None]] = {}

    def state_names(self) -> list[str]:
        return [*super().state_names(), "momentum"]

    def _moments(self, param: Tensor) -> list[str]:
        trained = any(param is p for group in self.param_groups if group["muon"] for p in group["params"])
        return ["momentum"] if trained else super()._moments(param)

    def set_layout(self, fragments: Sequence[Fragment]) -> None:
        """Set the parameters' fragments that this rank's tensors hold. Collective."""
        for group in self.param_groups:
            if group["muon"]:
                tensors = {id(param) for param in group["params"]}
                held = [run for fragment in fragments if id(fragment.flat) in tensors for run in runs(fragment)]
                parts = {
                    (run.fragment.name, run.matrices.start, run.rows, run.columns): run for run in held if not run.is_whole
                }
                everywhere = sorted({part for rank in distributed.gather_objects(list(parts)) for part in rank})
                self._whole[_key(group)] = [run for run in held if run.is_whole]
                self._cut[_key(group)] = {part: parts.get(part) for part in everywhere}

    def _update(self) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super()._update()
        self.param_groups = groups
        for group in groups:
            if group["muon"] and _key(group) in self._whole:  # not yet so in the steps that DeepSpeed rehearses
                self._update_matrices(group)

    def _update_matrices(self, group: dict[str, Any]) -> None:
        """Update a group's matrices. Collective: ranks exchange the matrices that cuts divide."""
        for param in group["params"]:
            if param.grad is not None:
                self.ensure_state(param)["momentum"].lerp_(param.grad, 1 - self.momentum)
                param.mul_(1 - group["lr"] * group["weight_decay"])
        for run in self._whole[_key(group)]:
            update = orthogonal(self._direction(run).view(-1, run.rows, run.columns))
            _apply(run, update.flatten(), group["lr"])
        for (_, number, rows, columns), part in self._cut[_key(group)].items():
            whole = torch.zeros(rows * columns, device=group["params"][0].device)
            first = number * rows * columns
            if part is not None:
                whole[part.low - first : part.high - first] = self._direction(part)
            torch.distributed.all_reduce(whole)  # one rank's numbers, and zeros
            if part is not None:
                update = orthogonal(whole.view(1, rows, columns)).flatten()
                _apply(part, update[part.low - first : part.high - first], group["lr"])

    def _direction(self, run: Run) -> Tensor:
        """Nesterov's direction: the gradient interpolated towards its momentum."""
        flat = run.fragment.flat
        assert flat.grad is not None
        return run.of(flat.grad.contiguous()).float().lerp(run.of(self.state[flat]["momentum"]), self.momentum)


def _apply(run: Run, update: Tensor, lr: float) -> None:
    """Step against `update`, whose elements are about 1 / sqrt of the matrices' longer side, scaled to 0.2."""
    run.of(run.fragment.flat.detach()).add_(update, alpha=-lr * 0.2 * math.sqrt(max(run.rows, run.columns)))


def _key(group: Mapping[str, Any]) -> int:
    """Identify the group as DeepSpeed partitions it, even while it shows the optimizer one group at a time."""
    return id(group["params"][0])
