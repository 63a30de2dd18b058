from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rae_scale.data.manifests import expand_inputs
from rae_scale.data.record import Sample, Turn
from rae_scale.data.sources import Source

TURNS = [{"from": "human", "value": "Draw a cat"}, {"from": "gpt", "value": "<image>"}]
PARSED = (Turn("human", "Draw a cat"), Turn("gpt", "<image>"))


def row(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_samples_are_the_json_members_and_name_their_images(tar: Callable[..., Path], tmp_path: Path) -> None:
    tar(
        [
            ("sample_0.json", row(conversations=TURNS, metadata={"prompt": "cat"}, image_filename="flux_9.jpg")),
            ("flux_9.jpg", b"pixels"),
            ("sample_1.json", row(conversations=TURNS, metadata={}, image_filename="sample_1.png")),
            ("sample_1.png", b"more"),
        ],
        "00000.tar",
    )
    (tmp_path / "wds_flux.json").write_text(json.dumps({"dataset_name": "flux", "tars": ["00000.tar"]}))
    (path,) = expand_inputs([tmp_path / "wds_flux.json"])
    assert [item.sample for item in Source(path, "scale-rae")] == [
        Sample("sample_0", b"pixels", (), PARSED, {"prompt": "cat"}),
        Sample("sample_1", b"more", (), PARSED),
    ]


def test_what_is_not_of_this_layout_is_reported(tar: Callable[..., Path]) -> None:
    path = tar(
        [
            *[("0.jpg", b"x"), ("0.txt", b"a caption")],
            *[("1.json", row(caption="a cat")), ("1.jpg", b"x")],
            *[("2.json", row(conversations=TURNS, image_filename="gone.jpg"))],
            *[("3.json", row(conversations=TURNS, image_filename="../3.jpg"))],
            *[("stray.jpg", b"x")],
        ]
    )
    reasons = [item.problem and item.problem.reason for item in Source(path, "scale-rae")]
    assert reasons == ["bad conversation", "bad conversation", "no image", "no image", "bad conversation"]
