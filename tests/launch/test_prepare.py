"""Each way to start a run, and options that do not go together."""

from __future__ import annotations

import itertools
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rae_scale.launch.command import Launch, StopBy
from rae_scale.launch.deepspeed import for_pdsh, in_double_quotes
from rae_scale.launch.prepare import Launcher, Prepared, Request, preflight_of, prepare
from tests.launch.conftest import Write

SHELL = {"PATH": "/usr/bin", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/work", "HF_TOKEN": "canary", "OMP_NUM_THREADS": "3"}


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("gpu-1 slots=4\ngpu-2 slots=4\n")
    return path


def prepared(launcher: Launcher, run_file: Path, environ: dict[str, str] = SHELL, **options: Any) -> Prepared:
    return prepare(Request(launcher, ("train", str(run_file)), **options), environ)


def launch(launcher: Launcher, run_file: Path, environ: dict[str, str] = SHELL, **options: Any) -> Launch:
    what = prepared(launcher, run_file, environ, **options).what
    assert isinstance(what, Launch)
    return what


def options_of(line: str) -> dict[str, str]:
    """Of a command line: what follows each --option."""
    words = shlex.split(line)
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("-")}


def test_torchrun_on_one_machine(run_file: Write) -> None:
    what = launch("torchrun", run_file(dp_shard=2), processes=2)
    (each,) = what.commands
    told = options_of(each.command.line())
    assert (told["--nnodes"], told["--nproc-per-node"], told["--master-addr"]) == ("1", "2", "127.0.0.1")
    # Else torchrun dies of the batch system's signal and leaves its processes.
    assert "SIGUSR1" in told["--signals-to-handle"].split(",")
    assert each.command.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "1890"
    assert each.command.environment["OMP_NUM_THREADS"] == "3"
    assert what.here == (0,)


def test_two_runs_on_one_machine_do_not_meet(run_file: Write) -> None:
    assert prepared("torchrun", run_file()).port != prepared("torchrun", run_file()).port


def test_processes_without_gpus_are_what_the_config_asks_for(run_file: Write) -> None:
    what = launch("torchrun", run_file(dp_shard=4))
    assert options_of(what.commands[0].command.line())["--nproc-per-node"] == "4"


def test_torchrun_on_two_machines(run_file: Write) -> None:
    what = launch("torchrun", run_file(dp_shard=8), nodes=2, processes=4, node_rank=1, master_addr="10.0.0.1")
    told = [options_of(each.command.line()) for each in what.commands]
    assert [(each["--node-rank"], each["--master-addr"], each["--master-port"]) for each in told] == [
        ("0", "10.0.0.1", "29500"),
        ("1", "10.0.0.1", "29500"),
    ]
    assert what.here == (1,)


def test_c10d_says_who_opens_the_store(run_file: Write) -> None:
    shape = {"nodes": 2, "processes": 1, "master_addr": "a", "rendezvous": "c10d"}
    told = [options_of(each.command.line()) for each in launch("torchrun", run_file(dp_shard=2), **shape).commands]
    assert [each["--rdzv-conf"] for each in told] == ["is_host=1", "is_host=0"]
    assert {each["--rdzv-endpoint"] for each in told} == {"a:29500"}


def test_deepspeed_on_one_machine(run_file: Write) -> None:
    (each,) = launch("deepspeed", run_file(dp_shard=2), processes=2).commands
    told = options_of(each.command.line())
    assert (told["--hostfile"], told["--num_gpus"]) == ("/dev/null", "2")
    assert each.command.environment["DS_ACCELERATOR"] == "cpu"


def test_deepspeed_keeps_to_the_gpus_of_this_shell(run_file: Write, tmp_path: Path) -> None:
    environ = SHELL | {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    text = run_file(dp_shard=2).read_text().replace("device: cpu", "device: cuda")
    (tmp_path / "gpu.yaml").write_text(text)
    (each,) = launch("deepspeed", tmp_path / "gpu.yaml", environ, processes=2).commands
    assert each.command.environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert "--num_gpus" not in each.command.argv
    assert "DS_ACCELERATOR" not in each.command.environment


def test_deepspeed_without_ssh(run_file: Write, hostfile: Path) -> None:
    what = launch(
        "deepspeed", run_file(dp_shard=8), hostfile=hostfile, no_ssh=True, node_rank=1, master_addr="10.0.0.1"
    )
    told = [options_of(each.command.line()) for each in what.commands]
    assert [each["--node_rank"] for each in told] == ["0", "1"]
    assert {each["--master_addr"] for each in told} == {"10.0.0.1"}
    assert all("--no_ssh" in each.command.argv for each in what.commands)
    (written,) = what.files.values()
    assert written == "gpu-1 slots=4\ngpu-2 slots=4\n"
    assert what.here == (1,)


def test_deepspeed_with_pdsh(run_file: Write, hostfile: Path) -> None:
    what = launch("deepspeed", run_file(dp_shard=4), hostfile=hostfile, processes=2)
    (each,) = what.commands
    assert each.command.stop_by is StopBy.RUN_FOLDER
    assert "--force_multi" in each.command.argv
    assert "ServerAliveInterval" in each.command.environment["PDSH_SSH_ARGS_APPEND"]
    hosts, variables = what.files.values()
    assert hosts == "gpu-1 slots=2\ngpu-2 slots=2\n"
    # DeepSpeed passes PYTHONPATH itself, with the current folder before it.
    assert variables == "NCCL_DEBUG=INFO\nOMP_NUM_THREADS=3\nPATH=/usr/bin\n"


ODD = ["plain", "two words", "$HOME", 'a"b', "a'b", "back\\slash", "`id`", "a;b&c|d", "[1, 2]", "*", 'a b$c`d\\e"f']


@pytest.mark.parametrize("value", ODD)
def test_values_survive_deepspeeds_quoting(value: str) -> None:
    escaped = in_double_quotes(value)
    # As MultiNodeRunner.add_export writes it: in double quotes if there is anything special.
    shown = f'"{escaped}"' if any(not (each.isalnum() or each in "_@%+=:,./-") for each in escaped) else escaped
    assert shell(f'export ODD={shown}; printf %s "$ODD"') == value


@pytest.mark.parametrize("word", ODD)
def test_words_survive_pdsh(word: str) -> None:
    escaped = for_pdsh(word)
    # As PDSHRunner.parse_user_args writes it.
    shown = '"{}"'.format(escaped.replace('"', '\\"')) if " " in escaped else escaped
    assert shell(f"printf %s {shown}") == word


def shell(script: str) -> str:
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout


def test_pdsh_leaves_percent_signs_alone() -> None:
    assert (for_pdsh("50%n"), in_double_quotes("50%n")) == ("50%%n", "50%%n")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_plain_ssh(run_file: Write, hostfile: Path, launcher: Launcher) -> None:
    what = launch(launcher, run_file(dp_shard=8), hostfile=hostfile, ssh="openssh")
    assert what.here == (0, 1)
    for node, each in enumerate(what.commands):
        *options, host, remote = each.command.argv
        assert host == f"gpu-{node + 1}"
        assert "BatchMode=yes" in options
        assert each.command.stop_by is StopBy.STDIN
        told = options_of(remote)
        assert (told["--with"], told["--node-rank"], told["--master-addr"]) == (launcher, str(node), "gpu-1")
        words = shlex.split(remote)
        assert "--stop-with-stdin" in words and "--no-ssh" in words
        assert "NCCL_DEBUG=INFO" in words
        assert "canary" not in remote


def test_mpirun(run_file: Write, hostfile: Path) -> None:
    (each,) = launch("mpi", run_file(dp_shard=8), hostfile=hostfile, mpi="openmpi").commands
    line = each.command.line()
    assert line.startswith("mpirun -np 8 --host gpu-1:4,gpu-2:4 --bind-to none ")
    assert "-x NCCL_DEBUG=INFO" in line and "-x MASTER_ADDR=gpu-1" in line and "-x MASTER_PORT=29500" in line
    (each,) = launch("mpi", run_file(dp_shard=8), hostfile=hostfile, mpi="mpich").commands
    line = each.command.line()
    assert line.startswith("mpirun -np 8 -hosts gpu-1:4,gpu-2:4 ")
    assert "-genv NCCL_DEBUG INFO" in line and "-genv MASTER_ADDR gpu-1" in line
    assert each.command.stop_by is StopBy.LAUNCHER


def test_no_launcher_shows_a_secret(run_file: Write, hostfile: Path) -> None:
    options: dict[Launcher, dict[str, Any]] = {
        "torchrun": {"hostfile": hostfile},
        "deepspeed": {"hostfile": hostfile},
        "mpi": {"hostfile": hostfile},
        "slurm": {"nodes": 2},
        "kubernetes": {"nodes": 2, "image": "i"},
        "compose": {"nodes": 2, "image": "i"},
        "docker": {"nodes": 2, "image": "i", "node_rank": 0, "master_addr": "a", "processes": 4},
    }
    for launcher, chosen in options.items():
        done = prepared(launcher, run_file(dp_shard=8), **chosen)
        assert "canary" not in done.what.script()
        assert done.passed is not None and "HF_TOKEN" in done.passed.held_back


def test_processes_on_a_cluster_follow_from_the_config(run_file: Write) -> None:
    text = prepared("slurm", run_file(dp_shard=8), nodes=2).what.script()
    assert "--processes 4 " in text
    with pytest.raises(ValueError, match="the 8 processes of parallel"):
        prepared("slurm", run_file(dp_shard=8), nodes=3)


def test_fit_is_left_to_the_nodes_that_slurm_gives(run_file: Write) -> None:
    done = prepared("slurm", run_file(dp_shard=2), nodes=2, processes=4, fit=True)
    assert "launch --fit -- train" in done.what.script()
    assert "parallel.dp_shard=8" not in done.what.script()
    fitted = prepared("torchrun", run_file(dp_shard=2), processes=4, fit=True)
    assert fitted.subject.command[-1] == "parallel.dp_shard=4"


def test_preflight_looks_at_the_same_settings(run_file: Write) -> None:
    request = Request("torchrun", ("train", str(run_file(dp_shard=2))), processes=4, fit=True)
    checks = preflight_of(request, prepare(request, SHELL))
    assert checks.command == ("preflight", str(run_file()), "parallel.dp_shard=4")
    assert prepare(checks, SHELL).processes == 4
    with pytest.raises(ValueError, match="leave it out"):
        preflight_of(request, prepare(Request("torchrun", ("data", "shapes")), SHELL))


@pytest.mark.parametrize(
    ("launcher", "options", "message"),
    [
        ("torchrun", {"nodes": 2, "processes": 1}, "needs --master-addr"),
        ("torchrun", {"nodes": 2, "processes": 1, "master_addr": "a", "node_rank": 2}, "--node-rank 2"),
        ("torchrun", {"processes": 3}, "3 process.*add --fit"),
        ("torchrun", {"ssh": "openssh"}, "needs --hostfile"),
        ("deepspeed", {"nodes": 2, "processes": 1, "master_addr": "a"}, "needs --hostfile, or --no-ssh"),
        ("mpi", {"nodes": 2, "processes": 1}, "needs --hostfile"),
        ("kubernetes", {"nodes": 2}, "needs --image"),
        ("docker", {"nodes": 2, "processes": 1, "image": "i", "master_addr": "a"}, "say which with --node-rank"),
        ("kubernetes", {"image": "i", "mounts": ("x",)}, "write CLAIM:PATH"),
    ],
)
def test_options_that_do_not_go_together(
    run_file: Write, launcher: Launcher, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(launcher, run_file(dp_shard=2), **options)


@pytest.mark.parametrize(
    ("launcher", "options", "message"),
    [
        ("slurm", {}, "leave it out with slurm"),
        ("torchrun", {"ssh": "pdsh"}, "DeepSpeed's"),
        ("deepspeed", {"node_rank": 0}, "add --no-ssh"),
        ("deepspeed", {"nodes": 3}, "names 2 machine"),
    ],
)
def test_options_that_do_not_go_with_a_hostfile(
    run_file: Write, hostfile: Path, launcher: Launcher, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(launcher, run_file(dp_shard=8), hostfile=hostfile, **options)
