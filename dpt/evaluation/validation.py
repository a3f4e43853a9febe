"""Score evaluation sets during training; launchers pass this to the training loop, which knows nothing of evaluation."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dpt import distributed, target_codes, tasks
from dpt.config.recipe import DptConfig
from dpt.config.sections import EvaluationConfig
from dpt.data.codec import load_vae
from dpt.errors import UserError
from dpt.evaluation.loading import LoadedModel
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.protocols import average, is_better, score
from dpt.evaluation.records import Record, Setting
from dpt.evaluation.scoring import Scorer
from dpt.evaluation.sets import check_set, open_sets


class Validator:
    """Scores a network under `config.validation`, on all ranks together; the figures do not depend on their number.

    `codes` and `depth_prompt`: the codes of the training targets, and the content of depth's second condition
    (`dpt.training.data_loader`). UserError if the sets cannot be scored with such a network or lack the metric.
    """

    def __init__(self, config: DptConfig, *, codes: Mapping[str, str], depth_prompt: str) -> None:
        given = config.validation
        self._frame = LoadedModel(
            network=nn.Identity(),
            model=dataclasses.replace(config.model, capacity_factor=0.0),  # as in `averaged_network`
            diffusion=config.diffusion,
            task=config.task,
            codec=load_vae(config.data.vae, latent_channels=config.model.in_channels),
            codes={**target_codes.codes_of({}, ""), **codes},
            depth_prompt=depth_prompt or tasks.DEPTH_PROMPT,
        )
        self._config = _sampling(config)
        self._sets = open_sets(
            given.data or config.evaluation.data,
            protocol=self._config.protocol,
            max_samples=given.max_samples,
            cache_dir=config.data.cache_dir,
        )
        predictor = self._predictor(nn.Identity())
        for one in self._sets:
            check_set(one, predictor)
        first = self._sets[0]
        self.metric = given.metric or f"{first.task}/{first.protocol.main_metric}"
        """Metric that selects the best weights, named as in the results of calls."""
        wanted = self.metric.rpartition("/")[0]
        if wanted not in self._places() and wanted:
            raise UserError(
                f'dpt.validation.metric "{self.metric}": there is no "{wanted}"; it may begin with {", ".join(self._places())}.'
            )
        truths = [(one.protocol, np.nan_to_num(one[0].truth, posinf=0.0)) for one in self._sets]
        metrics = [average([score(protocol, truth, truth)]) for protocol, truth in truths]
        if all(metrics) and not self.metric.endswith("_log_fit"):  # the first truth may lack pixels that count there, or any
            self._check_metric(self._named(metrics))

    def __call__(self, network: nn.Module, alive: Callable[[], None]) -> dict[str, float]:
        """Return TASK/SET/METRIC for every set and TASK/METRIC for each task's first. `alive` is called after each sample."""
        predictor = self._predictor(network)
        setting = Setting(steps=self._config.steps[0], ensemble=self._config.ensemble[0])
        figures: list[dict[str, float]] = []
        for one in self._sets:
            scorer = Scorer(one, self._config, predictor, Path())
            mine: list[Record] = []
            for records in scorer.records(
                range(len(one))[distributed.rank() :: distributed.world_size()], frozenset({setting})
            ):
                mine += records
                alive()
            rows = sorted((r for part in distributed.gather_objects(mine) for r in part), key=lambda r: r.index)
            figures.append(average([r.metrics for r in rows]))
        found = self._named(figures)
        self._check_metric(found)
        return found

    def _named(self, figures: list[dict[str, float]]) -> dict[str, float]:
        """Each set's figures under the names that calls return."""
        found: dict[str, float] = {}
        for one, values in zip(self._sets, figures, strict=True):
            found |= {f"{one.task}/{one.name}/{name}": value for name, value in values.items()}
            found |= {f"{one.task}/{n}": v for n, v in values.items() if f"{one.task}/{n}" not in found}
        return found

    def _check_metric(self, found: Mapping[str, float]) -> None:
        if self.metric not in found:
            raise UserError(f'dpt.validation.metric "{self.metric}" is not among {", ".join(found)}.')

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value of `metric` is better than another."""
        return is_better(self.metric.rpartition("/")[2], value, other)

    def _places(self) -> list[str]:
        return list(dict.fromkeys(place for one in self._sets for place in (one.task, f"{one.task}/{one.name}")))

    def _predictor(self, network: nn.Module) -> Predictor:
        return Predictor(dataclasses.replace(self._frame, network=network), config=self._config)


def _sampling(config: DptConfig) -> EvaluationConfig:
    """Sampling settings of validation: evaluation's, at one setting, in the precision of the given network."""
    changes: dict[str, Any] = {"steps": [config.validation.steps], "ensemble": [config.validation.ensemble]}
    changes |= {"precision": "bf16" if distributed.device().type == "cuda" else "fp32", "save_predictions": False}
    return dataclasses.replace(config.evaluation, **changes).settled(config.diffusion)
