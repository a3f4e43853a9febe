"""An empty MLflow store."""

import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An SQLite file with MLflow's tables, made once and copied."""
    from dpt.tracking.store import connect

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path
