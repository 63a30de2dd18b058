"""What the benchmarks that sweep have in common on the command line: options, files, the comparison with a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rae_scale.bench.harness import Benchmark, Overrides
    from rae_scale.bench.record import Record
    from rae_scale.bench.session import Session
    from rae_scale.bench.setup import StepSetup
    from rae_scale.config import Config


class Alternative(StrEnum):  # typer takes no list of a Literal
    eager = "eager"
    compile = "compile"


Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as engine.precision=fp32.")
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE,VALUE", help="Measure with each value of a setting; repeat for the product of several."
    ),
]
Against = Annotated[
    list[Alternative] | None,
    typer.Option(help="Also the reference operations: call by call, or under torch.compile; repeat for both."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results as JSON, markdown and a picture.")]
Baseline = Annotated[Path | None, typer.Option(help="JSON of an earlier run on this device: say what has changed.")]
Threshold = Annotated[float, typer.Option(min=0.0, help="Changes of the median below this fraction are none.")]
Fail = Annotated[bool, typer.Option("--fail-on-regression", help="Exit status 1 if something is slower or fails.")]
Note = Annotated[str, typer.Option(help="A line for the top of the report: what readers should know.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs; the median and the spread are reported.")]
WarmUp = Annotated[int, typer.Option(min=1, help="Runs before them, which are not timed.")]
Small = Annotated[bool, typer.Option("--small", help="Skip measuring the ceilings properly: only to see it run.")]
Model = Annotated[str, typer.Option(help="A named DiT (`rae-scale model list`).")]
WithLLM = Annotated[bool, typer.Option("--with-llm", help="Train the language model too.")]
LLM = Annotated[str, typer.Option(help="A named language model.")]
TextTokens = Annotated[int, typer.Option(min=2, help="Of each caption, with the language model.")]
THRESHOLD = 0.03


@dataclass
class Reporting:
    """Where a record goes: to the screen, to files as it grows, beside a baseline.

    Raises:
        ValueError: the baseline cannot be read, or --fail-on-regression has nothing to compare with.
    """

    benchmark: Benchmark
    out: Path | None
    baseline: Path | None
    threshold: float
    fail: bool
    note: str = ""

    def __post_init__(self) -> None:
        from rae_scale.bench.record import read_record

        if self.fail and self.baseline is None:
            raise ValueError("--fail-on-regression compares with a baseline: say which with --baseline FILE.json")
        self.earlier = None if self.baseline is None else read_record(self.baseline)

    def after_row(self, record: Record) -> None:
        from rae_scale.bench.baseline import check_comparable
        from rae_scale.bench.record_report import write_files

        record.note = self.note
        if self.earlier is not None:
            check_comparable(record, self.earlier)  # now, and not when everything is measured
        if self.out is not None:
            write_files(self.benchmark, record, self.out)

    def finish(self, record: Record, session: Session) -> None:
        """On the main process only. Ends the program with status 1 if that is asked for and something is slower."""
        from rae_scale.bench.baseline import compare
        from rae_scale.bench.record_report import to_markdown, write_chart

        if not session.is_main:
            return
        print(to_markdown(self.benchmark, record))
        if self.out is not None:
            write_chart(self.benchmark, record, self.out)
            print(f"\nresults: {self.out}")
        if self.earlier is not None:
            comparison = compare(record, self.earlier, self.threshold)
            print(f"\n{comparison}")
            if self.fail and comparison.regressions:
                raise typer.Exit(1)


@contextmanager
def session_for(
    points: Sequence[Overrides], config_of: Callable[[Overrides], Config], device: str
) -> Iterator[Session]:
    """The processes that the points' layouts need."""
    from rae_scale.bench.harness import layouts_of
    from rae_scale.bench.session import open_session

    with open_session(layouts_of(points, config_of), device) as session:
        yield session


def config_of_setup(setup: StepSetup) -> Callable[[Overrides], Config]:
    return lambda point: setup.with_overrides(point).config()
