"""An empty MLflow store, and runs whose records wait for `sync`."""

import shutil

import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An SQLite file with MLflow's tables, made once and copied."""
    from dpt.tracking.store import connect

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(empty_store, tmp_path):
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def without_process(monkeypatch):
    """Senders are not started (as on a machine that can start none); what they would be started with is kept."""
    commands = []

    def refuse(command, **options):
        if "dpt.tracking.sender" in command:
            commands.append(command)
        raise OSError("no more processes")

    monkeypatch.setattr("dpt.tracking.run.subprocess.Popen", refuse)
    return commands
