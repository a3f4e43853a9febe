"""The command `dpt`: loads little to list its commands, refuses in one sentence."""

import importlib
import json
import subprocess
import sys

import pytest

from dpt import cli


def refusal(capsys, *arguments):
    """What `dpt ARGUMENTS` writes to standard error before it ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


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
    module = importlib.import_module(cli.module_name(name))
    assert " ".join(module.__doc__.split())[:30] in " ".join(capsys.readouterr().out.split())


def test_a_misspelt_command_is_one_sentence(capsys):
    assert cli.main(["reprot"]) == 2
    assert capsys.readouterr().err == 'dpt: error: there is no command "reprot"; did you mean "report"?\n'


def test_bad_input_ends_with_code_2_and_no_trace(tmp_path, capsys):
    for arguments in (["report", "e", "--uri", f"sqlite:///{tmp_path}/none.db"], ["sync", tmp_path / "none"]):
        said = refusal(capsys, *arguments)
        assert said.startswith(f"dpt {arguments[0]}: error: ")
        assert said.count("\n") == 1


def test_presets_as_table_and_json(capsys):
    assert cli.main(["presets"]) == 0
    table = capsys.readouterr().out
    assert "14.8 M" in table
    assert cli.main(["presets", "--json", "--ranks", "8", "--ep", "8", "--zero", "2"]) == 0
    rows = {r["preset"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["L/2-8E2A"]["params_total"] == 2_823_764_000
    assert rows["a1"]["forward_macs_256px"] == pytest.approx(2.83e9, rel=0.01)


def export_tiny(folder, task, name="", **fields):
    """A tiny untrained model, exported to the folder `name` (by default that of its task) with all that its use needs."""
    import dataclasses

    import torch

    from dpt.config.sections import DiffusionConfig, ModelConfig
    from dpt.models.dit import DiT
    from dpt.models.exporting import export_weights

    torch.manual_seed(0)
    model = DiT(ModelConfig(hidden_size=32, depth=1, num_heads=2, input_size=8, num_classes=4, **fields))
    sections = {"task": task, "diffusion": dataclasses.asdict(DiffusionConfig()), "vae": {"name": "embedded"}}
    return export_weights(model, folder / (name or task), sections=sections)


def test_sample_import_and_export_round(tmp_path, capsys):
    weights = export_tiny(tmp_path, "class")
    arguments = ["sample", "--weights", str(weights), "--labels", "0,3", "--steps", "2", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0000_000.png", "0003_000.png"]
    assert "know classes 0 to 3" in refusal(capsys, *arguments[:3], "--labels", 9)
    assert cli.main(["export", str(weights), str(tmp_path / "diffusers"), "--diffusers"]) == 0
    arguments = ["import", str(tmp_path / "diffusers"), str(tmp_path / "back"), "--vae", "embedded", "--objective", "epsilon"]
    assert cli.main(arguments) == 0
    from dpt.models.pretrained import read_weights

    first, second = read_weights(weights), read_weights(tmp_path / "back")
    assert second.sections["vae"]["name"] == "embedded"
    assert all((first.state[name] == second.state[name]).all() for name in first.state)
