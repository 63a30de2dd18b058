"""Weights from a folder or the Hugging Face hub, refused when they would leave part of the model random."""

from __future__ import annotations

from typing import Any


def from_pretrained(model_class: Any, path: str, setting: str, **kwargs: Any) -> Any:
    """Return `model_class.from_pretrained(path, **kwargs)` with every parameter read from the files.

    The library only warns when a file lacks some of the model's weights and goes on with random ones.

    Raises:
        ValueError: `path` cannot be read, or lacks weights of the model. Names `setting`.
    """
    try:
        model, report = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except (OSError, ValueError) as error:  # a path that is no valid hub id either is a ValueError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{setting}={path!r}: no weights could be read ({reason}); give a folder that holds config.json and "
            "model.safetensors, or a hub id"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{setting}={path!r}: these files lack {len(missing)} tensors of {model_class.__name__}, such as "
            f"{missing[0]}; give the weights of that kind of model"
        )
    return model
