"""Streaming writes what writing at once does; a chat keeps its turns and tells only what cannot change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from zoo.errors import ConfigError, DataError
from zoo.layout import Segment, lay_out
from zoo.module import ZooModule
from zoo.sampling.chat import Chat, _Pieces
from zoo.sampling.text import Decoding, stream, write

IMAGE = Image.new("RGB", (40, 30), (200, 30, 30))


@pytest.fixture(scope="module")
def module() -> ZooModule:
    built = zoo.build("llava", scale="tiny", seed=1)
    built.set_stage(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in built.model.decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return built.eval()


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 4}, {"repetition_penalty": 1.5}])
def test_stream_is_what_write_stacks(module: ZooModule, how: dict[str, Any]) -> None:
    decoder = module.model.decoder
    ids = torch.randint(4, 1000, (3, 6), generator=torch.Generator().manual_seed(0))
    embeds, layout = decoder.embed(ids), lay_out([Segment("text", 6)], 3)
    decoding = Decoding(max_new_tokens=9, **how)
    whole = write(decoder, embeds, layout, decoding, stop_ids=[2], pad_id=0, prompt_ids=ids)
    told: list[torch.Tensor] = []
    again = write(decoder, embeds, layout, decoding, stop_ids=[2], pad_id=0, prompt_ids=ids, tell=told.append)
    columns = list(stream(decoder, embeds, layout, decoding, stop_ids=[2], pad_id=0, prompt_ids=ids))
    assert len({tuple(row) for row in whole.tolist()}) == 3
    assert torch.equal(torch.stack(columns, 1), whole)
    assert torch.equal(torch.stack(told, 1), whole)
    assert torch.equal(again, whole)


def test_stream_takes_no_beams(module: ZooModule) -> None:
    decoder = module.model.decoder
    with pytest.raises(ConfigError, match="beams = 3 cannot be streamed"):
        next(stream(decoder, torch.zeros(1, 2, decoder.width), lay_out([Segment("text", 2)]), Decoding(beams=3),
                    stop_ids=[2], pad_id=0))  # fmt: skip
    with pytest.raises(ConfigError, match="leave beams at 1"):
        Chat(module.model, Decoding(beams=3))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_first_answer_is_generate_texts_and_the_pieces_are_all_of_it(module: ZooModule, temperature: float) -> None:
    module.train()
    expected = module.generate_text([IMAGE], ["What?"], max_new_tokens=20, temperature=temperature, seed=3)
    pieces: list[str] = []
    chat = Chat(module.model, Decoding(max_new_tokens=20, temperature=temperature, seed=3), [IMAGE])
    answer = chat.ask("What?", pieces.append)
    assert [answer] == expected
    assert "".join(pieces) == answer
    assert len(pieces) > 3
    assert module.model.decoder.training == module.training is True
    module.eval()


def test_later_turns_read_the_earlier_ones(module: ZooModule) -> None:
    decoding = Decoding(max_new_tokens=12)
    chat = Chat(module.model, decoding, [IMAGE])
    first, second = chat.ask("What?"), chat.ask("And now?")
    dialogue = [[("What?", first), ("And now?", None)]]
    assert [second] == module.generate_text([IMAGE], dialogue, max_new_tokens=12)
    assert [second] != module.generate_text([IMAGE], ["And now?"], max_new_tokens=12)
    assert chat.turns == [("What?", first), ("And now?", second)]
    chat.reset()
    assert chat.ask("What?") == first
    other = Image.effect_noise((40, 30), 90).convert("RGB")
    chat.show(other)
    assert chat.turns == []
    assert [chat.ask("What?")] == module.generate_text([other], ["What?"], max_new_tokens=12)


def test_text_alone_and_too_long_a_dialogue(module: ZooModule) -> None:
    chat = Chat(module.model, Decoding(max_new_tokens=4))
    assert chat.ask("Who are you?") == chat.turns[0][1]
    with pytest.raises(DataError, match="shorten the prompt"):
        chat.ask("far " * 200)
    assert len(chat.turns) == 1


@pytest.mark.parametrize("name", ["clip", "blip-caption"])
def test_models_without_dialogues_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="holds no dialogues"):
        Chat(zoo.build(name, scale="tiny").model)


class Spelling:
    """A processor whose ids are bytes and whose answers end at ``###``."""

    class layout:
        stop = "###"

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace").split("###", 1)[0].strip()


def test_nothing_told_is_taken_back() -> None:
    pieces: list[str] = []
    teller = _Pieces(Spelling(), pieces.append)
    text = " wörld 😀 a#b ## c###".encode()
    for byte in text:
        teller(torch.tensor([byte]))
        assert "\ufffd" not in "".join(pieces)
    assert teller.end(list(text)) == "".join(pieces) == "wörld 😀 a#b ## c"
