"""Texts for the model: the paper's templates, few-shot examples in front, what is cut, what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.evaluation_model import DATA

from pangu.evaluation.prompts import PromptBuilder, Query
from pangu.evaluation.readers import read_examples
from pangu.evaluation.tasks import find_files, load_tasks

LOADED = load_tasks()


def build(name: str, number: int = 0, **changes: Any) -> Query:
    """The query of an example, one character counting as a token."""
    task, files = LOADED[name], find_files(LOADED[name], DATA / name)
    settings: dict[str, Any] = {"shots": 0, "score": "suffix", "seed": 1, "count": len, "budget": 10_000, **changes}
    train = read_examples(task, files.train) if files.train else []
    return PromptBuilder(task, train, **settings).build(read_examples(task, files.evaluate)[number], number)


def by_label(query: Query) -> dict[str, tuple[str, str]]:
    return {choice.word: (text.context, text.scored) for choice, text in zip(query.example.choices, query.texts, strict=True)}


# Table 7 of the paper, with what tests/data holds.
EXPECTED = {
    "cmnli": ("他每天五点开门?对，", "他起得很早"),
    "ocnli": ("渡船冬天停航?或许，", "冬天坐不了渡船"),
    "tnews": ("这是关于体育的文章：", "青溪队三比一赢下最后一场球"),
    "iflytek": ("这是关于打车的应用程序：", "输入出发地和目的地，附近的司机马上来接您，行程可以分享给家人。"),
    "afqmc": ("下面两个句子语义相同：", "怎么修改密码。密码在哪里改"),
    "csl": (
        "摘要：本文研究茶叶储存温度对香气的影响，结果表明低温干燥可延长保存时间。，关键词：茶叶、储存温度、香气",
        "是真实关键词",
    ),
    "cluewsc2020": ("周师傅把壶递给林秋，因为林秋", "口渴了。"),
    "c3": ("问: 男的几点到茶馆？\n答:五点\n该答案来自对话: ", "女：你几点到的茶馆？\n男：五点，门刚开。"),
    "chid": ("他已经写完了，又加上两段空话，真是", "画蛇添足。"),
    "cmrc2019": ("小猫出门找朋友。", "它在路口遇见了乌龟，它们一起走到河边。河上没有桥，。天黑以前，它们都回到了家。"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_choices_are_worded_as_in_the_paper(name: str) -> None:
    context, scored = EXPECTED[name]
    assert (context, scored) in by_label(build(name)).values()
    assert ("", context + scored) in by_label(build(name, score="full")).values()


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("drcd", "阅读文章：白鷺島位於海灣北側，島上有一座燈塔，由三兄弟輪流看守。燈塔每夜點亮十二小時。\n问：燈塔由誰看守？\n答："),
        ("webqa", "问：青溪镇茶馆的主人姓什么？\n答："),
        ("pd_cft", "青溪镇的老街修好了。老街两边种了桂树。来老街喝茶的"),
    ],
)
def test_prompts_are_worded_as_in_the_paper(name: str, prompt: str) -> None:
    [text] = build(name).texts
    assert (text.context, text.scored) == (prompt, "")


def test_solved_examples_stand_in_front() -> None:
    [text] = build("webqa", shots=2).texts
    first, second = "问：白果小学的校长是谁？\n答：林秋\n", "问：灯塔由谁看守？\n答：三兄弟\n"
    question = "问：青溪镇茶馆的主人姓什么？\n答："
    assert text.context in (first + second + question, second + first + question)
    query = build("afqmc", shots=1, score="full")
    assert query.shots == 1
    for text in query.texts:  # they are given, whatever is scored
        assert text.context.startswith("下面两个句子语义") and text.context.endswith("\n") and text.scored.startswith("下面两个句子语义")
    assert build("pd_cft", shots=1).texts[0].context.split("\n")[0] in (
        "白果小学有了新桌子。桌子是木匠陈安做的。",
        "茶馆五点开门。周师傅每天烧水。",
    )


RIGHT = ["news_sports", "news_car", "news_agriculture", "news_entertainment"]


def test_draws_depend_on_seed_and_example_alone() -> None:
    one, again, other = build("tnews"), build("tnews"), build("tnews", seed=2)
    assert one == again
    assert {choice.label for choice in one.example.choices} != {choice.label for choice in other.example.choices}
    for number in range(4):
        query = build("tnews", number)
        assert len({choice.label for choice in query.example.choices}) == 4
        assert query.example.choices[query.example.gold].label == RIGHT[number]
    places = {build("cmnli", seed=seed).example.gold for seed in range(20)}
    assert places == {0, 1, 2}


def test_examples_that_do_not_fit_are_left_out() -> None:
    whole = build("webqa", shots=2)
    length = len(whole.texts[0].context)
    for budget, shots in ((length, 2), (length - 1, 1), (len(build("webqa").texts[0].context), 0)):
        query = build("webqa", shots=2, budget=budget)
        assert query.shots == shots and len(query.texts[0].context) <= budget and not query.is_cut


def test_a_long_text_is_cut_at_its_end_and_a_cloze_at_its_beginning() -> None:
    whole = build("cmrc2018").texts[0].context
    query = build("cmrc2018", budget=len(whole) - 10, shots=1)
    assert query.is_cut and query.shots == 0
    document = "青溪镇在山的南边，镇里有一条老街。老街的尽头是一家茶馆，主人姓周，今年七十岁。每天清晨五点，周师傅就开门烧水。"
    assert query.texts[0].context == whole.replace(document, document[:-10])
    assert build("pd_cft", budget=4).texts[0].context == "街喝茶的"


def test_all_choices_see_the_same_cut() -> None:
    query = build("tnews", budget=20)
    assert query.is_cut and len({text.scored for text in query.texts}) == 1
    assert max(len(text.context + text.scored) for text in query.texts) == 20


def test_a_pronoun_at_the_end_is_scored_with_its_text() -> None:
    task = LOADED["cluewsc2020"]
    [example] = [one for one in read_examples(task, [DATA / "cluewsc2020/dev.json"]) if one.id == "0"]
    ending = type(example)("0", {"before": "那是", "after": ""}, example.choices, 0)
    query = PromptBuilder(task, [], 0, "suffix", 1, len, 100).build(ending, 0)
    assert sorted((text.context, text.scored) for text in query.texts) == [("", "那是她"), ("", "那是林秋")]


def test_the_document_says_what_is_done() -> None:
    page = (DATA.parents[1] / "docs/evaluation.md").read_text("utf-8")
    rows = {name: row for row in page.splitlines() if row.startswith("| ") and (name := row.split(" | ")[0][2:]) in LOADED}
    assert len(rows) == 17
    for name, row in rows.items():
        task = LOADED[name]
        assert task.paper
        text = task.prompt if task.kind == "generate" else f"{task.context}▸{task.scored}"
        settings = [f"{key} {value}" for key, value in task.decoding.items() if key != "max_new_tokens"]
        files = [file for part in ("evaluate", "train") for file in task.files[part]]
        for part in ("`" + text.replace("\n", "\\n") + "`", *settings, *files, *task.paper["zero"], *task.paper["few"]):
            assert part in row, (name, part)
