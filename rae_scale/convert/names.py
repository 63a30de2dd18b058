"""Where each tensor of another format lies in ours: the one table that conversions in both directions go by.

A format's tensor (`Target`) is made of patches, each a box of it that holds the same elements in the same order as a
box of one of our parameters. `table` lists the targets of a format for a model, which may be on the meta device: only
shapes are looked at. Elements of our parameters that no target covers are SwiGLU's padding: zero, written where it
is missing and checked where it is left out (`padding_boxes`).

    table("official", model)          a whole text-to-image model as the Scale-RAE release lays it out
    table("official-decoder", model)  a ViTDecoder as in the RAE release
    table("diffusers-decoder", model) the same in an AutoencoderRAE
    table("llm", model)               the language model in a ScaleRAE, as transformers spells a Qwen2
    table("native", model)            our own names

The table is derived from the views in `models.official` and `models.composite`: names are written down there only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rae_scale.convert.source import Naming, Source
from rae_scale.engines.base import Kind
from rae_scale.models.composite import ScaleRAE, official_t2i_tensors
from rae_scale.models.decoder import ViTDecoder
from rae_scale.models.dit import DiT
from rae_scale.models.official import OfficialTensor, official_tensors
from rae_scale.parallel.boxes import Box, whole

LLM_PREFIX = "conditioner.llm."
DIFFUSERS_DECODER = "decoder."
DIFFUSERS_POSITIONS = "decoder_pos_embed"
# In an AutoencoderRAE's layers, in place of the RAE release's.
DIFFUSERS_ATTENTION = {
    ".attention.attention.query.": ".attention.to_q.",
    ".attention.attention.key.": ".attention.to_k.",
    ".attention.attention.value.": ".attention.to_v.",
    ".attention.output.dense.": ".attention.to_out.0.",
}
# What an AutoencoderRAE has beside its decoder. Our decoders have no encoder in them, and take pixel statistics from
# the settings.
DIFFUSERS_BESIDE = ("encoder.", "encoder_mean", "encoder_std", "_latents_mean", "_latents_std")


@dataclass(frozen=True)
class Patch:
    """The elements in `box` of a target are those in `ours` of our parameter `name`, in the same order. The boxes have
    the same shape, but for dimensions of length 1 at the end of the target's."""

    box: Box
    name: str
    ours: Box


@dataclass(frozen=True)
class Target:
    """One tensor of another format.

    patches:  cover it, each element once; none for a constant.
    constant: its value, float32, if it is a table that a model computes: written on the way out, compared on the way
              in.
    repeats:  its elements are in another target as well (an output layer tied to the embedding). On the way in it may
              be missing; if it is there, it must be the same, bit for bit.
    optional: a constant that may be missing on the way in and is not written on the way out.
    """

    name: str
    shape: tuple[int, ...]
    patches: tuple[Patch, ...] = ()
    constant: Tensor | None = None
    repeats: bool = False
    optional: bool = False


def table(naming: Naming, module: nn.Module) -> list[Target]:
    """Every tensor of the format `naming` for this model, in the order in which files list them.

    Raises:
        ValueError: the format holds no models of this kind.
    """
    if naming == "native":
        return [
            Target(name, tuple(p.shape), (Patch(whole(p.shape), name, whole(p.shape)),))
            for name, p in module.named_parameters()
        ]
    if naming == "llm" and isinstance(module, ScaleRAE):
        llm = module.conditioner.llm
        parameters = llm.named_parameters(remove_duplicate=False)
        return targets_of(module, (OfficialTensor(name, p, tuple(p.shape)) for name, p in parameters))
    if naming == "official" and isinstance(module, ScaleRAE):
        make_constants(module.dit)
        return targets_of(module, official_t2i_tensors(module))
    if naming in ("official-decoder", "diffusers-decoder") and isinstance(module, ViTDecoder):
        make_constants(module)
        targets = targets_of(module, official_tensors(module))
        return targets if naming == "official-decoder" else [in_diffusers(target) for target in targets]
    raise ValueError(f"{HOLDS[naming]}, and this is a {type(module).__name__}")


HOLDS: Mapping[Naming, str] = {
    "native": "native checkpoints hold any model",
    "official": "an official Scale-RAE checkpoint holds a whole text-to-image model (stages pretrain and finetune)",
    "official-decoder": "an official RAE decoder file holds a ViT decoder (stage decoder)",
    "diffusers-decoder": "an AutoencoderRAE holds a ViT decoder (stage decoder)",
    "llm": "a Qwen2 folder holds the language model of a text-to-image model (stages pretrain and finetune)",
}


def in_diffusers(target: Target) -> Target:
    name = target.name
    for theirs, diffusers in DIFFUSERS_ATTENTION.items():
        name = name.replace(theirs, diffusers)
    # diffusers computes its position table, and ignores one that is there.
    return replace(target, name=DIFFUSERS_DECODER + name, optional=target.name == DIFFUSERS_POSITIONS)


def is_beside(naming: Naming, name: str) -> bool:
    """Whether a tensor of the format is known to have no place in our models."""
    return naming == "diffusers-decoder" and name.startswith(DIFFUSERS_BESIDE)


def make_constants(model: DiT | ViTDecoder) -> None:
    """Give the model its tables as real tensors, though its parameters are on the meta device: they are small."""
    if not any(buffer.is_meta for buffer in model.buffers()):
        return
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
    model.init_constants()


def targets_of(module: nn.Module, entries: Iterable[OfficialTensor]) -> list[Target]:
    """The table that views of `module`'s parameters give."""
    names = {p.untyped_storage()._cdata: (name, p) for name, p in module.named_parameters()}
    assert len(names) == len(list(module.parameters())), "parameters share memory"
    seen: set[tuple[str, Box]] = set()
    targets = []
    for entry in entries:
        if entry.constant:
            constant = entry.view.detach().float().reshape(entry.shape)
            targets.append(Target(entry.name, entry.shape, constant=constant))
            continue
        name, parameter = names[entry.view.untyped_storage()._cdata]
        boxes = boxes_of_view(parameter, entry.view)
        patches = tuple(patches_of(entry.shape, name, boxes))
        repeats = all((name, box) in seen for box in boxes)
        seen |= {(name, box) for box in boxes}
        targets.append(Target(entry.name, entry.shape, patches, repeats=repeats))
    return targets


def boxes_of_view(parameter: Tensor, view: Tensor) -> list[Box]:
    """The boxes of `parameter` that a view of it shows, in the view's order. Its last dimensions are the parameter's,
    perhaps cut; each index of those before is a box."""
    extra = view.dim() - parameter.dim()
    assert extra >= 0 and view.stride()[extra:] == parameter.stride(), "not a rectangular part"
    boxes = []
    for index in itertools.product(*(range(length) for length in view.shape[:extra])):
        offset = view.storage_offset() - parameter.storage_offset()
        offset += sum(i * stride for i, stride in zip(index, view.stride(), strict=False))
        start = []
        for stride in parameter.stride():
            first, offset = divmod(offset, stride)
            start.append(first)
        stop = (first + length for first, length in zip(start, view.shape[extra:], strict=True))
        boxes.append(Box(tuple(start), tuple(stop)))
    return boxes


def patches_of(shape: Sequence[int], name: str, boxes: Sequence[Box]) -> Iterator[Patch]:
    """Lay our boxes one after the other along the target's first dimension."""
    row = 0
    for box in boxes:
        first, row = row, row + box.shape[0]
        yield Patch(Box((first, *(0 for _ in shape[1:])), (row, *shape[1:])), name, box)
    assert row == shape[0], f"{name}: {row} of {shape[0]} rows"


def read_target(source: Source, kind: Kind, target: Target, box: Box) -> Tensor:
    """The elements in `box` of `target`, out of a source in our names.

    Raises:
        KeyError: `source` lacks one of our tensors.
    """
    if target.constant is not None:
        return target.constant[box.slices]
    parts = []
    for patch in target.patches:
        common = patch.box.intersect(box)
        if common is not None:
            parts.append((common, source.read(kind, patch.name, in_ours(patch, common))))
    return join(box, parts)


def join(box: Box, parts: Sequence[tuple[Box, Tensor]]) -> Tensor:
    """A tensor of the elements in `box` from those in boxes inside it; zero elsewhere."""
    if len(parts) == 1 and parts[0][0] == box:
        return parts[0][1].reshape(box.shape)
    dtype = torch.float32
    if parts:
        dtype = parts[0][1].dtype
        for _, part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
    out = torch.zeros(box.shape, dtype=dtype)
    for inner, part in parts:
        out[inner.relative_to(box).slices] = part.reshape(inner.shape)
    return out


def in_ours(patch: Patch, box: Box) -> Box:
    """Of a box inside `patch.box`, the same elements in our parameter."""
    dims = len(patch.ours.start)
    inner = box.relative_to(patch.box)
    return Box(inner.start[:dims], inner.stop[:dims]).placed_in(patch.ours)


def in_target(patch: Patch, box: Box) -> Box:
    """The inverse: of a box inside `patch.ours`, the same elements in the target."""
    inner = box.relative_to(patch.ours)
    ones = len(patch.box.start) - len(box.start)
    return Box((*inner.start, *(0,) * ones), (*inner.stop, *(1,) * ones)).placed_in(patch.box)


def patches_by_name(targets: Iterable[Target]) -> dict[str, list[tuple[Target, Patch]]]:
    """For each of our parameters, where its elements are; repetitions left out."""
    found: dict[str, list[tuple[Target, Patch]]] = {}
    for target in targets:
        for patch in target.patches if not target.repeats else ():
            found.setdefault(patch.name, []).append((target, patch))
    return found


def padding_boxes(module: nn.Module, targets: Iterable[Target]) -> dict[str, list[Box]]:
    """What of the parameters that the targets cover in part they do not cover: the padding."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    found = {}
    for name, places in patches_by_name(targets).items():
        rest = [whole(shapes[name])]
        for _, patch in places:
            rest = [left for box in rest for left in without(box, patch.ours)]
        if rest:
            found[name] = rest
    return found


def without(box: Box, hole: Box) -> Iterator[Box]:
    """`box` without the elements in `hole`, as boxes that do not overlap."""
    common = box.intersect(hole)
    if common is None:
        yield box
        return
    start, stop = list(box.start), list(box.stop)
    for dim, (first, last) in enumerate(zip(common.start, common.stop, strict=True)):
        if start[dim] < first:
            yield Box(tuple(start), (*stop[:dim], first, *stop[dim + 1 :]))
        if last < stop[dim]:
            yield Box((*start[:dim], last, *start[dim + 1 :]), tuple(stop))
        start[dim], stop[dim] = first, last
