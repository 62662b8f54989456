from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import zoo
from tests.data.public.conftest import coco_name, picture
from zoo.data.public.pope import PopeSetConfig
from zoo.data.public.questions import GqaConfig, Vqav2Config
from zoo.errors import ConfigError, DataError
from zoo.evaluation.run import evaluate
from zoo.plugin import catalogue

Write = Callable[[str, Any], Path]


def vqa(subset: str, images: Sequence[int], asked: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """The questions and annotations of a VQAv2 file."""
    head = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": subset, "license": {}}
    questions, annotations = [], []
    for n in images:
        for k in range(asked):
            id = n * 1000 + k
            said = ["red"] * 6 + ["dark red", "blue", "blue", "green"] if k % 2 else ["yes"] * 8 + ["no", "no"]
            questions.append({"image_id": n, "question": f"Question {k} of {n}?", "question_id": id})
            answers = [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(said)]
            annotations.append(
                {"question_type": "what", "multiple_choice_answer": said[0], "answers": answers, "image_id": n,
                 "answer_type": "other" if k % 2 else "yes/no", "question_id": id}
            )  # fmt: skip
    return (
        {**head, "task_type": "Open-Ended", "questions": questions},
        {**head, "annotations": annotations[::-1]},  # joined by id, not by place
    )


@pytest.fixture
def vqav2(coco: Path, write: Write) -> Path:
    for subset, images in (("train2014", range(1, 11)), ("val2014", (101, 103, 102))):
        questions, annotations = vqa(subset, images)
        write(f"coco/v2_OpenEnded_mscoco_{subset}_questions.json", questions)
        write(f"coco/v2_mscoco_{subset}_annotations.json", annotations)
    return coco


TRAIN, VAL = (f"v2_OpenEnded_mscoco_{s}_questions.json" for s in ("train2014", "val2014"))


def test_vqav2_joins_questions_answers_and_images(vqav2: Path) -> None:
    source = Vqav2Config(root=str(vqav2), train=TRAIN, test=VAL).build()
    assert source.ids("test") == ["101", "103", "102"]
    assert source.ids("val") == []
    sample = source.sample("103")
    assert sample.image is not None
    assert sample.image.size == picture(103).size
    first, second = sample.meta["questions"]
    assert (first["id"], first["question"], first["type"]) == ("103000", "Question 0 of 103?", "yes_no")
    assert second["answers"] == (*["red"] * 6, "dark red", "blue", "blue", "green")
    assert sample.meta["turns"] == (("Question 0 of 103?", "yes"), ("Question 1 of 103?", "red"))
    assert (sample.texts, sample.meta["cluster"], sample.meta["format"]) == (("yes", "red"), "103", "short")


def test_a_share_of_train_can_be_val_and_questions_can_stand_alone(vqav2: Path) -> None:
    whole = Vqav2Config(root=str(vqav2), train=TRAIN, test=VAL).build()
    source = Vqav2Config(root=str(vqav2), train=TRAIN, test=VAL, val_fraction=0.4, turns=1).build()
    train, val = source.ids("train"), source.ids("val")
    assert {i.partition("#")[0] for i in train} | {i.partition("#")[0] for i in val} == set(whole.ids("train"))
    assert not {i.partition("#")[0] for i in train} & {i.partition("#")[0] for i in val}
    assert train
    assert val
    assert source.ids("test") == ["101", "101#2", "103", "103#2", "102", "102#2"]
    alone = source.sample("103#2")
    assert (len(alone.meta["questions"]), alone.meta["cluster"], alone.texts) == (1, "103", ("red",))
    only = Vqav2Config(root=str(vqav2), train=TRAIN, val_fraction=0.4, splits="val").build()
    assert [i.partition("#")[0] for i in val][::2] == only.ids("val")


class Says:
    """A model that gives one answer to everything and remembers what it was asked."""

    def __init__(self, answer: str | Callable[[str], str]) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def generate_text(self, images: Any, prompts: Any = None, max_new_tokens: int = 32) -> list[str]:
        self.asked += prompts
        return [self.answer if isinstance(self.answer, str) else self.answer(p) for p in prompts]


def asked_by(task: str, model: Any, source: Any, folder: Path, **fields: Any) -> tuple[dict[str, float], list[Any]]:
    import pyarrow.parquet as pq

    report = evaluate(model, source, "test", [catalogue()["task"].parse(task, fields, task).build()], folder)
    return report["metrics"][task], pq.read_table(folder / "items" / f"{task}.parquet").to_pylist()


def test_vqa_accuracy_with_ten_answers(vqav2: Path, tmp_path: Path) -> None:
    source = Vqav2Config(root=str(vqav2), test=VAL).build()
    found, rows = asked_by("question-answering", Says("blue"), source, tmp_path / "a")
    # two of ten said blue: (8 * 2/3 + 2 * 1/3) / 10 of half of the questions
    assert found["accuracy"] == pytest.approx(0.3)
    assert (found["accuracy_other"], found["accuracy_yes_no"]) == (pytest.approx(0.6), 0.0)
    assert [row["item"] for row in rows[:3]] == ["101000", "101001", "103000"]
    assert {row["cluster"] for row in rows} == {"101", "102", "103"}
    found, _ = asked_by("question-answering", zoo.build("llava", scale="tiny").model, source, tmp_path / "b",
                        max_new_tokens=3)  # fmt: skip
    assert (found["questions"], found["images"]) == (6.0, 3.0)


def test_vqav2_layouts(vqav2: Path, write: Write) -> None:
    questions, annotations = vqa("val2014", (101,))

    def fails(reason: str, q: Any = questions, a: Any = annotations, **fields: Any) -> None:
        write("coco/q_questions.json", q)
        write("coco/q_annotations.json", a)
        fields = {"root": str(vqav2), "test": "q_questions.json", "max_bad": 0, **fields}
        with pytest.raises((ConfigError, DataError), match=reason) as error:
            Vqav2Config(**fields).build()
        assert "\n" not in str(error.value)

    fails("has no key 'questions'", annotations)
    fails("has no key 'annotations'", questions, questions)
    fails("has no key 'data_subtype'", {"questions": questions["questions"]})
    broken = copy.deepcopy(questions)
    del broken["questions"][0]["image_id"]
    fails("has no key 'image_id'", broken)
    fails("has no annotation", a={"annotations": annotations["annotations"][:1]})
    fails("answers must be a list", a={"annotations": [{"question_id": 101000, "answers": [1]}]})
    fails("'v2_none.json' does not exist", test="v2_none.json")
    fails("needs data.train=FILE", test="")
    fails("the image '101' of data.test=q_questions.json is also in the val split", val="q_questions.json")
    fails("val_fraction", val_fraction=1.0)
    fails("data.turns", turns=-1)
    (vqav2 / "v2_mscoco_val2014_annotations.json").unlink()
    fails("set data.test_annotations", test=VAL)
    write("coco/q_annotations.json", annotations)
    named = Vqav2Config(root=str(vqav2), test="q_questions.json", test_annotations="q_annotations.json").build()
    assert named.ids("test") == ["101"]


def gqa(images: Sequence[int], start: int = 0) -> dict[str, Any]:
    """A GQA file of balanced questions."""
    return {
        f"{start + n:08d}": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "bird (329774)"}],
            "entailed": [], "equivalent": [f"{start + n:08d}"], "question": f"What is this bird called, {n}?",
            "imageId": str(image), "isBalanced": True, "groups": {"global": None, "local": "13-bird_sky"},
            "answer": "parrot", "semanticStr": "select: bird (329774)->query: name [0]",
            "annotations": {"answer": {"0": "329774"}, "question": {"4": "329774"}, "fullAnswer": {}},
            "types": {"detailed": "categoryThis", "semantic": "cat", "structural": "query"},
            "fullAnswer": "This is a parrot.",
        }
        for n, image in enumerate(images)
    }  # fmt: skip


@pytest.fixture
def birds(tmp_path: Path, write: Write) -> Path:
    (tmp_path / "gqa/images").mkdir(parents=True)
    for n in range(5):
        picture(n).save(tmp_path / f"gqa/images/240572{n}.jpg")
    write("gqa/testdev_balanced_questions.json", gqa([2405720, 2405721, 2405720]))
    write("gqa/train_all_questions/train_all_questions_0.json", gqa([2405722], 100))
    write("gqa/train_all_questions/train_all_questions_1.json", gqa([2405723, 2405722], 200))
    return tmp_path / "gqa"


def test_gqa(birds: Path, tmp_path: Path) -> None:
    fields = {"root": str(birds), "train": "train_all_questions", "test": "testdev_balanced_questions.json"}
    source = GqaConfig(**fields).build()  # type: ignore[arg-type]
    assert (source.ids("train"), source.ids("test")) == (["2405722", "2405723"], ["2405720", "2405721"])
    assert [q["id"] for q in source.sample("2405722").meta["questions"]] == ["00000100", "00000201"]
    assert source.sample("2405721").meta["turns"] == (("What is this bird called, 1?", "parrot"),)
    full = GqaConfig(**fields, answers="full").build()  # type: ignore[arg-type]
    sample = full.sample("2405721")
    assert (sample.texts, sample.meta["questions"][0]["answer"]) == (("This is a parrot.",), "parrot")
    assert "format" not in sample.meta
    found, rows = asked_by("question-answering", Says("Parrot."), source, tmp_path / "a")
    assert (found["accuracy"], found["exact_match"], len(rows)) == (1.0, 1.0, 3)


def test_gqa_layouts(birds: Path, write: Write) -> None:
    good = gqa([2405720, 2405721])
    first = next(iter(good))
    for value, reason in (
        ([], "holds no object of questions"),
        ({first: {k: v for k, v in good[first].items() if k != "imageId"}}, "has no key 'imageId'"),
        ({first: {**good[first], "answer": ""}}, "answer must be a text"),
        ({first: {**good[first], "imageId": "7"}}, "the image '7.jpg' is missing"),
        ("x", "cannot be read as JSON"),
    ):
        write("gqa/q.json", value)
        with pytest.raises(DataError, match=reason) as error:
            GqaConfig(root=str(birds), test="q.json", max_bad=0).build()
        assert "\n" not in str(error.value)
    (birds / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.json file"):
        GqaConfig(root=str(birds), test="empty").build()
    with pytest.raises(ConfigError, match="expected short or full"):
        GqaConfig(root=str(birds), test="q.json", answers="long").build()


def pope_lines(setting: str, images: Sequence[int]) -> str:
    """A POPE file: what is there is asked in every setting, what is missing is the setting's own or everybody's."""
    import json

    rows: list[dict[str, Any]] = []
    for n in images:
        for name, label in (("snowboard", "yes"), ("person", "yes"), (setting, "no"), ("car", "no")):
            text = f"Is there a {name} in the image?"
            rows.append({"question_id": len(rows) + 1, "image": coco_name("val2014", n), "text": text, "label": label})
    return "\n".join(map(json.dumps, rows)) + "\n"


@pytest.fixture
def pope(coco: Path, write: Write) -> Path:
    for setting in ("random", "popular", "adversarial"):
        write(f"pope/coco_pope_{setting}.json", pope_lines(setting, (101, 102, 103)))
    return coco


def test_pope_asks_the_sets_own_questions(pope: Path, tmp_path: Path) -> None:
    source = PopeSetConfig(root=str(pope), file=str(tmp_path / "pope")).build()
    assert len(source.ids("test")) == 3
    assert source.ids("train") == []
    questions = source.sample(source.ids("test")[0]).meta["questions"]
    assert len(questions) == 6
    assert questions[0]["settings"] == ["random", "popular", "adversarial"]
    model = Says(lambda p: "No, there is not." if "adversarial" in p or "person" in p else "Yes.")
    found, rows = asked_by("pope", model, source, tmp_path / "a", items=0)
    assert sorted(set(model.asked))[0] == "Is there a adversarial in the image?"
    assert (len(rows), sum(row["asked"] for row in rows)) == (18, 36.0)  # 12 questions in each of three files
    # of each four: snowboard right, person wrong, car wrong, the setting's own right in one setting
    assert (found["accuracy_random"], found["accuracy_popular"]) == (0.25, 0.25)
    assert (found["accuracy_adversarial"], found["yes_ratio_adversarial"]) == (0.5, 0.5)
    assert (found["recall"], found["yes_ratio_random"]) == (0.5, 0.75)
    assert found["precision_adversarial"] == 0.5
    assert len({row["cluster"] for row in rows}) == 3
    alone, rows = asked_by("question-answering", Says("yes"), source, tmp_path / "b", items=0)
    assert alone["accuracy"] == pytest.approx(2 / 6)
    tiny, _ = asked_by("pope", zoo.build("llava", scale="tiny").model, source, tmp_path / "c", max_new_tokens=2)
    assert tiny["questions"] == 18.0


def test_one_setting_repeats_and_layouts_of_pope(pope: Path, write: Write, tmp_path: Path) -> None:
    line = pope_lines("random", (101,)).splitlines()[0]
    twice = write("p/coco_pope_popular.json", "\n".join([line, line, line.replace("yes", "no").replace("sn", "n")]))
    source = PopeSetConfig(root=str(pope), file=str(twice)).build()
    found, rows = asked_by("pope", Says("yes"), source, tmp_path / "a")
    assert (found["accuracy_popular"], found["accuracy"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert "accuracy_random" not in found
    assert len(rows) == 2  # one of them counts twice
    for name, text, reason in (
        ("p/coco_pope_random.json", '{"question": "x"}\n', "has no key 'image'"),
        ("p/coco_pope_random.json", line.replace('"yes"', '"maybe"'), "label must be yes or no"),
        ("p/coco_pope_random.json", "[1", "line 1 of 'coco_pope_random.json' is no JSON"),
        ("p/other.json", line, "names that end in _random.json"),
        ("p/coco_pope_random.json", line.replace("101", "999"), "is missing"),
    ):
        with pytest.raises(DataError, match=reason) as error:
            PopeSetConfig(root=str(pope), file=str(write(name, text)), max_bad=0).build()
        assert "\n" not in str(error.value)
    write("pope/gqa_pope_random.json", line)
    with pytest.raises(DataError, match="a folder of their own"):
        PopeSetConfig(root=str(pope), file=str(tmp_path / "pope")).build()
