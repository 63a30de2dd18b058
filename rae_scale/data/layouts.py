"""Turns what people keep in tars and JSON lines into samples. The layout is seen from each sample's own members.

    key.jpg + key.txt (+ key.json)                                 captioned image, metadata
    key.image.jpg + key.synthetic_caption.txt (+ key.original_caption.txt)   recaptioned sets
    key.png + key.json                                             caption in the JSON, RenderedText's lines
    key.json {conversations, metadata, image_filename} + that file official release
    JSON lines {image, conversations | caption, metadata}          official release

Images may be jpg, jpeg, png or webp anywhere.
"""

from __future__ import annotations

from typing import Any, Literal

from rae_scale.data.record import BadSample, Sample, Turn
from rae_scale.data.tars import Group, Member, TarReader
from rae_scale.data.text import check_caption, check_placeholders, decode_text, parse_json_object, parse_turns

Layout = Literal["image+txt", "image+captions", "image+json", "conversations"]

IMAGE_SUFFIXES = frozenset(prefix + suffix for prefix in ("", "image.") for suffix in ("jpg", "jpeg", "png", "webp"))
# Keys under which captions are found in JSON, the first present one wins.
CAPTION_KEYS = ("caption", "captions", "text", "prompt")
# JSON keys that are not kept as metadata: they became the sample itself, or (RenderedText's boxes per character) are
# larger than everything else.
CONSUMED_KEYS = frozenset({"conversations", "image", "image_filename", "metadata", "ocr_annotation"})


def sample_from_group(group: Group, tar: TarReader) -> tuple[Sample, Layout]:
    """Read one sample of `tar`. Raises BadSample."""
    if group.problem is not None:
        raise group.problem
    fields = read_json(group, tar)
    image = read_image(group, fields, tar)
    captions = read_captions(group, tar)
    layout: Layout = "image+captions" if "synthetic_caption.txt" in group.members else "image+txt"
    if "conversations" in fields:
        layout = "conversations"
    elif not captions:
        layout = "image+json"
        captions = captions_from_json(fields, group.key)
    return make_sample(group.key, image, captions, fields), layout


def make_sample(key: str, image: bytes | None, captions: tuple[str, ...], fields: dict[str, Any]) -> Sample:
    """A checked sample; `fields` is its JSON. Raises BadSample when there is no text or an image is missing."""
    turns: tuple[Turn, ...] = ()
    if "conversations" in fields:
        turns = parse_turns(fields["conversations"], key)
        check_placeholders(turns, image is not None, key)
    elif not captions:
        raise BadSample("no caption", f"{key} has neither a caption nor conversations")
    elif image is None:
        raise BadSample("no image", f"{key} has a caption but no image")
    metadata = {name: value for name, value in fields.items() if name not in CONSUMED_KEYS}
    own = fields.get("metadata")
    metadata.update(own if isinstance(own, dict) else {} if own is None else {"metadata": own})
    return Sample(key, image, captions, turns, metadata)


def read_json(group: Group, tar: TarReader) -> dict[str, Any]:
    member = group.members.get("json")
    return parse_json_object(tar.read(member), member.name) if member else {}


def read_image(group: Group, fields: dict[str, Any], tar: TarReader) -> bytes | None:
    suffixes = sorted(IMAGE_SUFFIXES & group.members.keys())
    if len(suffixes) > 1:
        raise BadSample("several images", f"{group.key} has images .{' and .'.join(suffixes)}")
    if suffixes:
        return tar.read(group.members[suffixes[0]])
    name = fields.get("image_filename")
    if name is None:
        return None
    member = find_named_image(group.key, name, tar)
    if member is None:
        raise BadSample("no image", f"{group.key}: image_filename {name!r} is not in the archive")
    return tar.read(member)


def find_named_image(key: str, name: object, tar: TarReader) -> Member | None:
    """`image_filename` is relative to its JSON's folder, or else the whole member name."""
    folder, slash, _ = key.rpartition("/")
    return tar.find(f"{folder}{slash}{name}") or tar.find(str(name))


def claimed_images(tar: TarReader) -> set[str]:
    """Members that some JSON names as its `image_filename`: they belong to that sample, not to one of their own."""
    claimed = set()
    for group in tar.groups:
        if group.problem is not None or "json" not in group.members or IMAGE_SUFFIXES & group.members.keys():
            continue
        try:
            name = read_json(group, tar).get("image_filename")
        except BadSample:
            continue  # reported when the group itself is read
        member = find_named_image(group.key, name, tar)
        if member is not None:
            claimed.add(member.name)
    return claimed


def read_captions(group: Group, tar: TarReader) -> tuple[str, ...]:
    """Captions from text members, the synthetic one before the original one (web alt texts are often empty)."""
    captions: list[str] = []
    for suffix in ("txt", "synthetic_caption.txt", "original_caption.txt"):
        member = group.members.get(suffix)
        if member is None:
            continue
        text = decode_text(tar.read(member), member.name)
        if suffix == "original_caption.txt" and captions and not text.strip():
            continue
        captions.append(check_caption(text, member.name))
    return tuple(captions)


def captions_from_json(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    """The captions in a sample's JSON: a text, a list of alternatives, or RenderedText's list of lines."""
    annotation = fields.get("ocr_annotation")
    if isinstance(annotation, dict) and "text" in annotation:
        return (check_caption(joined_lines(annotation["text"]), f"{key}: ocr_annotation.text"),)
    for name in CAPTION_KEYS:
        value = fields.get(name)
        if value is None:
            continue
        if name == "text":
            value = joined_lines(value)
        alternatives = value if isinstance(value, list) else [value]
        return tuple(check_caption(text, f"{key}: {name}") for text in alternatives)
    return ()


def joined_lines(value: object) -> object:
    is_lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
    return "\n".join(value) if is_lines else value  # type: ignore[arg-type]
