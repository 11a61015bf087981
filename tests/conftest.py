"""Fixtures that every part shares. No test touches the network."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # threads that wait for each other turn by turn are slow
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    os.environ.pop("COLUMNS", None)  # a width that nobody asked for

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # run in the background of a script: processes of tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
LONG = ("test_readme.py", "test_recipes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process waits for another at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def kernels_as_they_were() -> Iterator[None]:
    """A test that runs a stage with `kernels=false` turns them off for its process: not for the tests after it."""
    yield
    if "tutelage.models.kernels" in sys.modules:
        sys.modules["tutelage.models.kernels"].use(True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data sets beside the checkout; its tests skip where it is missing."""
    folder = Path(os.environ.get("TUTELAGE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set TUTELAGE_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT
