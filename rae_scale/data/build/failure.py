"""An error in a worker, on its way to the builder: some exceptions do not survive pickling, and none names the unit."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from rae_scale.data.build.units import Unit


@dataclass(frozen=True)
class Failure:
    """user: the message says what to do; else it is a defect, and the traceback is needed."""

    unit: str
    message: str
    user: bool
    traceback: str

    @classmethod
    def of(cls, unit: Unit, error: Exception) -> Failure:
        user = isinstance(error, ValueError | OSError)
        return cls(unit.name, str(error), user, "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        if self.user:
            return ValueError(f"{self.unit}: {self.message}")
        return RuntimeError(f"{self.unit}: {self.message}\n{self.traceback}")
