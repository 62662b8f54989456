"""Text tokenizers behind one small interface, and their configurations."""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

from zoo.errors import ConfigError, MissingExtra, WeightsError

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
"""Special tokens of the embedded tokenizer, ids 0 to 3."""

_DESCRIPTION = "text_tokenizer.json"


class TextTokenizer(ABC):
    """Text to ids and back. Special tokens exist as ids only: their spelling inside a text is ordinary text."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    image_token_id: int | None
    mask_id: int | None = None

    def __init__(self, config: TokenizerConfig) -> None:
        self.config = config

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text and the characters (start, stop) that each stands for."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""

    def special_id(self, name: str) -> int | None:
        """Return the id of the special token that is spelled ``name``; None where the vocabulary has none."""
        return None

    @abstractmethod
    def _definition(self) -> str:
        """Return everything that decides the ids, as text."""

    @abstractmethod
    def _save(self, folder: Path) -> None:
        """Write the tokenizer's own files, json or text."""

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text."""
        ids = {self.pad_id, self.bos_id, self.eos_id, self.image_token_id, self.mask_id}
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self._definition().encode()).hexdigest()

    def fingerprint(self) -> str:
        """Return a sha256 (hex): tokenizers with equal ones give equal ids."""
        return self._fingerprint

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer into ``folder`` as json; ``load_tokenizer`` reads it back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save(folder)
        about = {"kind": self.config.kind, "fields": asdict(self.config), "fingerprint": self.fingerprint()}
        (folder / _DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Base of the configurations of tokenizers."""

    kind: ClassVar[str] = ""

    def build(self, folder: Path | None = None) -> TextTokenizer:
        """Make the tokenizer; with ``folder`` from the files saved there, else from its own source."""
        raise TypeError(f"{type(self).__name__} defines no build")


# -- byte-level BPE ----------------------------------------------------------------------------------------------------


class BpeTokenizer(TextTokenizer):
    """A tokenizer of the ``tokenizers`` library, held as its json."""

    def __init__(
        self, config: TokenizerConfig, definition: str, bos: str, eos: str, image: str | None, pad_id: int
    ) -> None:
        from tokenizers import Tokenizer

        super().__init__(config)
        try:
            self._bpe = Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise WeightsError(f"the tokenizer file cannot be read: {error}") from None
        self._bpe.encode_special_tokens = True  # "<eos>" in a caption is five characters, not the end
        self._bpe.no_padding()
        self._bpe.no_truncation()
        self.vocab_size = self._bpe.get_vocab_size()
        self.bos_id, self.eos_id, self.pad_id = self._special(bos), self._special(eos), pad_id
        self.image_token_id = self._special(image) if image is not None else None

    def _special(self, name: str) -> int:
        id = self._bpe.token_to_id(name)
        if id is None:
            raise WeightsError(f"the tokenizer file lacks the special token {name}")
        return int(id)

    def special_id(self, name: str) -> int | None:
        return next((int(i) for i, t in self._bpe.get_added_tokens_decoder().items() if t.content == name), None)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # one by one: encode_batch starts threads, which a later fork of data workers would complain about
        return [list(self._bpe.encode(self.clean(t), add_special_tokens=False).ids) for t in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._bpe.encode(self.clean(text), add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode([i for i in ids if i not in self.special_ids], skip_special_tokens=True)

    def clean(self, text: str) -> str:
        """Return the text as the model was trained to see it."""
        return text

    def _definition(self) -> str:
        return self._bpe.to_str()

    def _save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self._bpe.to_str(), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class OpenMojiBpeConfig(TokenizerConfig):
    """Byte-level BPE of 1,024 tokens learned on English names of openmoji train splits; any text can be encoded."""

    kind: ClassVar[str] = "openmoji-bpe"

    def build(self, folder: Path | None = None) -> TextTokenizer:
        path = (folder / "tokenizer.json") if folder else Path(__file__).with_name("openmoji_bpe.json")
        pad, bos, eos, image = SPECIAL
        return BpeTokenizer(self, _read(path), bos, eos, image, pad_id=SPECIAL.index(pad))


# -- CLIP --------------------------------------------------------------------------------------------------------------


class ClipTokenizer(BpeTokenizer):
    """CLIP's lower-cased BPE: 49,408 tokens, a word ends in ``</w>``, texts are repaired by ftfy and unescaped twice.

    Equal to ``open_clip.SimpleTokenizer`` but for the spellings of its special tokens inside a text, which stay text.
    """

    def clean(self, text: str) -> str:
        try:
            import ftfy
        except ImportError:
            raise MissingExtra("ftfy", None, "the tokenizer clip-bpe") from None
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return " ".join(text.split()).lower()

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        raise ConfigError("clip-bpe rewrites its text, so it cannot feed a language model; use another tokenizer")

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(ids).strip()


@dataclass(frozen=True, kw_only=True)
class ClipBpeConfig(TokenizerConfig):
    """CLIP's tokenizer, built offline from the vocabulary that the installed open_clip wheel carries."""

    kind: ClassVar[str] = "clip-bpe"

    def build(self, folder: Path | None = None) -> TextTokenizer:
        definition = _read(folder / "tokenizer.json") if folder else _clip_definition()
        # pads are 0 ("!"): they follow the end of text, where causality hides them
        return ClipTokenizer(self, definition, "<|startoftext|>", "<|endoftext|>", None, pad_id=0)


def _clip_definition() -> str:
    """Return CLIP's tokenizer as json: 256 bytes, the same with ``</w>``, 48,894 merges, two special tokens."""
    import gzip

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = "bpe_simple_vocab_16e6.txt.gz"
    try:
        listed = importlib.metadata.files("open_clip_torch") or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra("open_clip_torch", None, "the tokenizer clip-bpe") from None
    path = next((Path(str(f.locate())) for f in listed if f.name == name), None)
    if path is None:
        raise ConfigError(f"the installed open_clip_torch carries no {name}; reinstall it, or use a saved tokenizer")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]  # the first line is a header
    merges = [cast("tuple[str, str]", tuple(line.split())) for line in lines]
    # GPT-2's printable stand-ins for the 256 bytes, in its order: printable Latin-1 first, then 256 and on
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=merges,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
        )
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
    tokenizer.add_special_tokens(tokens[-2:])
    return tokenizer.to_str()


# -- transformers ------------------------------------------------------------------------------------------------------


class HfTokenizer(TextTokenizer):
    """A fast tokenizer of transformers; it must know character offsets, from which label masks are made."""

    def __init__(self, config: HfTokenizerConfig, tokenizer: Any) -> None:
        super().__init__(config)
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"the tokenizer {config.path!r} is a slow one without character offsets; save its fast form, "
                "tokenizer.json"
            )
        self._hf = tokenizer
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        if eos is None:  # BERT starts a text with [CLS] and ends it with [SEP]
            eos, bos = tokenizer.sep_token_id, tokenizer.cls_token_id
        if eos is None:
            raise ConfigError(
                f"the tokenizer {config.path!r} has no end-of-sequence token; set eos_token in its config"
            )
        self.eos_id = int(eos)
        # GPT-style tokenizers have no BOS and no PAD: the end of the previous text is what a text starts after
        self.bos_id = int(bos if bos is not None else self.eos_id)
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id)
        if tokenizer.mask_token_id is not None:
            self.mask_id = int(tokenizer.mask_token_id)
        known = tokenizer.get_added_vocab()
        self.image_token_id = known.get(config.image_token)
        if self.image_token_id is None and config.add_image_token:
            tokenizer.add_special_tokens({"additional_special_tokens": [config.image_token]})
            self.image_token_id = int(tokenizer.convert_tokens_to_ids(config.image_token))
        self.vocab_size = len(tokenizer)

    def special_id(self, name: str) -> int | None:
        id = self._hf.get_added_vocab().get(name)
        return None if id is None else int(id)

    def _call(self, text: str, offsets: bool = False) -> Any:
        return self._hf(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self._call(t)["input_ids"]) for t in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._call(text, offsets=True)
        return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i not in self.special_ids]
        return str(self._hf.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _definition(self) -> str:
        specials = [self.bos_id, self.eos_id, self.pad_id, self.image_token_id]
        return json.dumps([str(self._hf.backend_tokenizer.to_str()), specials])

    def _save(self, folder: Path) -> None:
        self._hf.save_pretrained(str(folder))


@dataclass(frozen=True, kw_only=True)
class HfTokenizerConfig(TokenizerConfig):
    """A tokenizer of transformers from a local folder or a hub id; code from a repository is never run.

    ``add_image_token`` appends ``image_token`` as a new id where the vocabulary lacks it.
    """

    kind: ClassVar[str] = "hf"
    path: str = ""
    image_token: str = "<image>"
    add_image_token: bool = False

    def build(self, folder: Path | None = None) -> TextTokenizer:
        from transformers import AutoTokenizer

        source = str(folder) if folder else self.path
        if not source:
            raise ConfigError("the tokenizer hf needs path, a local folder or a hub id")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, use_fast=True)
        except Exception as error:  # transformers raises many kinds; its first line says what is missing
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"no tokenizer could be loaded from {source!r} ({first}); give a local folder or a hub id"
            ) from None
        return HfTokenizer(self, tokenizer)


# -- loading -----------------------------------------------------------------------------------------------------------


def named_tokenizer(name: str) -> TextTokenizer:
    """Build the text tokenizer of a part's ``tokenizer`` field: a registered name, or ``hf:`` and a folder or hub id.

    Raises:
        ConfigError: Unknown name, with near ones.
    """
    from zoo.plugin import catalogue

    kind, _, path = name.partition(":")
    config: TokenizerConfig = catalogue()["tokenizer"].parse(kind, {"path": path} if path else {}, "tokenizer")
    return config.build()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"the tokenizer file {str(path)!r} cannot be read: {error}") from None


def load_tokenizer(folder: Path | str) -> TextTokenizer:
    """Read a tokenizer that ``TextTokenizer.save`` wrote.

    Raises:
        WeightsError: files are missing, damaged, or give other ids than when they were saved.
    """
    from zoo.plugin import catalogue

    folder = Path(folder)
    try:
        about = json.loads(_read(folder / _DESCRIPTION))
        kind, fields = about["kind"], about["fields"]
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"{str(folder / _DESCRIPTION)!r} is no description of a tokenizer") from None
    try:
        config: TokenizerConfig = catalogue()["tokenizer"].parse(str(kind), fields, "tokenizer")
    except ConfigError as error:
        raise WeightsError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from None
    tokenizer = config.build(folder)
    if about.get("fingerprint") != tokenizer.fingerprint():
        raise WeightsError(f"the tokenizer in {str(folder)!r} was changed after it was saved; save the model again")
    return tokenizer
