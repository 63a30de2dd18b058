"""Pickles are read, never run."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from rae_scale.convert.unpickle import Global, Inert, inert, read_pickle
from rae_scale.state import CheckpointError

CALLS = {"collections OrderedDict": dict, "torch float32": None, **inert("argparse Namespace")}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values(protocol: int) -> None:
    shared = [1, 2]
    value = {
        "numbers": [0, 1, 255, 65535, -1, 2**31, 2**70, 0.5, True, False, None],
        "texts": ("", "ä", "x" * 300, "y" * 70000),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "nested": {1: [shared, shared], "ordered": OrderedDict(a=1, b=2), "empty": [{}, []]},
    }
    found = read_pickle(pickle.dumps(value, protocol), CALLS, "it")
    assert found == value
    assert found["nested"][1][0] is found["nested"][1][1]
    assert type(found["nested"]["ordered"]) is dict


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_and_bytes(protocol: int) -> None:
    value = {"a": {1, 2}, "b": b"\x00", "c": b"z" * 300}
    assert read_pickle(pickle.dumps(value, protocol), CALLS, "it") == value


@pytest.mark.parametrize("protocol", [2, 4])
def test_classes_that_carry_data_become_inert(protocol: int) -> None:
    data = pickle.dumps({"args": argparse.Namespace(lr=1e-4)}, protocol)
    found = read_pickle(data, CALLS, "it")["args"]
    assert isinstance(found, Inert) and found.name == "argparse Namespace" and found.state == {"lr": 1e-4}


def test_a_name_where_a_value_is_wanted() -> None:
    import torch

    assert read_pickle(pickle.dumps([torch.float32]), CALLS, "it") == [Global("torch float32")]


class Runs:
    """What a pickle of it would do when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.action = function, arguments

    def __reduce__(self) -> Any:
        return self.action


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "touch pwned"), r"(posix|nt)\.system"),
        (Runs(eval, "open('pwned', 'w')"), r"(__builtin__|builtins)\.eval"),
        (Runs(getattr, "x", "upper"), r"(__builtin__|builtins)\.getattr"),
        (PurePosixPath("a"), r"pathlib[._a-z]*\.PurePosixPath"),
        ({"deep": [({"er": Runs(os.getcwd)},)]}, r"posix\.getcwd"),
    ],
)
def test_what_would_run_is_refused_by_its_name(
    value: Any, name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^it: its pickle (names|calls) {name}"):
        read_pickle(pickle.dumps(value, protocol), CALLS, "it")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02c__builtin__\neval\n.", "names __builtin__.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "names os.system"),
        (b"\x80\x04\x8c\x05torch\x8c\x07float32\x93)R.", "calls torch.float32"),
        (b"\x80\x04]\x94)R.", "calls list"),
        (b"\x80\x04}\x94)\x81.", "calls dict"),
        (b"\x80\x04]\x94}b.", "sets attributes of list"),
        (b"\x80\x04\x8c\x05torch\x8c\x07float32\x93}b.", "sets attributes of Global"),
        (b"\x80\x02(ios\nsystem\n.", "has the instruction INST"),
        (b"\x80\x02(cos\nsystem\no.", "names os.system"),
        (b"\x80\x02\x82\x01.", "has the instruction EXT1"),
        (b"\x80\x02K\x01Q.", "has the instruction BINPERSID"),
        (b"\x80\x04K\x01K\x02s.", "is damaged: no valid pickle"),
        (b"\x80\x04}K\x01.", "is damaged: no valid pickle"),
        (b"\x80\x04}", "is damaged: no valid pickle"),
        (b"", "is damaged: no valid pickle"),
        (b"\x80\x04X\xff\xff\xff\x7fab.", "is damaged: no valid pickle"),
        (b"\x80\x02h\x07.", "is damaged: no valid pickle"),
        (b"\x80\x04e.", "is damaged: no valid pickle"),
        (b"\x80\x04}(K\x01u.", "is damaged: no valid pickle"),
        (b"\x80\x04}]K\x01s.", "is damaged: no valid pickle"),
        (b"\x80\x04\x8c\x05torch]\x93.", r"names torch\.\[\]"),
    ],
)
def test_instructions_that_data_needs_not(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^it(: its pickle)? {message}"):
        read_pickle(data, CALLS, "it")


def test_an_id_that_stands_for_something_outside() -> None:
    assert read_pickle(b"\x80\x02K\x05Q.", CALLS, "it", lambda number: number + 1) == 6
