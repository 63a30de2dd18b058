"""A page to try a model in the browser. Needs gradio, the extra `web`; what the page does is a function without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from PIL import Image

from rae_scale.infer.hub import RaeScale

if TYPE_CHECKING:
    import gradio

MAX_IMAGES = 16
MAX_STEPS = 250
MAX_GUIDANCE = 10.0
LARGEST_SEED = 2**31 - 1

Draw = Callable[[str, float, float, float, float], list[tuple[Image.Image, str]]]


def drawing(model: RaeScale) -> Draw:
    """What the page's button does: prompt, seed, steps, guidance, number of images -> pictures with their captions.

    The browser sends numbers as floats. ValueError, with what to do about it, for anything that cannot be drawn.
    """

    def draw(
        prompt: str, seed: float, steps: float, guidance: float, num_images: float
    ) -> list[tuple[Image.Image, str]]:
        if not prompt.strip():
            raise ValueError("the prompt is empty; write what to draw")
        images = model.generate(
            [prompt],
            seed=int(seed),
            num_images_per_prompt=int(num_images),
            steps=int(steps),
            guidance=guidance,
        )
        assert isinstance(images, list), "a list of prompts gives a list of images"
        return [(image, f"seed {int(seed) + number}") for number, image in enumerate(images)]

    return draw


def build_page(model: RaeScale, title: str) -> gradio.Blocks:
    """The page; `.launch()` serves it. ValueError if gradio is not installed."""
    gr = load_gradio()
    draw = drawing(model)
    sampler = model.pipeline.config.sampler

    @wraps(draw)  # gradio names its inputs after the arguments
    def answer(*inputs: Any) -> list[tuple[Image.Image, str]]:
        try:
            return draw(*inputs)
        except ValueError as error:
            # Shown on the page, where any other exception reads "Error" alone.
            raise gr.Error(str(error)) from None

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"## {title}")
        prompt = gr.Textbox(label="Prompt", placeholder="a red circle above a blue square")
        with gr.Row():
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=LARGEST_SEED)
            images = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Number of images")
            steps = gr.Slider(1, MAX_STEPS, value=min(sampler.steps, MAX_STEPS), step=1, label="Steps")
            guidance = gr.Slider(
                0.0, MAX_GUIDANCE, value=min(sampler.guidance, MAX_GUIDANCE), step=0.1, label="Guidance"
            )
        button = gr.Button("Draw", variant="primary")
        # PNG, since the default is lossy: the same seed is to give the same picture here as elsewhere.
        gallery = gr.Gallery(label="Images", object_fit="contain", format="png")
        inputs = [prompt, seed, steps, guidance, images]
        # One at a time: two drawings at once would share the device's memory.
        gr.on([button.click, prompt.submit], answer, inputs, gallery, concurrency_limit=1, api_name="draw")
    return page


def load_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            f"the page needs the gradio package ({error}); install it with `pip install '.[web]'`"
        ) from error
    return gradio
