"""Runs a job on units in a Ray cluster, whose nodes see the inputs and the output under the same paths."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rae_scale.data.build.failure import Failure
from rae_scale.data.build.pool import ATTEMPTS
from rae_scale.data.build.units import Unit

R = TypeVar("R")


def run_ray(
    job: Callable[[Unit], R], units: Sequence[Unit], workers: int, on_result: Callable[[Unit, R], None]
) -> None:
    """As `run_local`, in tasks of one CPU each, at most `workers` at a time.

    Ray is used as it is when this process has begun it, else begun: it joins the cluster that RAY_ADDRESS names
    ("auto": the one that this node is in), or starts one on this machine. A task whose worker or node is lost is tried
    again elsewhere.

    Raises ValueError for an error in a job, and when a unit has lost three workers.
    """
    ray = import_ray()
    begun_here = not ray.is_initialized()
    if begun_here:
        ray.init(log_to_driver=False)
    waiting = deque(units)
    running: dict[Any, Unit] = {}
    try:
        task = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(call)
        shared = ray.put(job)
        while waiting or running:
            while waiting and len(running) < workers:
                unit = waiting.popleft()
                running[task.options(name=unit.name).remote(shared, unit)] = unit
            (reference, *_), _ = ray.wait(list(running), num_returns=1)
            on_result(running[reference], result_of(ray, reference, running[reference]))
            del running[reference]
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if begun_here:
            ray.shutdown()


def import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("engine ray needs Ray, which is not installed: pip install 'rae-scale[ray]'") from None
    return ray


def call(job: Callable[[Unit], R], unit: Unit) -> R | Failure:
    """On the cluster. Errors come back as values: Ray wraps and retries exceptions in its own ways."""
    try:
        return job(unit)
    except Exception as error:
        return Failure.of(unit, error)


def result_of(ray: Any, reference: Any, unit: Unit) -> Any:
    try:
        result = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"{unit.name} ({unit.path}): its worker was lost {ATTEMPTS} times, or could not start: {error}"
        ) from None
    if isinstance(result, Failure):
        raise result.error()
    return result
