"""Judgement on machines: memory, limits, folders, names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rae_scale.preflight.facts import Facts, Host, Names
from rae_scale.preflight.files import Cache, Input, RunDir, is_on_network
from rae_scale.preflight.finding import Finding, size
from rae_scale.preflight.needs import Needs

GB, GIB, MIB = 1e9, 1 << 30, 1 << 20
SHM_PER_RANK, SHM_WANTED = 128 * MIB, GIB
"""Of each rank: loader workers hand batches over in it, NCCL and DeepSpeed talk through it. A container has 64 MiB for
all of them unless it is given more."""
FILES, FILES_PER_RANK, FILES_WANTED = 512, 8, 4096
"""Open files: of one process, and of rank 0 for each rank, whose store keeps a connection per group and rank."""
SHARE_USED = 1.05
"""Of the file of weights, the room that handing it over asks for (`train/shared_build.py`)."""


def check_hosts(every: Sequence[Facts], machines: Sequence[Sequence[int]], needs: Needs | None) -> Iterator[Finding]:
    """machines: the ranks of each; the first of them has looked around."""
    by_rank = {facts.place.rank: facts for facts in every}
    for ranks in machines:
        facts, here = by_rank[ranks[0]], tuple(ranks)
        if facts.host is not None:
            yield judge_memory(facts.host, needs, here)
            yield judge_shared_memory(facts.host, needs, here)
            yield from judge_limits(facts.host, len(by_rank), here)
        if facts.names is not None:
            yield judge_names(facts.names, len(machines) > 1, here)
        if facts.run_dir is not None:
            yield judge_run_dir(facts.run_dir, len(machines) > 1, here)
            if needs is not None and not facts.run_dir.problem:
                yield judge_disk(facts.run_dir, needs, here)
        for entry in facts.inputs or ():
            yield judge_input(entry, here)
        for cache in facts.caches or ():
            yield judge_cache(cache, here)


def judge_stuck(every: Sequence[Facts]) -> Iterator[Finding]:
    for facts in every:
        for check, text in facts.stuck.items():
            fix = "look for a dead file server, name server or driver on that machine (dmesg)"
            yield Finding(check, "fail", text, "training would hang on it as well", fix, (facts.place.rank,))


def judge_memory(host: Host, needs: Needs | None, ranks: tuple[int, ...]) -> Finding:
    value = f"{size(host.memory_free)} free"
    needed = needs.host * len(ranks) if needs is not None else 0
    if host.memory_free >= needed:
        return Finding("host-memory", "ok", f"{value}, {size(needed)} needed", ranks=ranks)
    return Finding(
        "host-memory",
        "fail",
        f"{value}; {len(ranks)} ranks need {size(needed)} by the plan",
        "the kernel ends the run when copies of a checkpoint or offloaded states are made",
        "give the job more memory, lower run.save_buffer_gb, or leave engine.offload_optimizer out",
        ranks,
    )


def judge_shared_memory(host: Host, needs: Needs | None, ranks: tuple[int, ...]) -> Finding:
    value = f"{host.shm_free / GIB:.2f} of {host.shm_total / GIB:.2f} GiB free"
    fix = "docker run --shm-size or --ipc host; Kubernetes: an emptyDir with medium Memory on /dev/shm"
    if host.shm_free < SHM_PER_RANK * len(ranks):
        why = "loader workers and NCCL die with a bus error"
        return Finding("shm", "fail", value, why, fix, ranks)
    handed_over = needs.handed_over if needs is not None and len(ranks) > 1 else 0
    if max(host.shm_free, host.temporary_free) < SHARE_USED * handed_over:
        value += f", {host.temporary_free / GIB:.2f} GiB in the folder for temporary files"
        why = f"one process of a machine hands {size(handed_over)} of weights to the others in a file"
        return Finding("shm", "fail", value, why, f"{fix}; or set TMPDIR to a local folder with room", ranks)
    if host.shm_free < SHM_WANTED * len(ranks):
        why = f"less than {SHM_WANTED / GIB:.0f} GiB per rank is little with many loader workers"
        return Finding("shm", "warn", value, why, fix, ranks)
    return Finding("shm", "ok", value, ranks=ranks)


def judge_limits(host: Host, world_size: int, ranks: tuple[int, ...]) -> Iterator[Finding]:
    files = host.open_files
    needed = FILES + (FILES_PER_RANK * world_size if 0 in ranks else 0)
    if files is not None and files < max(needed, FILES_WANTED):
        yield Finding(
            "limits",
            "fail" if files < needed else "warn",
            f"{files} open files",
            f"rank 0 keeps connections to {world_size} ranks, and loader workers pass tensors as files",
            "ulimit -n 65536, LimitNOFILE= of the daemon that starts the job, or docker run --ulimit nofile=65536",
            ranks,
        )
    if host.infiniband and host.locked_memory is not None:
        yield Finding(
            "limits",
            "fail",
            f"{host.locked_memory / MIB:.0f} MiB of locked memory, with InfiniBand ({', '.join(host.infiniband[:2])})",
            "RDMA cannot register its buffers: NCCL fails or falls back to slow sockets",
            "ulimit -l unlimited, LimitMEMLOCK=infinity of the daemon that starts the job, or docker run --ulimit "
            "memlock=-1",
            ranks,
        )
    if files is None or files >= needed:
        yield Finding("limits", "ok", f"{'unlimited' if files is None else files} open files", ranks=ranks)


def judge_names(names: Names, several: bool, ranks: tuple[int, ...]) -> Finding:
    """several: there are other machines."""
    if names.loopback and several and not names.interface:
        return Finding(
            "dns",
            "fail",
            "its own name means 127.0.0.1 or nothing",
            "gloo tells other machines this address, where they do not find it",
            "set GLOO_SOCKET_IFNAME to the interface that leads to them, or correct /etc/hosts",
            ranks,
        )
    if names.unknown:
        text = ", ".join(f"{host} ({reason})" for host, reason in list(names.unknown.items())[:3])
        why, fix = "launchers that use ssh do not reach them by name", "add them to DNS or /etc/hosts"
        return Finding("dns", "warn", f"names that are not known here: {text}", why, fix, ranks)
    return Finding("dns", "ok", "names are known", ranks=ranks)


def judge_run_dir(folder: RunDir, several: bool, ranks: tuple[int, ...]) -> Finding:
    where = f"{folder.path} on {folder.file_system or 'an unknown file system'}"
    if folder.problem:
        why, fix = "no checkpoint and no log can be written", "correct its permissions, or choose another run.dir"
        return Finding("run-dir", "fail", f"{where}: {folder.problem}", why, fix, ranks)
    if several and folder.file_system == "tmpfs":
        why, fix = "what a machine writes there, others do not see", "choose a run.dir that all machines share"
        return Finding("run-dir", "fail", f"{where}, which is memory of this machine", why, fix, ranks)
    goes_on = f", continues from {folder.newest}" if folder.newest else ""
    return Finding("run-dir", "ok", f"{where}{goes_on}", ranks=ranks)


def judge_disk(folder: RunDir, needs: Needs, ranks: tuple[int, ...]) -> Finding:
    missing = max(0, needs.checkpoints - folder.checkpoints)
    needed = missing * needs.checkpoint
    value = f"{size(folder.free)} free, {missing} checkpoints more need {size(needed)}"
    fix = "free space, choose another run.dir, or a lower run.keep_last"
    if folder.free < needed:
        return Finding("disk", "fail", value, "a save fails when the disk is full", fix, ranks)
    forever = needed + needs.forever * needs.checkpoint
    if folder.free < forever:
        value = f"{size(folder.free)} free, run.keep_every makes it {size(forever)}"
        return Finding("disk", "warn", value, "the disk is full before the run ends", f"{fix} or keep_every", ranks)
    return Finding("disk", "ok", value, ranks=ranks)


def judge_input(entry: Input, ranks: tuple[int, ...]) -> Finding:
    check = "data" if entry.setting.startswith("data.") else "weights"
    if not entry.problem:
        return Finding(check, "ok", f"{entry.setting}: {entry.content}", ranks=ranks)
    value = f"{entry.setting}={entry.path!r}: {entry.problem}"
    fix = "copy it to this machine or mount it, at the same path as elsewhere"
    return Finding(check, "fail", value, "this machine's ranks end while the others wait", fix, ranks)


def judge_cache(cache: Cache, ranks: tuple[int, ...]) -> Finding:
    where = f"{cache.what} in {cache.path}"
    if cache.problem:
        return Finding("cache", "fail", f"{where}: {cache.problem}", cache.without, cache.fix, ranks)
    if is_on_network(cache.file_system):
        return Finding("cache", "warn", f"{where} is on {cache.file_system}", cache.over_network, cache.fix, ranks)
    return Finding("cache", "ok", f"{where} ({cache.file_system})", ranks=ranks)
