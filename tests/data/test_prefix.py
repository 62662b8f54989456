"""What encoder and decoder of a prefix language model are given."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo.data.images import ImageTransform
from zoo.data.prefix import PrefixProcessor, cut
from zoo.data.sample import Sample
from zoo.data.text import OpenMojiBpeConfig
from zoo.errors import DataError

PLACE, SLOTS = 5000, 4
TOKENIZER = OpenMojiBpeConfig().build()
PICTURE = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))


def processor(**changes: Any) -> PrefixProcessor:
    transform = ImageTransform(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    fields = {"layout": "prefix", "image_tokens": SLOTS, "image_token_id": PLACE, "max_length": 64, **changes}
    return PrefixProcessor(transform, TOKENIZER, **fields)


def caption(text: str = "a red apple on a table") -> Sample:
    return Sample("s", image=PICTURE, texts=(text,))


def told(batch: dict[str, Any], row: int = 0) -> tuple[str, str]:
    """The texts that encoder and decoder have in a row, after checking what stands around them."""
    read = batch["input_ids"][row][batch["attention_mask"][row]].tolist()
    written = [i for i in batch["labels"][row].tolist() if i != -100]
    assert read[:SLOTS] == [PLACE] * SLOTS
    assert PLACE not in read[SLOTS:]
    assert read[-1] == TOKENIZER.eos_id
    assert written[-1] == TOKENIZER.eos_id
    return TOKENIZER.decode(read[SLOTS:-1]), TOKENIZER.decode(written[:-1])


def test_cut_falls_evenly_before_each_word() -> None:
    text = "a red  apple,\ton the table"
    shares = Counter(cut(text, n / 600) for n in range(600))
    assert set(shares.values()) == {100}
    assert sorted(len(prefix.split()) for prefix, _ in shares) == [0, 1, 2, 3, 4, 5]
    for prefix, rest in shares:
        assert text.startswith(prefix)
        assert text.endswith(rest)
        assert prefix.split() + rest.split() == text.split()
        assert rest.split(maxsplit=0)[0] == rest  # not empty, no white space before it
    assert cut("one", 0.999) == ("", "one")
    assert cut("", 0.3) == ("", "")


def test_captions_are_cut_by_seed_id_and_draw() -> None:
    p = processor()
    draws = list(range(40))
    batch = p([caption()] * 40, train=True, draws=draws)
    pairs = [told(batch, n) for n in draws]
    assert {" ".join(pair).strip() for pair in pairs} == {"a red apple on a table"}
    assert {len(prefix.split()) for prefix, _ in pairs} == {0, 1, 2, 3, 4, 5}
    again = p([caption()] * 3, train=True, draws=[7, 8, 9])  # whatever shares the batch
    assert [told(again, n) for n in range(3)] == pairs[7:10]
    other = processor(seed=1)([caption()] * 40, train=True, draws=draws)
    assert [told(other, n) for n in draws] != pairs
    assert batch["text_bytes"].tolist() == [len(rest.encode()) for _, rest in pairs]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == [SLOTS + len(TOKENIZER.encode([prefix])[0]) + 1 for prefix, _ in pairs]


def test_evaluation_prompts_and_split_off_write_the_whole_caption() -> None:
    whole = "a red apple on a table"
    assert told(processor()([caption()])) == ("", whole)
    assert told(processor(split=False)([caption()], train=True)) == ("", whole)
    batch = processor(prompt="a photo of")([caption()] * 9, train=True, draws=list(range(9)))
    assert {told(batch, n) for n in range(9)} == {("a photo of", whole)}
    drawn = processor(layout="prefix_instructblip")([caption()] * 30, train=True, draws=list(range(30)))
    pairs = {told(drawn, n) for n in range(30)}
    assert {rest for _, rest in pairs} == {whole}
    assert len({question for question, _ in pairs}) > 5  # its instructions, drawn


def test_dialogues() -> None:
    turns = [["<image>\nwhat is it?", "an apple"], ["which colour?", "red"], ["where?", "on a table"]]
    sample = Sample("d", image=PICTURE, meta={"turns": turns})
    p = processor()
    assert told(p([sample])) == ("what is it?", "an apple")
    batch = p([sample] * 30, train=True, draws=list(range(30)))
    assert {told(batch, n) for n in range(30)} == {
        ("what is it?", "an apple"),
        ("what is it? an apple which colour?", "red"),
        ("what is it? an apple which colour? red where?", "on a table"),
    }
    short = Sample("v", image=PICTURE, meta={"turns": [["which colour?", "red"]], "format": "short"})
    assert told(p([short])) == ("Question: which colour? Short answer:", "red")
    asked = p.encode_prompts([[("what is it?", "an apple"), ("which colour?", None)], "where?"], 2)
    assert (
        asked["input_ids"][0, asked["attention_mask"][0]].tolist()
        == batch["input_ids"][[told(batch, n)[1] for n in range(30)].index("red")][
            : int(asked["attention_mask"][0].sum())
        ].tolist()
    )
    assert bool(asked["attention_mask"][:, 0].all())  # pads stand behind
    scored = p.encode_texts(["red", "there"], [[("what is it?", "an apple"), ("which colour?", None)], "where?"])
    assert told(scored, 0) == ("what is it? an apple which colour?", "red")
    assert told(scored, 1) == ("where?", "there")


def test_several_images_and_none() -> None:
    p = processor()
    sample = Sample("m", meta={"turns": [["<image> and <image>: same?", "no"]], "images": [PICTURE, PICTURE]})
    batch = p([sample, caption()])
    assert batch["pixel_values"].shape[0] == 3
    assert (batch["input_ids"] == PLACE).sum(1).tolist() == [2 * SLOTS, SLOTS]
    bare = p([Sample("t", texts=("words alone",)), caption()])
    assert bare["has_image"].tolist() == [False, True]
    assert (bare["input_ids"] == PLACE).sum(1).tolist() == [0, SLOTS]


def test_lengths() -> None:
    p = processor(max_length=12)
    long = "a red apple on a table " * 9
    batch = p([Sample("l", image=PICTURE, meta={"turns": [[long, long]]})])
    assert batch["input_ids"].shape[1] == batch["labels"].shape[1] == 12
    assert batch["input_ids"][0, -1] == batch["labels"][0, -1] == TOKENIZER.eos_id
    with pytest.raises(DataError, match="shorten the prompt"):
        p.encode_prompts([long], 1)
    with pytest.raises(DataError, match="leaves no room for text"):
        p([Sample("m", meta={"turns": [["same?", "no"]], "images": [PICTURE] * 3})])
    asked = processor(layout="prefix_instructblip", max_length=600)
    row = asked.encode_prompts([long * 9 + "why?"], 1)["input_ids"][0].tolist()
    assert len(row) == SLOTS + 128
    assert TOKENIZER.decode(row[SLOTS:-1]).endswith("why?")  # cut from the left
