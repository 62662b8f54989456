"""What loading a checkpoint did, in words."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every tensor of a checkpoint and of the model.

    Attributes:
        source: Path or hub id.
        form: ``zoo``, ``transformers clip``, ``open_clip``, ...
        loaded: Names of the model's tensors that were filled.
        renamed: How many of them had another name or shape of storage in the checkpoint.
        new_parts: Parts that were exchanged and start from new weights.
        new: Other tensors of the model that were not filled, as the key map, a change or ``strict=False`` allowed.
        resized: Names of those that were stored for another image size and interpolated.
        ignored: Names in the checkpoint that were left, as the key map, a change or ``strict=False`` allowed.
    """

    source: str
    form: str = "zoo"
    loaded: list[str] = field(default_factory=list)
    renamed: int = 0
    new_parts: tuple[str, ...] = ()
    new: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.form} checkpoint {self.source}: loaded {len(self.loaded)} tensors"
        lines = [text + (f", {self.renamed} of them renamed" if self.renamed else "")]
        lines += [f"weights of {part} are new" for part in self.new_parts]
        if self.resized:
            lines.append(f"interpolated to the image size: {some(self.resized)}")
        if self.new:
            lines.append(f"new: {some(self.new)}")
        if self.ignored:
            lines.append(f"ignored: {some(self.ignored)}")
        return "\n".join(lines)


def some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
