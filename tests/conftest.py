import signal

import pytest

from tests.runs import Launcher

# Files that take minutes come first, so that both processes of `make test` have work to the end.
LONGEST = (
    *(
        "tests/test_main_pretrain.py",
        "tests/test_submitit_launch.py",
        "tests/test_main_finetune.py",
    ),
    *(
        "tests/test_published_commands.py",
        "tests/video/test_mains.py",
        "tests/seg/test_programs.py",
    ),
    *("tests/test_models_convmae.py", "tests/test_main_shards.py", "tests/benchmarks"),
)

# A shell's background jobs ignore Ctrl-C, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    def place(item):
        starts = [item.nodeid.startswith(name) for name in LONGEST]
        return starts.index(True) if any(starts) else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def launcher():
    with Launcher() as started:
        yield started
