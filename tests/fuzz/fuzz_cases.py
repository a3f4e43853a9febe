"""Command lines and recipes that are a little wrong, from a seed."""

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

from fuzz_assets import recipe

_STORE = "--uri sqlite:///mlflow.db"
COMMANDS: list[list[str]] = [
    line.split()
    for line in (
        "dpt presets --ranks 8 --ep 8 --zero 2 --micro-batch 4",
        "dpt cluster a1 --gpus 8 16 --batch 64 --imbalance 1.2",
        f"dpt compare --experiment e {_STORE} --metrics train/loss --out page.html",
        f"dpt laws --experiment e {_STORE} --y eval/depth/abs_rel --out laws.svg",
        f"dpt laws w32 w64 {_STORE} --y train/loss --curve --json",
        f"dpt plan --experiment e {_STORE} --budget 1e12 --task depth --out plan",
        f"dpt report e {_STORE} --out report.html",
        f"dpt study study.yaml --dry-run {_STORE} --mfu 0.5",
        "dpt routing experts_weights --data class_shards more_class_shards --samples 2 --batch-size 2 --out routing",
        f"dpt experts w32 {_STORE} --out experts.svg",
        "dpt export class_weights exported --diffusers",
        "dpt import class_weights imported --vae embedded --objective epsilon --fit aspect",
        "dpt sync runs --uri sqlite:///other.db --again",
        "dpt predict pictures --weights depth_weights --steps 1 --out out --formats npy,colour",
        "dpt predict pictures/one.png --weights flow_weights --second pictures/two.png --steps 1",
        "dpt predict pictures/one.png --weights amodal_weights --mask mask.png --steps 1 --device cpu",
        "dpt sample --weights class_weights --labels 0,3 --steps 1 --per-label 1 --out out",
        "encode --dataset image_folder --root class_pictures --resolution 64 --out new --processes 0",
        "inspect class_shards --samples 2 --rows 1 --picture sheet.png",
        "synthesis --out scenes --scenes 20 --size 32 --workers 1",
        "native nyuv2 --out native --samples 1",
        "evaluate --weights depth_weights --data depth_set --steps 1 --tracking.enabled false",
        "pretrain --ds_config recipe.json --steps 0 --output_dir run",
    )
]
"""As they must work; what is in the assets' folder has its name there."""
_NASTY_WORDS = """
none true gpu cuda:9 .. - -- * %s a=b {000..1}.tar { {} [1 -1 0 1 3.7 1e999 nan 1/0 0,x eval/dept x/y.foo
sqlite:////proc/nowhere/x.db sqlite:///text.txt mysql://u:secret@h/x /proc/nowhere/out text.txt/below
text.txt empty broken.json broken.png recipe.json pictures mask.png mlflow.db study.yaml runs
class_weights depth_weights class_shards flow_shards depth_set
"""
NASTY = ["", " ", "ä ö", "a" * 300, *_NASTY_WORDS.split()]
_VALUES: list[Any] = [None, True, False, 0, 1, -1, 2.5, 1e308, 10**30, float("nan"), float("inf")]
_VALUES += ["", "x", "0", "é", [], [1], ["x"], {}, {"a": 1}]
_LAUNCHERS = {"class": ("pretrain", "upcycle", "evaluate"), "depth": ("finetune", "evaluate", "upcycle")}


def command_lines(seed: int, count: int) -> Iterator[list[str]]:
    """`count` command lines, the program first, each with one to three mutations."""
    for number in range(count):
        chance = random.Random(f"line {seed} {number}")
        line = list(chance.choice(COMMANDS))
        for _ in range(chance.choice((1, 1, 2, 3))):
            line = _mutated_line(chance, line)
        yield line


def _mutated_line(chance: random.Random, line: list[str]) -> list[str]:
    head, rest = (line[:2], line[2:]) if line[0] == "dpt" else (line[:1], line[1:])
    if not rest:
        return [*head, chance.choice(NASTY)]
    at, kind = chance.randrange(len(rest)), chance.randrange(8)
    if kind == 0:
        del rest[at]
    elif kind == 1:
        rest.insert(at, chance.choice(NASTY))
    elif kind == 2:
        rest.insert(at, rest[at])
    elif kind == 3:
        other = chance.choice(COMMANDS)
        rest.insert(at, chance.choice(other[1:]))
    elif kind == 4 and rest[at].startswith("--"):
        rest[at] = rest[at][:-1] if chance.random() < 0.5 else rest[at] + "s"
    else:
        values = [n for n, text in enumerate(rest) if not text.startswith("--")] or [at]
        rest[chance.choice(values)] = chance.choice(NASTY)
    return [*head, *rest]


def recipes(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """`count` launchers, each with the text of a recipe with one to three mutations."""
    for number in range(count):
        chance = random.Random(f"recipe {seed} {number}")
        task = chance.choice(("class", "class", "depth"))
        content = copy.deepcopy(recipe(task))
        for _ in range(chance.choice((1, 1, 2, 3))):
            _mutate_recipe(chance, content)
        training = content["dpt"].setdefault("training", {}) if isinstance(content.get("dpt"), dict) else {}
        steps = training.get("steps", math.inf) if isinstance(training, dict) else 0
        if isinstance(steps, int | float) and steps > 20:
            training["steps"] = 3  # a long run, as by default, is no hang
        text = json.dumps(content)
        if chance.random() < 0.05:
            at = chance.randrange(len(text))
            text = text[:at] if chance.random() < 0.5 else text[:at] + chance.choice('{}[]",:x') + text[at + 1 :]
        yield chance.choice(_LAUNCHERS[task]), text


def _mutate_recipe(chance: random.Random, content: dict[str, Any]) -> None:
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(content)
    node, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0 and isinstance(node, dict):
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[key + "s"] = node.pop(key)
    elif kind == 2 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = chance.choice((-node[key], node[key] * 7, 0, node[key] + 0.5, str(node[key])))
    else:
        node[key] = chance.choice(_VALUES)
