from __future__ import annotations

import pytest

from tests.infer.trained import Trained, make_trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"))
