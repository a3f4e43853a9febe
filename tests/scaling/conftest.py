"""A study's file, to be written with changes, and the studies that are shipped."""

import contextlib
import functools
from pathlib import Path

import pytest

from dpt.scaling.study import read_study

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
title: Size and length
output: {output}
experiment: e
axes:
  size:
    w64: {{model.hidden_size: 64, model.num_heads: 4}}
    w96: {{model.hidden_size: 96}}
  length:
    stages: [depth]
    values:
      short: {{training.steps: 5}}
      long: {{training.steps: 50}}
stages:
  pretrain:
    launcher: pretrain
    recipe: {recipe}
    axes: [size]
    fields: {{training.steps: 7, train_batch_size: 2, model.depth: 1, model.patch_size: 2, data.shards: [{shards}]}}
  depth: {{launcher: finetune, recipe: {recipe}, axes: [size, length], weights: pretrain, fields: {{data.shards: [{shards}]}}}}
  evaluate:
    launcher: evaluate
    recipe: {recipe}
    axes: [size, length]
    weights: depth
    fields: {{evaluation.steps: [1, 2]}}
figures:
  - {{name: f, x: macs, y: eval/depth/abs_rel}}
"""


@pytest.fixture
def write_study(tmp_path):
    def write(old="", new="", uri="sqlite:///x.db"):
        text = STUDY.format(output=tmp_path / "out", shards=tmp_path, recipe=ROOT / "ds_configs" / "dense_a1.json")
        assert old in text
        path = tmp_path / "study.yaml"
        path.write_text(text.replace(old, new))
        return read_study(path, uri=uri)

    return write


@functools.cache
def _shipped(name):
    with contextlib.chdir(ROOT):
        return read_study(Path("studies", name), uri="sqlite:///x.db")


@pytest.fixture
def shipped():
    """The study in a file of studies/, read once for all tests."""
    return _shipped
