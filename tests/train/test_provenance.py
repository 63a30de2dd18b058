"""A run says what code it was made by, also where there is no git tree."""

from __future__ import annotations

import pytest

from rae_scale.train import provenance


def test_an_image_knows_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "git", lambda *_: None)
    monkeypatch.setenv("RAE_COMMIT", "0123abc")
    found = provenance.code_version()
    assert (found["git_commit"], found["git_modified"]) == ("0123abc", None)
    monkeypatch.setenv("RAE_COMMIT", "")  # built without the argument
    assert provenance.code_version()["git_commit"] is None


def test_a_git_tree_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAE_COMMIT", "0123abc")
    answers = {"rev-parse": "456def", "status": " M file"}
    monkeypatch.setattr(provenance, "git", lambda command, *_: answers[command])
    found = provenance.code_version()
    assert (found["git_commit"], found["git_modified"]) == ("456def", True)
