"""One vocabulary for text and image codes: who has which id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from zoo.errors import ConfigError, near


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids in order: the text tokenizer's, named special tokens, image codes, and the mask that stands for a hidden
    code, the last id (Show-o's order, released ``train.py``).

    Published vocabularies that hold boundaries and codes among their text ids (Chameleon's 65,536) say where:
    ``places`` and ``code_place``; those add no ids.

    Attributes:
        text: Rows of the text vocabulary.
        specials: Names of special tokens, in the order of their ids.
        codes: Number of image codes; 0 where images are no tokens.
        mask: There is a mask id.
        places: Ids of specials that lie inside the text vocabulary.
        code_place: Id of code 0 where the codes lie inside the text vocabulary; -1 = they follow the specials.
    """

    text: int
    specials: tuple[str, ...] = ()
    codes: int = 0
    mask: bool = False
    places: Mapping[str, int] = field(default_factory=dict)
    code_place: int = -1

    def __post_init__(self) -> None:
        if self.text < 1 or self.codes < 0:
            raise ConfigError(f"a vocabulary of {self.text} text ids and {self.codes} codes: expected 1 or more and 0")
        if len(set(self.specials)) != len(self.specials):
            raise ConfigError(f"special tokens {', '.join(self.specials)}: expected each name once")
        inside = {name: place for name, place in self.places.items() if not 0 <= place < self.text}
        if inside or (self.code_place >= 0 and self.code_place + self.codes > self.text):
            raise ConfigError(
                f"special tokens {dict(self.places)} and {self.codes} codes from {self.code_place} do not lie inside a"
                f" text vocabulary of {self.text}: set wiring.inside=false to let them follow it"
            )

    @property
    def _own(self) -> tuple[str, ...]:
        """The specials that get ids behind the text."""
        return tuple(name for name in self.specials if name not in self.places)

    @property
    def first_code(self) -> int:
        """Id of code 0; code c is ``first_code + c``."""
        return self.code_place if self.code_place >= 0 else self.text + len(self._own)

    @property
    def code_ids(self) -> slice:
        """The columns of the image codes."""
        return slice(self.first_code, self.first_code + self.codes)

    @property
    def size(self) -> int:
        """Number of ids: rows of the embedding table."""
        codes = 0 if self.code_place >= 0 else self.codes
        return self.text + len(self._own) + codes + int(self.mask)

    @property
    def mask_id(self) -> int:
        """Id of a hidden code, the last one.

        Raises:
            ConfigError: There is none.
        """
        if not self.mask:
            raise ConfigError("this vocabulary has no mask id: its images are not drawn by masked prediction")
        return self.size - 1

    @property
    def slot_id(self) -> int:
        """What stands in ``input_ids`` where a code or a patch goes: the first id outside the vocabulary."""
        return self.size

    def id(self, name: str) -> int:
        """Id of a special token; raises ConfigError with near names."""
        if name in self.places:
            return self.places[name]
        if name not in self._own:
            raise ConfigError(f"no special token {name!r}{near(name, self.specials)}")
        return self.text + self._own.index(name)
