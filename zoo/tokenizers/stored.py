"""Codes computed once and stored: targets of another tokenizer, or of this one, without running it in every step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.tokenizers.base import ImageTokenizer, ImageTokenizerConfig

if TYPE_CHECKING:
    from zoo.data.sample import Source

_IDS, _CODES, _SIZE = "ids", "codes", "codebook_size"


@dataclass(frozen=True, kw_only=True)
class StoredCodesConfig(ImageTokenizerConfig):
    """Codes read from a file that ``store_codes`` or ``write_codes`` wrote.

    Attributes:
        path: A safetensors file: ``codes`` [N, h*w], with the ids of the N samples and the number of codes as metadata.
    """

    path: str = ""

    def build(self) -> StoredCodes:
        return StoredCodes(self)


class StoredCodes(ImageTokenizer):
    """Looks codes up by the sample's id. They belong to the unaugmented image, so training must not augment.

    The file is read on the first look-up: building the model needs no file.
    """

    stored = True

    def __init__(self, config: StoredCodesConfig) -> None:
        super().__init__()
        self.config = config
        self.codes, self.grid = config.vocab_size, config.grid
        self._rows: dict[str, int] = {}
        self._table: Tensor | None = None

    def lookup(self, ids: Sequence[str]) -> Tensor:
        """The codes of samples: [N, h*w] int64.

        Raises:
            ConfigError: No file, or its grid or codebook is another.
            DataError: A sample without codes.
        """
        if self._table is None:
            self._rows, self._table = self._read()
        missing = next((i for i in ids if i not in self._rows), None)
        if missing is not None:
            raise DataError(f"{self.config.path!r} has no codes of sample {missing!r}; store the codes of every split")
        return self._table[[self._rows[i] for i in ids]].long()

    def _read(self) -> tuple[dict[str, int], Tensor]:
        from safetensors import SafetensorError, safe_open

        path = Path(self.config.path).expanduser()
        if not self.config.path or not path.is_file():
            raise ConfigError(
                f"image_tokenizer.path = {self.config.path!r} is no file of codes: write one with"
                " zoo.tokenizers.stored.store_codes"
            )
        try:
            with safe_open(path, framework="pt") as file:
                about, table = file.metadata() or {}, file.get_tensor(_CODES)
            ids, size = json.loads(about[_IDS]), int(about[_SIZE])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"{str(path)!r} is no file of codes ({error}); write it again") from error
        cells = self.grid[0] * self.grid[1]
        if table.shape != (len(ids), cells) or size != self.codes:
            raise ConfigError(
                f"{str(path)!r} holds {table.shape[-1]} codes an image out of {size}, expected {cells} out of"
                f" {self.codes}: set image_tokenizer.image_size, patch_size and vocab_size to fit"
            )
        return {i: row for row, i in enumerate(ids)}, table


def write_codes(path: Path | str, ids: Sequence[str], codes: Tensor, codebook_size: int) -> None:
    """Write codes [N, h*w] of the samples ``ids``, in the smallest integer type that holds them.

    Raises:
        ConfigError: Shapes or values that do not fit.
    """
    from safetensors.torch import save_file

    if codes.ndim != 2 or len(codes) != len(ids) or len(set(ids)) != len(ids):
        raise ConfigError(f"codes of shape {tuple(codes.shape)} for {len(ids)} ids: expected one row an id, ids unique")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise ConfigError(
            f"codes reach from {int(codes.min())} to {int(codes.max())}, outside a codebook of {codebook_size}"
        )
    kind = torch.int16 if codebook_size <= 2**15 else torch.int32
    about = {_IDS: json.dumps(list(ids)), _SIZE: str(codebook_size)}
    save_file({_CODES: codes.to(kind).contiguous()}, str(path), metadata=about)


@torch.inference_mode()
def store_codes(model: object, source: Source, path: Path | str, *, splits: Sequence[str] = ("train",)) -> int:
    """Run a trained tokenizer over a source and write its codes; returns how many samples.

    Args:
        model: What offers ``image_codes`` (an ``autoencoder`` model, or what ``zoo.build`` returned of it).
    """
    from zoo.capabilities import EncodeImages

    if not isinstance(model, EncodeImages):
        raise ConfigError("store_codes needs a model that offers image_codes: one of wiring autoencoder")
    ids = [i for split in splits for i in source.ids(split)]
    rows: list[Tensor] = []
    for start in range(0, len(ids), 256):
        images = [source.sample(i).image for i in ids[start : start + 256]]
        rows.append(model.image_codes([image for image in images if image is not None]).cpu())
    write_codes(path, ids, torch.cat(rows), getattr(model, "codebook_size"))  # noqa: B009  beside the capability
    return len(ids)
