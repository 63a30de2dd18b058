"""CC12M with synthetic captions that are published apart from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rae_scale.data.adapters.line_index import LineIndex, open_index
from rae_scale.data.adapters.recaptioned import Recaptioned, read_text
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.tars import Group, TarReader
from rae_scale.data.text import check_caption, parse_json_object
from rae_scale.data.unpack import is_packed

CAPTION_FIELDS = ("caption_llava", "caption_llava_short")


@dataclass(frozen=True, kw_only=True)
class CC12MLlavaNext(Recaptioned):
    """CC12M with captions by LLaVA-NeXT, which are published apart from it.

    `pixparse/cc12m-wds` and `CaptionEmporium/conceptual-captions-cc12m-llavanext`, joined by their keys:

        cc12m-train-0000.tar   <key>.jpg, <key>.txt (the alt text), <key>.json
        train.jsonl            {"key": "<key>", "caption_llava": "...", "caption_llava_short": "...", ...} per line

    original_weight: how often the alt text is used, 0 to 1; the captions by the model share the rest.
    captions:        the JSON lines file, unpacked from the published train.jsonl.gz. A table of its keys is made beside
                     it once, `<file>.key.index` (16 bytes per line).
    without:         what becomes of an image that has no line: "reject" it, or use its "alt-text" alone.
    """

    name: ClassVar[str] = "cc12m-llavanext"
    captions: Path
    without: str = "reject"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.without not in ("reject", "alt-text"):
            raise ValueError(f"without={self.without!r}: choose reject or alt-text")

    def check(self, path: Path) -> None:
        super().check(path)
        if is_packed(self.captions):
            raise ValueError(f"captions={self.captions}: unpack it first, lines of a gzip file cannot be looked up")

    def side_files(self) -> tuple[Path, ...]:
        return (self.captions,)

    def sample(self, group: Group, tar: TarReader) -> Sample:
        original = read_text(group, tar, "txt", blank_is_none=True)
        synthetic = self.lookup(open_index(self.captions, "key"), group.key.rpartition("/")[2])
        if not synthetic and (self.without == "reject" or original is None):
            raise BadSample("no caption", f"{group.key} has no line in {self.captions.name}")
        return self.captioned(group, tar, synthetic, original)

    def lookup(self, index: LineIndex, key: str) -> tuple[str, ...]:
        """The captions in the first line of a key, the long one first; none when there is no line."""
        line = next(index.find(key), None)
        if line is None:
            return ()
        fields = parse_json_object(line.content(), f"{self.captions.name}, {key}")
        names = [name for name in CAPTION_FIELDS if name in fields] or CAPTION_FIELDS[:1]
        return tuple(check_caption(fields.get(name), f"{key}: {name}") for name in names)
