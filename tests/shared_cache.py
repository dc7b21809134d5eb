"""The built-in sets, written once for all tests of a session; rendering them takes longer than most tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """Parallel workers have folders inside the session's; what one has written first, all read."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if own.name.startswith("popen-") else own) / "shared-cache"
