from __future__ import annotations

import os

import pytest

from tests.infer.trained import Trained, make_trained

# The user's plans are not ours to read or write.
os.environ["RAE_PLAN_CACHE"] = ""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run, its decoder and their data, for whatever uses a trained model."""
    return make_trained(tmp_path_factory.mktemp("trained"))
