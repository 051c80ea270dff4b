# SPDX-License-Identifier: Apache-2.0
"""What several files of the core's tests need around their tests."""

import pytest

from magi_attention.api import clear_cache
from tests.core.api_single import documents_key


@pytest.fixture
def empty_cache():
    """No keys but those of the test itself."""
    clear_cache()
    yield
    clear_cache()


@pytest.fixture(scope="module")
def key():
    """A key of two documents, one for all tests of a file."""
    yield documents_key()
    clear_cache()
