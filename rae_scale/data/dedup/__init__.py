"""Finding duplicates among tens of millions of samples.

Each input file is scanned once, on its own, to a file of fingerprints (`fingerprint`, `records`): 32 bytes per sample
with a hash of the content and one of the look. `find_duplicates` then reads all of them. What it finds depends on the
order of the files in its argument alone, not on the order in which they were scanned.
"""

from rae_scale.data.dedup.duplicates import Duplicates, find_duplicates
from rae_scale.data.dedup.fingerprint import fingerprint
from rae_scale.data.dedup.records import read_fingerprints, write_fingerprints

__all__ = ["Duplicates", "find_duplicates", "fingerprint", "read_fingerprints", "write_fingerprints"]
