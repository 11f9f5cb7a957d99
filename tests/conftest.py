import pytest

from tests.runs import Launcher


@pytest.fixture(scope="session")
def launcher():
    with Launcher() as started:
        yield started
