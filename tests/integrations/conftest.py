"""One thread for the detectors of the frameworks, whose many small ops cost more time to share than to compute."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    pass
