"""The page: what its button does, and what happens without gradio."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rae_scale import RaeScale
from rae_scale.cli.web import web
from rae_scale.infer.web import build_page, drawing
from tests.infer.trained import STEPS, Trained


@pytest.fixture(scope="module")
def model(trained: Trained) -> RaeScale:
    return RaeScale.from_pretrained(trained.run, device="cpu")


def test_the_button_draws_what_the_model_draws(model: RaeScale) -> None:
    drawn = drawing(model)("a red picture", 3.0, 2.0, 1.5, 2.0)
    images = model.generate(["a red picture"], seed=3, steps=2, guidance=1.5, num_images_per_prompt=2)
    assert isinstance(images, list)
    assert [caption for _, caption in drawn] == ["seed 3", "seed 4"]
    assert all(np.array_equal(ours, theirs) for (ours, _), theirs in zip(drawn, images, strict=True))


@pytest.mark.parametrize(("prompt", "message"), [("  ", "the prompt is empty"), ("word " * 200, "max_seq_len=128")])
def test_what_cannot_be_drawn_is_said(model: RaeScale, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawing(model)(prompt, 0, 2, 1.0, 1)


def test_without_gradio_the_fix_is_named_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"needs the gradio package .*pip install '\.\[web\]'"):
        web("no/such-model")


def test_nothing_but_the_page_needs_gradio() -> None:
    code = "import sys; sys.modules['gradio'] = None; import rae_scale.cli.main"
    subprocess.run([sys.executable, "-c", code], check=True)


class Recorder(ModuleType):
    """A gradio that remembers which parts a page was made of."""

    def __init__(self) -> None:
        super().__init__("gradio")
        self.parts: dict[str, dict[str, Any]] = {}
        self.answer: Any = None

    class Error(Exception): ...

    def on(self, events: list[Any], function: Any, inputs: list[str], output: str, **options: Any) -> None:
        self.answer, self.inputs, self.output, self.options = function, inputs, output, options

    def __getattr__(self, kind: str) -> Any:
        return lambda *args, **settings: Part(self, settings)


class Part(SimpleNamespace):
    def __init__(self, page: Recorder, settings: dict[str, Any]) -> None:
        super().__init__(click=None, submit=None, label=settings.get("label"))
        if self.label is not None:
            page.parts[self.label] = settings

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *error: Any) -> None: ...


def test_the_page_asks_for_what_the_button_needs(model: RaeScale, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = Recorder()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    build_page(model, "tiny")
    assert [part.label for part in gradio.inputs] == ["Prompt", "Seed", "Steps", "Guidance", "Number of images"]
    # It begins with the settings that the model was trained with.
    assert (gradio.parts["Steps"]["value"], gradio.parts["Guidance"]["value"]) == (STEPS, 2.0)
    assert gradio.options["concurrency_limit"] == 1
    # A lossy picture is another picture: gradio's default is webp.
    assert gradio.parts["Images"]["format"] == "png"
    assert len(gradio.answer("a red picture", 0, 1, 1.0, 1)) == 1
    with pytest.raises(gradio.Error, match="the prompt is empty"):
        gradio.answer("", 0, 1, 1.0, 1)
