"""Whether a written folder holds what it was made from: every element compared, through the folder's own reader."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_scale.convert.source import Source
from rae_scale.parallel.boxes import whole
from rae_scale.state.format import CheckpointError
from rae_scale.state.index import describe
from rae_scale.state.read import chunks_of

CHUNK_ELEMENTS = 4 << 20  # compared at a time, on either side
INTEGERS = {4: torch.int32, 2: torch.int16}


def verify(source: Source, written: Source, dtype: torch.dtype) -> int:
    """Compare `written` with `source` cast to `dtype`, both in our names, bit for bit; return the number of elements.

    Raises:
        CheckpointError: a tensor is missing or too many, of another form, or an element differs. Or a file of the
            written folder is not as its hash says.
    """
    written.check()
    expected = {(kind, name): form for kind, forms in source.forms.items() for name, form in forms.items()}
    found = {(kind, name): form for kind, forms in written.forms.items() for name, form in forms.items()}
    if expected.keys() != found.keys():
        kind, name = sorted(expected.keys() ^ found.keys())[0]
        where = "is not" if (kind, name) in expected else "should not be"
        raise CheckpointError(f"{written.what}: {kind} of {name} {where} in it; convert once more")
    elements = 0
    for (kind, name), form in expected.items():
        if found[kind, name].shape != form.shape:
            raise CheckpointError(f"{written.what}: {kind} of {name} has shape {list(found[kind, name].shape)}")
        for box in chunks_of(whole(form.shape), CHUNK_ELEMENTS):
            wanted = source.read(kind, name, box).to(dtype)
            differing = differing_bits(wanted, written.read(kind, name, box))
            if differing:
                raise CheckpointError(
                    f"{written.what}: {differing} of {box.numel} elements of {kind} of {name}, {describe(box)}, are "
                    "not what they were made from; convert once more, and look at the disk if it happens again"
                )
            elements += box.numel
    return elements


def differing_bits(a: Tensor, b: Tensor) -> int:
    """How many elements are not the same, bit for bit: NaN is NaN, 0 is not -0. All of them if the dtypes differ."""
    if a.dtype != b.dtype:
        return a.numel()
    integer = INTEGERS[a.dtype.itemsize]
    return int((a.contiguous().view(integer) != b.contiguous().view(integer)).count_nonzero())
