"""The official files: what is read of them, and that a wrong or damaged one is refused in one line that names the place."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from helpers.evaluation_model import DATA, TASKS

from pangu.errors import InputError
from pangu.evaluation.examples import Example
from pangu.evaluation.readers import READERS, read_examples
from pangu.evaluation.tasks import find_files, load_tasks

LOADED = load_tasks()
PAPER = [name for name, task in LOADED.items() if task.paper]


def read(name: str, part: str = "evaluate") -> list[Example]:
    files = find_files(LOADED[name], DATA / name)
    return read_examples(LOADED[name], getattr(files, part))


def filled(example: Example, template: str) -> list[str]:
    return [template.format(**example.fields, word=choice.word) for choice in example.choices]


def test_there_are_the_seventeen_tasks_of_the_paper() -> None:
    assert len(PAPER) == 17 and [*sorted(LOADED)] == TASKS
    assert {task.reader for task in LOADED.values()} == set(READERS)
    for name in PAPER:
        task = LOADED[name]
        assert read(name) and (name == "wplc" or read(name, "train"))
        assert all(len(task.paper[key]) == 2 for key in ("zero", "few")) if task.paper else False


def test_cmrc2018_in_both_forms(tmp_path: Path) -> None:
    own = read("cmrc2018")
    assert [example.answers for example in own] == [("周", "姓周"), ("清晨五点", "五点", "每天清晨五点"), ("八十人", "80人", "八十")]
    assert own[0].fields["question"] == "茶馆的主人姓什么？" and own[0].fields["document"].startswith("青溪镇")
    data = [
        {
            "paragraphs": [
                {
                    "context": example.fields["document"],
                    "qas": [{"id": example.id, "question": example.fields["question"], "answers": [{"text": a} for a in example.answers]}],
                }
            ]
        }
        for example in own
    ]
    (tmp_path / "dev.json").write_text(json.dumps({"version": "v1.0", "data": data}), "utf-8")
    assert read_examples(LOADED["cmrc2018"], [tmp_path / "dev.json"]) == own


def test_dureader_takes_the_most_related_paragraph_of_the_selected_document() -> None:
    first, second = read("dureader")  # a third has no answers
    assert first.fields["document"].startswith("茶叶要放在") and len(first.answers) == 2
    assert second.fields["document"].startswith("面团发不起来")


def test_webqa_gathers_the_answers_of_all_evidences() -> None:
    assert [example.answers for example in read("webqa")] == [("周",), ("一九六二年", "1962年")]


def test_clozes_are_joined_up_to_their_blank() -> None:
    examples = read("pd_cft")
    assert [example.subset for example in examples] == ["pd.test", "pd.test", "cft.test.human", "cft.test.auto"]
    assert examples[0].fields == {"before": "青溪镇的老街修好了。老街两边种了桂树。来老街喝茶的", "after": "多了起来。"}
    assert examples[0].answers == ("游客",)
    assert [example.answers for example in read("cmrc2017")] == [("梨树",), ("船",)]
    assert read("cmrc2017")[1].fields == {"before": "小船漂到了岸边。", "after": "里坐着一只猫。"}


def test_latin_words_of_a_segmented_text_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "pd.test").write_text("1 ||| 他 用 Windows 10 写 了 XXXXX 。 ||| 信\n", "utf-8")
    [example] = read_examples(LOADED["pd_cft"], [tmp_path / "pd.test"])
    assert example.fields["before"] == "他用Windows 10写了"


def test_chid_has_one_example_a_blank() -> None:
    examples = read("chid")
    assert [example.choices[example.gold].word for example in examples] == ["画蛇添足", "胸有成竹", "半途而废", "亡羊补牢"]
    assert examples[2].fields == {"before": "动笔之前他早已____，画起来一点也不", "after": "，决不会停下。"}


def test_cmrc2019_has_one_example_a_blank() -> None:
    first, second = read("cmrc2019")
    assert first.choices[first.gold].word == "它在路口遇见了乌龟" and len(first.choices) == 3
    assert second.fields == {"before": "小猫出门找朋友。，它们一起走到河边。河上没有桥，", "after": "。天黑以前，它们都回到了家。"}


def test_labels() -> None:
    assert len(read("cmnli")) == 4  # a fifth has the label "-"
    assert [choice.word for choice in read("ocnli")[0].choices] == ["对", "或许", "错"]
    assert len(read("tnews")[0].choices) == 15 and read("tnews")[1].choices[read("tnews")[1].gold].word == "汽车"
    assert [choice.word for choice in read("iflytek")[0].choices] == sorted(["打车", "地图导航", "运动健身", "医疗", "教育", "记账"])
    assert read("csl")[0].fields["keyword"] == "茶叶、储存温度、香气"
    assert [example.gold for example in read("afqmc")] == [1, 0, 0]


def test_cluewsc_puts_the_noun_in_the_pronouns_place() -> None:
    texts = [filled(example, "{before}{word}{after}") for example in read("cluewsc2020")]
    assert texts[0] == ["周师傅把壶递给林秋，因为林秋口渴了。", "周师傅把壶递给林秋，因为她口渴了。"]
    assert [example.gold for example in read("cluewsc2020")] == [0, 1, 0]


def test_c3() -> None:
    examples = read("c3")
    assert [(example.subset, len(example.choices)) for example in examples] == [("d-dev", 3), ("m-dev", 2), ("m-dev", 4)]
    assert examples[0].fields["document"] == "女：你几点到的茶馆？\n男：五点，门刚开。"


def test_a_test_split_without_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text('{"sentence1": "甲", "sentence2": "乙", "id": 0}\n', "utf-8")
    with pytest.raises(InputError, match=r"test\.json:1: 'label' expected, the keys sentence1, sentence2, id found"):
        read_examples(LOADED["afqmc"], [tmp_path / "test.json"])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of cmrc2018_dev\.json, dev\.json is in it"):
        find_files(LOADED["cmrc2018"], tmp_path)
    with pytest.raises(InputError, match="not found"):
        find_files(LOADED["cmrc2018"], tmp_path / "nowhere")
    shutil.copy(DATA / "chid/dev.json", tmp_path)
    with pytest.raises(InputError, match=r"dev_answer\.json: not found"):
        read_examples(LOADED["chid"], [tmp_path / "dev.json"])


@pytest.mark.parametrize("name", PAPER)
def test_the_file_of_another_task_is_refused(name: str) -> None:
    others = {find_files(LOADED[other], DATA / other).evaluate[0] for other in PAPER if LOADED[other].reader != LOADED[name].reader}
    for path in others:
        with pytest.raises(InputError) as refused:
            read_examples(LOADED[name], [path])
        assert "\n" not in str(refused.value) and str(path.parent) in str(refused.value)


@pytest.mark.parametrize("name", PAPER)
def test_damage_is_refused_or_read_but_never_a_traceback(name: str, tmp_path: Path) -> None:
    """Cut off, flipped, of other types: whatever happens to the bytes or to a value, there are examples or one line."""
    rng, task = random.Random(name), LOADED[name]
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    refused = 0
    for path in find_files(task, folder).evaluate:
        whole = path.read_bytes()
        damaged = [whole[: rng.randrange(len(whole))] for _ in range(8)] + [b"", b"\xff" + whole, b"[" * 100_000, b"null", b"{}\n", b"[1]"]
        for _ in range(30):
            at = rng.randrange(len(whole))
            damaged.append(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        values = list(re.finditer(rb'("[^"]*"|\d+)(?=[,\]}\s])', whole))
        for match in rng.sample(values, min(30, len(values))):
            for value in (b"null", b"[]", b"{}", b"true", b"-1", b"99999", b'"\\ud800"'):
                damaged.append(whole[: match.start()] + value + whole[match.end() :])
        for data in damaged:
            path.write_bytes(data)
            try:
                read_examples(task, [path])
            except InputError as error:
                assert "\n" not in str(error) and path.name in str(error)
                refused += 1
        path.write_bytes(whole)
    assert refused > 10


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"span2_text": "他"}, "the text at character 12 expected, '他' found"),
        ({"span2_index": 13}, "the text at character 13 expected, '她' found"),
        ({"span2_index": 99}, "a number of 0 to 17 expected, '99' found"),
        ({"span1_text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_pronoun_that_is_not_where_it_should_be_is_refused(line: dict[str, str | int], said: str, tmp_path: Path) -> None:
    whole = json.loads((DATA / "cluewsc2020/dev.json").read_text("utf-8").splitlines()[0])
    (tmp_path / "dev.json").write_text(json.dumps({**whole, "target": {**whole["target"], **line}}), "utf-8")
    with pytest.raises(InputError, match=re.escape(said)):
        read_examples(LOADED["cluewsc2020"], [tmp_path / "dev.json"])
