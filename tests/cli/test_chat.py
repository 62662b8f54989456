"""zoo chat and zoo show --template, as on the command line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

import zoo
from zoo.cli import main
from zoo.cli.commands.chat import lines, talk
from zoo.cli.template import at_hand, line
from zoo.errors import ConfigError
from zoo.weights import save


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    return str(path)


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


TALK = "What?\n\n/reset\nWhat?\nAnd now?\n/image {picture}\nWhat?\n/quit\nnever asked\n"


def test_dialogue_over_a_pipe(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = zoo.build("llava", scale="tiny", seed=2)
    save(module, module.recipe, tmp_path / "weights")
    loaded = zoo.from_pretrained(tmp_path / "weights")
    expected = loaded.generate_text([picture], ["What?"], max_new_tokens=6)[0]
    piped(monkeypatch, TALK.format(picture=picture))
    assert main(["chat", str(tmp_path / "weights"), "--image", picture, "--max-new-tokens", "6"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 4
    assert [answers[i] for i in (0, 1, 3)] == [expected] * 3


def test_recipe_by_name_says_that_it_learned_nothing(
    picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "What?\n")
    assert main(["chat", "llava", "scale=tiny", "--image", picture, "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr()
    assert len(out.out.splitlines()) == 1
    assert "llava: new weights" in out.err


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["llava", "scale=tiny"], "/imag x\n", "unknown command '/imag'; did you mean /image?"),
        (["llava", "scale=tiny"], "/image nowhere.png\n", "no image nowhere.png"),
        (["llava", "scale=tiny"], "/image\n", "/image needs a FILE"),
        (["llava", "scale=tiny", "--image", "nowhere.png"], "", "no image nowhere.png"),
        (["llava"], "", "none of them trained"),
        (["lava-x"], "", "no folder or file 'lava-x'"),
        (["clip", "scale=tiny"], "", "clip writes no text"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    text: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    piped(monkeypatch, text)
    assert main(["chat", *arguments]) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_checkpoints_take_no_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path), "scale=tiny"]) == 2
    assert "can be said of a recipe's name only" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Refusing:
    def ask(self, question: str, tell: object) -> str:
        raise ConfigError(f"no answer to {question}")


def test_at_a_terminal_a_mistake_does_not_end_the_dialogue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["one", "two", "/quit", "three"])
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    talk(Refusing())
    out = capsys.readouterr()
    assert out.err.splitlines() == ["error: no answer to one", "error: no answer to two"]
    assert "/image FILE" in out.out
    assert next(lines(False)) == "three"


# -- the template --------------------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["show", *arguments, "--template"]) == 0
    return capsys.readouterr().out.splitlines()


def test_template_of_every_stage_token_by_token(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "llava", "scale=tiny")
    heads = [row for row in out if row.startswith("stage ")]
    assert heads == ["stage align (template plain)", "stage instruct (template llava_v1)"]
    captions = [row for row in out if row.startswith("  caption")]
    assert "<bos>|<image> x 16[a| red|" in captions[0]
    assert captions[0].endswith("\\n]")
    assert captions[1].endswith("<eos>]")
    dialogue = [row for row in out if row.startswith("  dialogue")][1]
    assert dialogue.count("<eos>]") == 2
    assert dialogue.count("<image> x 16") == 1


def test_template_without_network_stands_in_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "llava-1.5", "decoder.tokenizer=hf:nobody/has-this")
    told = [row for row in out if "is not on this machine" in row]
    assert told == [
        "the tokenizer hf:nobody/has-this of decoder is not on this machine; shown with openmoji-bpe of scale=tiny"
    ]
    assert any("<image> x 576" in row for row in out)


def test_template_of_an_encoder_decoder_shows_both_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "blip2-flan-t5", "scale=tiny")
    read = next(row for row in out if row.startswith("  caption, read"))
    written = next(row for row in out if row.startswith("  caption, written"))
    assert "0 trained" in read
    assert "<image> x 16" in read
    assert written.endswith("<eos>]")


def test_template_of_a_model_without_prompts_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("clip", "clip reads no prompts"), ("qformer", "only whole models have a template")):
        assert main(["show", name, "--template"]) == 2
        assert message in capsys.readouterr().err


def test_tokens_carry_what_is_trained() -> None:
    from zoo.data.text import named_tokenizer

    tokenizer = named_tokenizer("openmoji-bpe")
    (ids,) = tokenizer.encode(["cat"])
    text = line("x", [1, 1000, 1000, *ids, 2], [False] * 3 + [True] * (len(ids) + 1), tokenizer, 1000)
    assert "<bos>|<image> x 2[" in text.plain
    assert text.plain.endswith("|<eos>]")
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    assert green == "cat<eos>"
    assert at_hand("openmoji-bpe")
    assert not at_hand("hf:nobody/has-this")
