"""The toy runs of a test module."""

import pytest
from training_runs import Runs


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    """None yet; without the slow ones, if no slow test of the module is asked for."""
    tests = (test for test in request.session.items if test.path == request.path)
    slow = any(test.get_closest_marker("slow") for test in tests)
    return Runs(tmp_path_factory.mktemp("runs"), slow=slow)
