"""The `rae-scale` command: its sub-commands, and how their errors reach the user."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from rae_scale.cli import (
    bench,
    checkpoint,
    convert,
    data,
    evaluate,
    launch,
    model,
    plan,
    preflight,
    reconstruct,
    report,
    sample,
    train,
    web,
)

TRACEBACK_VARIABLE = "RAE_TRACEBACK"

# rich_markup_mode=None: plain help. The rich one takes longer to import than everything else together.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("train")(train.train)
app.command("launch", context_settings=launch.SETTINGS)(launch.launch)
app.command("plan")(plan.plan)
app.command("preflight")(preflight.preflight)
app.command("report")(report.report)
app.command("sample")(sample.sample)
app.command("reconstruct")(reconstruct.reconstruct)
app.command("web")(web.web)
app.command("convert")(convert.convert)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.add_typer(evaluate.app, name="eval")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(bench.app, name="bench")


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train Scale-RAE text-to-image models, from a laptop to a cluster."""
    # The deepspeed launcher passes --local_rank to whatever it starts; the same number is in LOCAL_RANK, which we read.
    del local_rank
    if traceback:
        os.environ[TRACEBACK_VARIABLE] = "1"


def main() -> None:
    """Run the command; an error that is meant for the user becomes one message and exit status 2."""
    try:
        app(prog_name="rae-scale")
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not is_for_the_user(error):
            raise
        several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
        rank = f" (rank {os.environ['RANK']})" if several else ""
        print(f"rae-scale: error{rank}: {error}", file=sys.stderr)
        sys.exit(2)


def is_for_the_user(error: ValueError | OSError) -> bool:
    """Whether our code raised it, or it names a file. Anything else from inside a library is a defect: a traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    ours = module.split(".")[0] in ("rae_scale", "rae_kernels")
    return ours or (isinstance(error, OSError) and error.filename is not None)
