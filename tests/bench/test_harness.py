"""Sweeps, rows that fail, what a record says, and the files that it becomes. Nothing here is measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rae_scale.bench import machine
from rae_scale.bench.chart import bars
from rae_scale.bench.harness import (
    Base,
    Benchmark,
    Case,
    Measured,
    check_relevant,
    layouts_of,
    run_benchmark,
    sweep_points,
)
from rae_scale.bench.record import Measure, Record, Row, config_sections, facts_of, flop_count, read_record
from rae_scale.bench.record_report import to_markdown, write_chart, write_files
from rae_scale.bench.session import Session, open_session
from rae_scale.config import parse_config
from rae_scale.config.schema import ParallelConfig

CPU = torch.device("cpu")
ALONE = Session(CPU, 1)
COLUMNS = {"setting": "{name}", "ms": "{work_ms:.1f}", "peak GB": "{peak_gb:.1f}", "rate": "{rate:.1f}"}
WORK = Benchmark("work", "Work", COLUMNS, bars("work"))


def measured() -> Measured:
    return Measured({"work": Measure.of([0.001, 0.002, 0.003])}, {"rate": 5.0})


def failing(error: Exception) -> Any:
    def run() -> Measured:
        raise error

    return run


def run(runs: list[Any], **options: Any) -> Record:
    """A sweep with a point for each of `runs`; an exception is raised where cases are made."""

    def cases_of(point: tuple[str, ...]) -> list[Case]:
        number = int(point[0].partition("=")[2])
        if isinstance(runs[number], Exception):
            raise runs[number]
        return [Case({"number": number}, {}, runs[number])]

    points = sweep_points([f"data.num_workers={','.join(str(number) for number in range(len(runs)))}"])
    return run_benchmark(WORK, points, cases_of, ALONE, **options)


def test_a_sweep_is_the_product_with_the_last_key_fastest() -> None:
    assert sweep_points([]) == [()]
    assert sweep_points(["a.b=1,2", "c=x,y"]) == [
        ("a.b=1", "c=x"),
        ("a.b=1", "c=y"),
        ("a.b=2", "c=x"),
        ("a.b=2", "c=y"),
    ]
    assert sweep_points(["engine.saved_ops={linear: 3, attention: -1},{linear: 1}"]) == [
        ("engine.saved_ops={linear: 3, attention: -1}",),
        ("engine.saved_ops={linear: 1}",),
    ]


@pytest.mark.parametrize("text", ["a.b", "=1", "a=1,,2", "a="])
def test_a_sweep_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it as KEY=VALUE,VALUE"):
        sweep_points([text])


def test_a_key_is_swept_once() -> None:
    with pytest.raises(ValueError, match=r"--sweep a=... is given 2 times"):
        sweep_points(["a=1", "a=2"])


def test_points_that_cannot_be_or_run_out_of_memory_are_rows_and_the_others_go_on() -> None:
    record = run(
        [
            measured,
            ValueError("a setting that cannot be"),
            failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
            failing(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
            failing(FloatingPointError("the gradient is not finite")),
            measured,
        ]
    )
    assert [row.failed for row in record.rows] == [
        None,
        "a setting that cannot be",
        "out of memory",
        "out of memory",
        "the gradient is not finite",
        None,
    ]
    assert [row.varied for row in record.rows] == [{"data.num_workers": number} for number in range(6)]
    assert [bool(row.measures) for row in record.rows] == [True, False, False, False, False, True]


def test_the_only_point_and_a_defect_are_errors() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        run([ValueError("cannot be")])
    with pytest.raises(RuntimeError, match="a defect"):
        run([measured, failing(RuntimeError("a defect"))])


def test_two_points_of_the_same_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="its settings are those of a row before it"):
        run_benchmark(WORK, [(), ()], lambda point: [Case({}, {}, measured)], ALONE)


def test_settings_that_are_not_heeded_are_refused() -> None:
    check_relevant("step", ["engine.precision=fp32", "data.global_batch_size=4"], ["engine", "data.global_batch_size"])
    for override in ("data.num_workers=2", "engines.x=1", "data=1"):
        with pytest.raises(ValueError, match="changes nothing that `bench step` measures, which depends on engine,"):
            check_relevant("step", [override], ["engine", "data.global_batch_size"])


def test_a_record_says_where_what_and_how(tmp_path: Path) -> None:
    seen: list[int] = []
    record = run([measured, measured], facts={"ceiling": 1.0}, after_row=lambda record: seen.append(len(record.rows)))
    assert seen == [1, 2]
    data = json.loads(json.dumps(record.to_json()))
    assert {"schema", "benchmark", "command", "date", "note", "environment", "facts", "rows"} == set(data)
    machine_and_software = {
        *("device", "device_count", "power_limit_w", "driver", "cuda", "nccl", "cudnn", "cpus", "threads"),
        *("torch", "triton", "deepspeed", "transformers", "commit", "kernels"),
    }
    assert machine_and_software <= set(data["environment"])
    assert data["environment"]["power_limit_w"] is None and data["rows"][0]["values"]["power_draw_w"] is None
    assert data["environment"]["threads"] == torch.get_num_threads()
    first = data["rows"][0]
    assert set(first) == {"settings_hash", "varied", "settings", "facts", "measures", "values", "failed"}
    work = first["measures"]["work"]
    assert [work[name] for name in ("median", "low", "high")] == pytest.approx([0.002, 0.0012, 0.0028])
    assert (work["repeats"], work["unit"]) == (3, "s")
    record.note = "on a busy machine"
    write_files(WORK, record, tmp_path)
    assert "**on a busy machine**" in (tmp_path / "work.md").read_text()
    assert read_record(tmp_path / "work.json") == record


def test_facts_name_precision_layout_and_formula() -> None:
    config = parse_config({"parallel": {"dp_shard": 2, "tp": 2}, "engine": {"name": "fsdp2", "precision": "fp32"}})
    flops = flop_count("models.flops: dit_cost", 1e9, encoder_counted=False)
    assert facts_of(config, precision=config.engine.precision, kernels="ours", flops=flops) == {
        "precision": "fp32",
        "kernels": "ours",
        "world_size": 4,
        "layout": {"dp_replicate": 1, "dp_shard": 2, "sp": 1, "tp": 2},
        "flops": {"formula": "models.flops: dit_cost", "per_image": 1e9, "encoder_counted": False},
    }


def test_the_hash_is_of_the_settings_alone_and_of_all_of_them() -> None:
    config = parse_config({})
    other = parse_config({"engine": {"activation_checkpointing": "full"}})
    settings = config_sections(config, ["engine", "data.global_batch_size"])
    assert set(settings) == {"engine", "data.global_batch_size"}
    here = Row({"a": 1}, settings).settings_hash
    assert here == Row({"b": 2}, dict(reversed(settings.items())), failed="x").settings_hash
    assert here != Row({"a": 1}, config_sections(other, ["engine", "data.global_batch_size"])).settings_hash


def test_the_report_shows_what_there_is(tmp_path: Path) -> None:
    record = run([measured, ValueError("two\nlines | and a bar")])
    text = to_markdown(WORK, record)
    assert "| num_workers 0 | 2.0 | 5.0 |  |" in text and "two lines | and a bar |" in text
    assert "peak GB" not in text and text.count("power: not read (no GPU)") == 1
    assert "failed" not in to_markdown(WORK, run([measured]))
    write_chart(WORK, record, tmp_path)
    assert (tmp_path / "work.png").read_bytes().startswith(b"\x89PNG")
    assert "![Work](work.png)" in (tmp_path / "work.md").read_text()
    write_chart(WORK, run([ValueError("x"), ValueError("y")]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_layouts_are_those_of_the_points_that_are_a_configuration() -> None:
    base = Base({"engine": {"name": "fsdp2"}, "data": {"global_batch_size": 2}}, (), "test")
    points = sweep_points(["parallel.dp_shard=1,2,3"])
    assert [layout.dp_shard for layout in layouts_of(points, base.config)] == [1, 2]


def test_processes_and_layout_have_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"the layout of 2 process\(es\), but 1 measure; start 2"):
        ALONE.mesh(ParallelConfig(dp_shard=2))
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=r"2 processes were started .*engine.name=fsdp2 parallel.dp_shard=2"),
        open_session([ParallelConfig()], "cpu"),
    ):
        pass


def test_power_is_read_for_this_process_s_gpu_and_absent_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def smi(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout="312.55\n" if "power.draw" in command[2] else "700.00, [N/A]\n")

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(subprocess, "run", smi)
    assert machine.power_draw(gpu) == 312.55 and "--id=GPU-12-34" in asked[0]
    assert machine.nvidia_smi(gpu, "power.limit", "driver_version") == ["700.00", None]
    assert machine.power_draw(CPU) is None

    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert machine.power_draw(gpu) is None
