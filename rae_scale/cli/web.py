"""`rae-scale web`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rae_scale.cli.options import DecoderFolder, Device, Weights


def web(
    model: Annotated[
        str, typer.Argument(help="Shared folder, export, checkpoint, run folder, or owner/name on the hub.")
    ],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Also a public link through gradio's servers.")] = False,
    weights: Weights = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Default: float32 weights, computing as trained.")
    ] = None,
    decoder: DecoderFolder = None,
    device: Device = "auto",
) -> None:
    """Try a model in the browser: prompt, seed, steps, guidance, number of images. Needs `pip install '.[web]'`."""
    from rae_scale.infer.hub import RaeScale
    from rae_scale.infer.web import build_page, load_gradio

    load_gradio()  # before the model: loading a large one takes minutes
    loaded = RaeScale.from_pretrained(model, weights=weights, dtype=dtype, decoder=decoder, device=device)
    build_page(loaded, f"rae-scale: {model}").launch(server_name=host, server_port=port, share=share)
