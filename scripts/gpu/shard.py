"""A pytest plugin: ``--shard 2/8`` runs every eighth of the selected tests, from the second on."""

import pytest


def share(text: str) -> tuple[int, int]:
    """Index from 0 and count of ``"2/8"``."""
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError(f"--shard {text}: the first number must be between 1 and the second")
    return number - 1, count


def pytest_addoption(parser):
    parser.addoption("--shard", type=share, default=(0, 1), metavar="N/COUNT", help="which share of the tests to run")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """After the selection by mark and name."""
    index, count = config.getoption("--shard")
    dropped = [item for place, item in enumerate(items) if place % count != index]
    items[:] = items[index::count]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
