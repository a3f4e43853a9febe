"""The command `dpt`: starts fast, lists its commands, refuses in one sentence."""

import importlib
import json
import subprocess
import sys
import time

import pytest

from dpt import cli


def dpt(*arguments):
    return subprocess.run([sys.executable, "-m", "dpt.cli", *arguments], capture_output=True, text=True, timeout=120)


def least_seconds(command, times=5):
    durations = []
    for _ in range(times):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        durations.append(time.perf_counter() - begun)
    return min(durations)


def test_help_and_import_are_fast():
    bare = least_seconds([sys.executable, "-c", "pass"])
    assert least_seconds([sys.executable, "-m", "dpt.cli", "--help"]) - bare < 0.5
    assert least_seconds([sys.executable, "-c", "import dpt"]) - bare < 0.3


def test_help_imports_nothing_heavy():
    code = "import sys; from dpt.cli import main; main(['--help']); print(sorted({m.split('.')[0] for m in sys.modules}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in cli.COMMANDS:
        assert name in output
    assert not {"torch", "numpy", "mlflow", "jsonargparse"} & set(output.split("'"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    module = importlib.import_module(f"dpt.commands.{name.replace('-', '_')}")
    assert " ".join(module.__doc__.split())[:30] in " ".join(capsys.readouterr().out.split())


def test_a_misspelt_command_is_one_sentence(capsys):
    assert cli.main(["reprot"]) == 2
    assert capsys.readouterr().err == 'dpt: error: there is no command "reprot"; did you mean "report"?\n'


def test_bad_input_ends_with_code_2_and_no_trace(tmp_path):
    for arguments in (["report", "e", "--uri", f"sqlite:///{tmp_path}/none.db"], ["sync", str(tmp_path / "none")]):
        result = dpt(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith(f"dpt {arguments[0]}: error: ")
        assert result.stderr.count("\n") == 1


def test_presets_as_table_and_json(capsys):
    assert cli.main(["presets"]) == 0
    table = capsys.readouterr().out
    assert "14.8 M" in table
    assert cli.main(["presets", "--json", "--ranks", "8", "--ep", "8", "--zero", "2"]) == 0
    rows = {r["preset"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["L/2-8E2A"]["params_total"] == 2_823_764_000
    assert rows["a1"]["forward_macs_256px"] == pytest.approx(2.83e9, rel=0.01)
