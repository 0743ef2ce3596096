"""What several tests with real guests need."""

from __future__ import annotations

import pytest

from examples.emulator.packages import PackageError
from support.x86_guest import Guest, find_guest


@pytest.fixture(scope="session")
def guest() -> Guest:
    try:
        return find_guest()
    except PackageError as error:
        pytest.skip(str(error))
