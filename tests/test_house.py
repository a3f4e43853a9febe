"""The house rules that the imports must keep: they run downward only."""

import subprocess
import sys
from pathlib import Path

import pytest
from changed import ROOT, imports_of

# Room -> rooms it may import. Each may import itself.
BASE = {"errors", "config", "cpu"}
MIDDLE = BASE | {"distributed", "locking", "progress", "tracking", "tasks", "target_codes", "fits", "pictures"}
MIDDLE |= {"clip", "embedded", "hub", "scores", "plugins", "threads", "urls"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "cpu": set(),
    "distributed": BASE,
    "locking": BASE | {"distributed"},
    "progress": {"distributed"},
    "tracking": BASE | {"distributed", "locking"},
    "tasks": BASE,
    "target_codes": BASE | {"tasks"},
    "fits": BASE | {"tasks"},
    "pictures": BASE,
    "hub": BASE | {"distributed"},
    "clip": BASE | {"hub"},
    "embedded": set(),
    "scores": set(),
    "plugins": {"errors"},
    "threads": set(),
    "urls": set(),
    "models": MIDDLE,
    "diffusion": MIDDLE,
    "data": MIDDLE,
    "training": MIDDLE | {"models", "diffusion", "data"},
    "evaluation": MIDDLE | {"models", "diffusion", "data"},
    "scaling": MIDDLE | {"models", "diffusion", "data"},
    "publishing": MIDDLE | {"models", "diffusion", "data", "scaling"},
    "cli": MIDDLE | {"models", "diffusion", "data", "training", "evaluation", "scaling", "publishing", "commands"},
    "commands": MIDDLE | {"models", "diffusion", "data", "training", "evaluation", "scaling", "publishing"},
    "data_tools": MIDDLE | {"data"},
    "__init__": set(),
}
KNOWS_DEEPSPEED = ("dpt/distributed.py", "dpt/models/moe", "dpt/training/")


def modules() -> list[Path]:
    return sorted(p for folder in ("dpt", "data_tools") for p in (ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "dpt" else "data_tools"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    room = room_of(path)
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("dpt.")}
    rooms = {name for name in used if (ROOT / "dpt" / name).is_dir() or (ROOT / "dpt" / f"{name}.py").is_file()}
    assert rooms <= ALLOWED[room] | {room}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_three_rooms_know_deepspeed(path: Path) -> None:
    knows = any(name.split(".")[0] == "deepspeed" for name in imports_of(path))
    assert not knows or str(path.relative_to(ROOT)).startswith(KNOWS_DEEPSPEED)


def test_the_light_rooms_import_no_torch() -> None:
    modules = "dpt, dpt.cli, dpt.config.checks, dpt.config.command, dpt.distributed, dpt.tasks"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'deepspeed'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_loader_stays_small() -> None:
    """All of dpt/data: at most seven files; but the VAE codec and the manifest, at most 900 lines."""
    lines = {path.stem: len(path.read_text().splitlines()) for path in (ROOT / "dpt" / "data").glob("*.py")}
    assert len(lines) <= 7
    assert sum(lines.values()) - lines["codec"] - lines["manifest"] <= 900
