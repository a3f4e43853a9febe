"""Predict and score the samples of one set, a few at a time."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from dpt.config.sections import EvaluationConfig
from dpt.errors import UserError
from dpt.evaluation.ensembling import Prediction, merge_members
from dpt.evaluation.given import read_prediction, save_prediction
from dpt.evaluation.prediction import Predictor
from dpt.evaluation.protocols import score
from dpt.evaluation.records import BASELINE, CEILING, CODE, GIVEN, Record, Setting
from dpt.evaluation.sets import EvaluationSet, Sample
from dpt.tasks import task_spec
from dpt.threads import InOrder, Workers, threads_beside


class Scorer:
    """Scores the samples of one set with `predictor`; without one, the ready-made `config.predictions`.

    folder: where predictions are saved if requested.
    """

    def __init__(self, one: EvaluationSet, config: EvaluationConfig, predictor: Predictor | None, folder: Path) -> None:
        self._set, self._config, self._predictor, self._folder = one, config, predictor, folder

    def settings(self) -> list[Setting]:
        """All settings to score."""
        if self._predictor is None:
            return [BASELINE, *self._code(), GIVEN]
        steps, sizes = sorted(set(self._config.steps)), sorted(set(self._config.ensemble))
        return [BASELINE, CEILING, *self._code(), *(Setting(steps=s, ensemble=n) for s in steps for n in sizes)]

    def _code(self) -> list[Setting]:
        return [CODE] if "code_mask" in self._set.manifest.members else []

    def records(self, indices: Sequence[int], settings: frozenset[Setting]) -> Iterator[list[Record]]:
        """Yield each sample's records under `settings`, in order.

        Enough samples are predicted together to fill batches. While a GPU predicts, threads read the samples that follow and
        score those before, which takes about as long.
        """
        members = max((s.ensemble for s in settings), default=0)
        passes = len(task_spec(self._set.task).targets)
        at_once = samples_at_once(max(1, members * passes), self._config.batch_size)
        threads = threads_beside("cpu" if self._predictor is None else self._predictor.device.type)
        reader = Workers(min(threads, 1), "evaluation reader")
        scorers = InOrder[list[Record]](threads, "evaluation scorer", behind=at_once)
        with closing(reader), closing(scorers):
            coming = [reader.submit(self._set.__getitem__, i) for i in indices[:at_once]]
            for start in range(0, len(indices), at_once):
                samples = [sample.result() for sample in coming]
                coming = [reader.submit(self._set.__getitem__, i) for i in indices[start + at_once : start + 2 * at_once]]
                for sample, values in zip(samples, self._values(samples, settings), strict=True):
                    yield from scorers.submit(self._scored, sample, values)
            yield from scorers.finish()

    def _values(self, samples: Sequence[Sample], settings: frozenset[Setting]) -> list[dict[Setting, np.ndarray | None]]:
        """Each sample's prediction under each setting, None if it has none."""
        values: list[dict[Setting, np.ndarray | None]] = [{} for _ in samples]
        for steps in sorted({s.steps for s in settings if s.kind == "model"}):
            sizes = sorted(s.ensemble for s in settings if s.kind == "model" and s.steps == steps)
            for sample, by_setting, decoded in zip(samples, values, self._members(samples, steps, sizes[-1]), strict=True):
                for n in sizes:
                    merged = merge_members(self._set.task, decoded[:n], sample.size, self._config.aggregation)
                    by_setting[Setting(steps=steps, ensemble=n)] = merged.value
        for sample, by_setting in zip(samples, values, strict=True):
            for setting in settings - by_setting.keys():
                by_setting[setting] = self._value(sample, setting)
        return values

    def prediction(self, sample: Sample, setting: Setting) -> Prediction:
        """The prediction for one sample, made (or read) again."""
        if setting == GIVEN:
            value = read_prediction(Path(self._config.predictions), sample.key, self._set.task, sample.size)
            return Prediction(value=value, uncertainty=np.zeros(sample.size, np.float32))
        values = self._members([sample], setting.steps, setting.ensemble)[0]
        return merge_members(self._set.task, values, sample.size, self._config.aggregation)

    def _members(self, samples: Sequence[Sample], steps: int, count: int) -> list[torch.Tensor]:
        """Decoded members `[N, ...]` of each sample."""
        predictor, task = self._predictor, self._set.task
        assert predictor is not None
        embeddings = [s.embedding for s in samples if s.embedding is not None and predictor.model.clip_embedding_size]
        pictures = predictor.predict_pictures(
            [torch.from_numpy(s.cond_latents) for s in samples],
            [s.key for s in samples],
            range(count),
            task=task,
            steps=steps,
            embeddings=torch.from_numpy(np.stack(embeddings)) if embeddings else None,
        )
        return [predictor.picture_values(members[None], task)[0] for members in pictures]

    def _value(self, sample: Sample, setting: Setting) -> np.ndarray | None:
        """The value of a setting that samples nothing."""
        if setting == BASELINE:
            return self._baseline(sample)
        if setting == CEILING:
            return self._ceiling(sample)
        return sample.code_mask if setting == CODE else self.prediction(sample, setting).value

    def _scored(self, sample: Sample, values: dict[Setting, np.ndarray | None]) -> list[Record]:
        return [self._record(sample, setting, value) for setting, value in sorted(values.items())]

    def _record(self, sample: Sample, setting: Setting, value: np.ndarray | None) -> Record:
        macs = 0.0
        if setting.kind == "model":
            assert self._predictor is not None
            height, width = sample.cond_latents.shape[-2:]
            macs = self._predictor.prediction_macs(
                self._set.task, height, width, steps=setting.steps, ensemble=setting.ensemble
            )
            if self._config.save_predictions:
                assert value is not None
                place = self._folder / "predictions" / f"s{setting.steps}_n{setting.ensemble}"
                save_prediction(place, sample.key, self._set.task, value)
        try:
            metrics = {} if value is None else score(self._set.protocol, value, sample.truth)
        except UserError as error:
            raise UserError(f"{self._set.folder}, sample {sample.key}: {error}") from error
        return Record(index=sample.index, key=sample.key, setting=setting, metrics=metrics, macs=macs)

    def _baseline(self, sample: Sample) -> np.ndarray | None:
        """Baseline to beat: constant depth (aligned like any other), no motion, the visible mask unchanged."""
        if self._set.task in ("depth", "flow"):
            return np.zeros(sample.truth.shape, dtype=np.float32)
        return sample.visible_mask if self._set.task == "amodal" else None

    def _ceiling(self, sample: Sample) -> np.ndarray | None:
        """The encoded truth, decoded again: what survives the task's image code, the resolution and the VAE."""
        if self._predictor is None or sample.target_latents is None:
            return None
        latents = torch.from_numpy(sample.target_latents)[None, None].to(self._predictor.device)
        values = self._predictor.decode(latents, self._set.task, code=self._set.code)
        return merge_members(self._set.task, values[0], sample.size, "median").value


def samples_at_once(predictions: int, batch_size: int) -> int:
    """How many samples, with `predictions` each, fill batches best together: at most four batches."""
    options = range(1, max(1, 4 * batch_size // predictions) + 1)
    return max(options, key=lambda n: (n * predictions / (-(-n * predictions // batch_size) * batch_size), -n))
