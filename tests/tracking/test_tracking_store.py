"""An SQLite store whose first clients come at the same time."""

import multiprocessing
from pathlib import Path

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
    processes = [context.Process(target=_ask, args=(f"sqlite:///{tmp_path}/mlflow.db", answers)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=120) for _ in processes] == ["", "", ""]
    for process in processes:
        process.join()
