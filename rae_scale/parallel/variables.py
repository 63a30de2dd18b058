"""Numbers from environment variables."""

from __future__ import annotations

from collections.abc import Mapping

Environment = Mapping[str, str]


def integer(env: Environment, name: str, default: int | None = None) -> int:
    """The whole number in variable `name`; an empty one counts as not set.

    Raises:
        ValueError: it is none, or not set and there is no default.
    """
    value = env.get(name, "").strip()
    if not value:
        if default is not None:
            return default
        raise ValueError(
            f"{name} is not set, but other variables of its launcher are; start the processes with torchrun, "
            "deepspeed, srun or mpirun, or set it"
        )
    # Not what int() takes besides: a sign, underscores.
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name}={value!r} is not a whole number from 0; correct it, or unset it if it is a leftover")
    return int(value)
