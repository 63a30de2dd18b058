"""Building data sets: tars and JSON lines to folders of MDS shards, by any number of processes and machines."""

from rae_scale.data.build.merge import BuildReport, merge
from rae_scale.data.build.options import BuildOptions
from rae_scale.data.build.run import build
from rae_scale.data.build.units import Part, Unit
from rae_scale.data.build.write import REJECTED_NAME, Done

__all__ = ["REJECTED_NAME", "BuildOptions", "BuildReport", "Done", "Part", "Unit", "build", "merge"]
