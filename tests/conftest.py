"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_times_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forms of weights are chosen by times that may have been measured here: every machine has the package's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SQCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
