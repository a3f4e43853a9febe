"""Clients of stores: the first ones of an SQLite file at the same time, and of a database without its driver."""

import multiprocessing
import sys
from pathlib import Path

import pytest

from dpt.errors import UserError
from dpt.tracking import store


def _ask(uri: str, answers: "multiprocessing.Queue[str]") -> None:
    try:
        store.connect(uri).search_experiments(max_results=1)
        answers.put("")
    except Exception as error:
        answers.put(str(error))


def test_clients_that_come_together_make_the_tables_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_ask, args=(f"sqlite:///{tmp_path}/mlflow.db", answers)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=120) for _ in processes] == ["", ""]
    for process in processes:
        process.join()


def test_a_database_without_its_driver_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    with pytest.raises(UserError, match="driver MySQLdb is not installed") as caught:
        store.connect("mysql://user:secret@nowhere/runs")
    assert "secret" not in str(caught.value)
