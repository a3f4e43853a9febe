"""Tokens that go around the middle blocks in training (TREAD): what the network computes, and how a batch is split."""

import pytest
import torch
from training_runs import Runs, ToyRun, ep, interrupted, zero
from training_toys import random_network

from dpt.config.checks import check_recipe
from dpt.config.recipe import load_recipe
from dpt.config.sections import ModelConfig
from dpt.errors import UserError
from dpt.models.dit import DiT

MODEL = ModelConfig(input_size=8, hidden_size=32, depth=6, num_heads=2, num_classes=8)


def forward(made: DiT, kept: torch.Tensor | None = None) -> torch.Tensor:
    torch.manual_seed(1)
    return made(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 8]), kept=kept).prediction


def test_keeping_all_tokens_changes_nothing_and_none_of_the_others_is_touched() -> None:
    made = random_network(MODEL)
    everything = forward(made)
    made.set_bypass(range(2, 5))
    torch.testing.assert_close(forward(made), everything)  # nothing is said: all tokens
    torch.testing.assert_close(forward(made, torch.arange(16).expand(2, -1)), everything)
    kept = torch.tensor([[0, 3, 7, 9], [1, 2, 4, 15]])
    seen: list[tuple[int, ...]] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape))) for block in made.blocks]
    forward(made, kept)
    for hook in hooks:
        hook.remove()
    assert [shape[1] for shape in seen] == [16, 16, 4, 4, 4, 16]


def test_bypassing_tokens_pass_as_they_were() -> None:
    """With the last block an identity, the tokens before the final layer are those before the bypassed blocks."""
    made = random_network(MODEL)
    made.set_bypass(range(2, 5))
    kept = torch.tensor([[0, 3, 7, 9], [1, 2, 4, 15]])
    entering, leaving = [], []
    hooks = [
        made.blocks[1].register_forward_hook(lambda _, args, out: entering.append(out[0])),
        made.blocks[5].register_forward_pre_hook(lambda _, args: leaving.append(args[0])),
    ]
    forward(made, kept)
    for hook in hooks:
        hook.remove()
    others = torch.ones(2, 16, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(entering[0][others], leaving[0][others])
    assert not torch.isclose(entering[0][~others], leaving[0][~others]).all(-1).any()


@pytest.fixture(scope="module")
def runs(toy_runs: Runs) -> Runs:
    """The same run on one rank and on two, with and without accumulation, and stopped on the way."""
    whole = {"model.depth": 4, "training.steps": 8}
    fields = whole | {"training.bypass_share": 0.5, "training.bypass_first": 1, "training.bypass_last": 1}
    toy_runs.train(1, ToyRun(name="one", fields=fields | zero(1)), ToyRun(name="whole", fields=whole | zero(1)))
    toy_runs.train(
        2,
        ToyRun(name="two", fields=fields | zero(2) | {"train_micro_batch_size_per_gpu": 2}),
        *interrupted("resumed", fields | zero(1), 6),
        ToyRun(name="experts", fields=fields | ep(1, 2)),
    )
    return toy_runs


def test_splits_and_stops_change_nothing(runs: Runs) -> None:
    for name in ("two", "resumed"):
        runs.check_close(name, "one", rel=2e-4)
    one, whole = runs.records("one"), runs.records("whole")
    assert one[-1]["compute/train_macs"] < whole[-1]["compute/train_macs"]
    assert one[0]["train/loss"] == pytest.approx(whole[0]["train/loss"], rel=1e-4)  # blocks begin as identities
    assert one[-1]["train/loss"] != pytest.approx(whole[-1]["train/loss"], rel=1e-6)
    assert all(loss < 10 for loss in runs.history("experts"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"training.bypass_share": 1.0}, "bypass_share is 1.0; it must be at least 0 and below 1"),
        ({"training.bypass_share": 0.5, "training.bypass_last": 0}, "bypass_last is 0; it must be at least 1"),
        ({"training.bypass_share": 0.5}, "leave none of 2 blocks"),
    ],
)
def test_what_makes_no_sense_is_refused(runs: Runs, fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_recipe(load_recipe(runs.recipe, fields), 1)
