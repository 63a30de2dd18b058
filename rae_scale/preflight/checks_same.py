"""Judgement on what has to be the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rae_scale.parallel.same import changed, differences, odd_ones
from rae_scale.preflight.facts import Facts
from rae_scale.preflight.finding import Finding

MUST_AGREE = ("torch", "deepspeed", "cuda", "nccl")
"""Ranks with others of these do not talk to each other, or compute something else. Of the rest it is good to know."""


def odd_ranks(every: Sequence[Facts]) -> list[int]:
    """The first rank with each odd configuration or code, and before them one that has both as most have."""
    configs, codes = odd_ones([facts.config for facts in every]), odd_ones([facts.code for facts in every])
    if not configs and not codes:
        return []
    odd = sorted({places[0] for places in (*configs.values(), *codes.values())})
    usual = [i for i, facts in enumerate(every) if facts.config not in configs and facts.code not in codes]
    return [every[place].place.rank for place in (*usual[:1], *odd)]


Details = Mapping[int, tuple[Mapping[str, str], Mapping[str, str]]]
"""By rank: its settings, and the hashes of its source files."""


def check_same(every: Sequence[Facts], details: Details) -> Iterator[Finding]:
    """details: of `odd_ranks`."""
    yield from judge_hashes(every, "config", details)
    yield from judge_hashes(every, "code", details)
    yield from judge_versions(every)


def judge_hashes(every: Sequence[Facts], check: str, details: Details) -> Iterator[Finding]:
    """check: config or code."""
    hashes = [getattr(facts, check) for facts in every]
    odd = odd_ones(hashes)
    common = next(value for value in hashes if value not in odd)
    which, compare = (0, differences) if check == "config" else (1, changed)
    model = next((each[which] for rank, each in details.items() if own_hash(every, rank, check) == common), None)
    for value, places in odd.items():
        ranks = tuple(every[place].place.rank for place in places)
        text = f"{value}, others {common}"
        if model is not None and ranks[0] in details:
            text = compare(details[ranks[0]][which], model)
        yield Finding(
            check,
            "fail",
            text,
            "these ranks would train something else than the others"
            if check == "config"
            else "these ranks run another rae-scale than the others",
            "start all ranks with the same file and the same KEY=VALUE"
            if check == "config"
            else "install the same version on every machine, or run all from one shared folder",
            ranks,
        )
    if not odd:
        yield Finding(check, "ok", common, ranks=tuple(facts.place.rank for facts in every))


def own_hash(every: Sequence[Facts], rank: int, check: str) -> str:
    return next(str(getattr(facts, check)) for facts in every if facts.place.rank == rank)


def judge_versions(every: Sequence[Facts]) -> Iterator[Finding]:
    names = sorted({name for facts in every for name in facts.versions})
    agreed = []
    for name in names:
        values = [facts.versions.get(name, "none") for facts in every]
        odd = odd_ones(values)
        common = next(value for value in values if value not in odd)
        for value, places in odd.items():
            yield Finding(
                "versions",
                "fail" if name in MUST_AGREE else "warn",
                f"{name} {value}, others {common}",
                "ranks may not understand each other, or round differently",
                "use one image or environment on all machines",
                tuple(every[place].place.rank for place in places),
            )
        if not odd:
            agreed.append(f"{name} {common}")
    if agreed:
        yield Finding("versions", "ok", ", ".join(agreed), ranks=tuple(facts.place.rank for facts in every))


def judge_shared(seen: Mapping[int, str], path: str, machines: Sequence[Sequence[int]]) -> Iterator[Finding]:
    """seen: by the first rank of each machine, why it did not find what rank 0 had written to run.dir; empty if it
    did."""
    for ranks in machines:
        problem = seen.get(ranks[0], "it did not answer")
        if problem:
            yield Finding(
                "shared-dir",
                "fail",
                f"{path} is not the folder that rank 0 has: {problem}",
                "checkpoints would lie in pieces on several machines, and none could be loaded",
                "choose a run.dir on a file system that all machines mount at the same place",
                tuple(ranks),
            )
        else:
            yield Finding("shared-dir", "ok", path, ranks=tuple(ranks))
