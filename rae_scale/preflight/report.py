"""All findings as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rae_scale.preflight.finding import Finding, failed
from rae_scale.preflight.place import Roster, numbers

MARKS = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}


def to_text(findings: Sequence[Finding], roster: Roster, world_size: int) -> str:
    """A line per finding; below those that are not well, why it matters and what to do."""
    who = [roster.who(finding.ranks) for finding in findings]
    check_width = max((len(finding.check) for finding in findings), default=0)
    who_width = max(map(len, who), default=0)
    lines = [heading(roster, world_size)]
    for finding, where in zip(findings, who, strict=True):
        lines.append(f"{MARKS[finding.status]:4}  {finding.check:{check_width}}  {where:{who_width}}  {finding.value}")
        if finding.status != "ok":
            lines += [f"        why: {finding.why}"] if finding.why else []
            lines += [f"        fix: {finding.fix}"] if finding.fix else []
    counts = {status: sum(finding.status == status for finding in findings) for status in MARKS}
    verdict = "do not start" if failed(findings) else "ready to start"
    lines.append(f"{verdict}: {counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    return "\n".join(lines)


def heading(roster: Roster, world_size: int) -> str:
    machines = ", ".join(f"{roster.host(ranks[0])} ({numbers(ranks)})" for ranks in roster.machines[:8])
    more = f" and {len(roster.machines) - 8} more" if len(roster.machines) > 8 else ""
    count = "1 machine" if len(roster.machines) == 1 else f"{len(roster.machines)} machines"
    return f"{len(roster.places)} of {world_size} ranks on {count}: {machines}{more}"


def to_json(findings: Sequence[Finding], roster: Roster, world_size: int) -> dict[str, Any]:
    return {
        "ok": not failed(findings),
        "world_size": world_size,
        "machines": [{"host": roster.host(ranks[0]), "ranks": ranks} for ranks in roster.machines],
        "findings": [
            {
                "check": finding.check,
                "status": finding.status,
                "hosts": sorted({roster.host(rank) for rank in finding.ranks if rank in roster.places}),
                "ranks": list(finding.ranks),
                "value": finding.value,
                "why": finding.why,
                "fix": finding.fix,
            }
            for finding in findings
        ],
    }
