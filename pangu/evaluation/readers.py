"""Reads the official files of the tasks as examples. tasks.yaml says which function reads which task; docs/evaluation.md has the table.

Each takes the task and one file, and yields examples in the file's order, or raises InputError naming the place that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pangu.errors import InputError
from pangu.evaluation.examples import Choice, Example, Place, read_json, read_json_lines, read_text
from pangu.evaluation.tasks import Task
from pangu.text.documents import documents, input_size, read_blocks

BLANK = "XXXXX"


def read_examples(task: Task, paths: Sequence[Path]) -> list[Example]:
    """All examples in the given files.

    Raises:
        InputError: if a file is not of this task, is damaged, or holds no example.
    """
    examples: list[Example] = []
    for path in paths:
        found = list(READERS[task.reader](task, path))
        if not found:
            raise InputError(f"{path}: holds no example of {task.name}. Is it the file of this task, and whole?")
        examples += found
    return examples


def squad(task: Task, path: Path) -> Iterator[Example]:
    """CMRC 2018 in its own form and in SQuAD's, and DRCD."""
    root = read_json(path)
    if isinstance(root.value, list):
        for entry in root.items():
            for question in entry["qas"].items():
                answers = _distinct(answer.text() for answer in question["answers"].items())
                yield _question(question["query_id"], entry["context_text"], question["query_text"], answers)
        return
    for article in root["data"].items():
        for paragraph in article["paragraphs"].items():
            for question in paragraph["qas"].items():
                answers = _distinct(answer["text"].text() for answer in question["answers"].items())
                yield _question(question["id"], paragraph["context"], question["question"], answers)


def _question(identity: Place, document: Place, question: Place, answers: tuple[str, ...]) -> Example:
    if not answers:
        raise identity.refuse("a question with answers (the test split has none: take the dev split)")
    return Example(identity.text(), {"document": document.text().strip(), "question": question.text().strip()}, answers=answers)


def dureader(task: Task, path: Path) -> Iterator[Example]:
    """DuReader; the passage is the most related paragraph of the first selected document, else the first paragraph there is."""
    for line in read_json_lines(path):
        answers = _distinct(answer.text() for answer in line["answers"].items())
        found = [document for document in line["documents"].items() if list(document["paragraphs"].items())]
        if not answers or not found:
            continue  # such questions are in the official files; without them there is nothing to compare or to read
        document = next((one for one in found if "is_selected" in one and one.value["is_selected"]), found[0])
        paragraphs = list(document["paragraphs"].items())
        related = document["most_related_para"].index(len(paragraphs)) if "most_related_para" in document else 0
        yield _question(line["question_id"], paragraphs[related], line["question"], answers)


def webqa(task: Task, path: Path) -> Iterator[Example]:
    """WebQA: {id: {question, evidences: {id: {answer: [...]}}}}; the answers are those of all evidences."""
    for identity, entry in read_json(path).pairs():
        answers = []
        for _, evidence in entry["evidences"].pairs():
            given = evidence["answer"]
            answers += [answer.text() for answer in given.items()] if isinstance(given.value, list) else [given.text()]
        if kept := _distinct(answer for answer in answers if answer != "no_answer"):
            yield Example(identity, {"question": entry["question"].text().strip()}, answers=kept)


def cloze_lines(task: Task, path: Path) -> Iterator[Example]:
    """People's Daily, Children's Fairy Tale and CMRC 2017: lines `mark ||| text`, of which the last of a document has the blank.

    The answer follows in that line as a third part, or lies under the document's mark in a file that ends in `.answer`. The texts are cut
    into words by spaces, which are removed.
    """
    answers = _answers_beside(path)
    context: list[str] = []
    subset = path.name.removesuffix(".doc_query")
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split("|||")]
        text = _joined(parts[1]) if len(parts) > 1 else ""
        if BLANK not in text:
            if len(parts) != 2:
                raise InputError(f"{path}:{number}: `mark ||| text` expected, {line[:40]!r} found. Is it the file of this task, and whole?")
            context.append(text)
            continue
        answer = _joined(parts[2]) if len(parts) > 2 else answers.get(parts[0], "")
        if not answer:
            raise InputError(f"{path}:{number}: an answer to {parts[0]} expected, none found. Put the .answer file beside it.")
        before, after = text.split(BLANK, 1)
        yield Example(f"{subset}:{number}", {"before": "".join([*context, before]), "after": after}, answers=(answer,), subset=subset)
        context = []
    if context:
        raise InputError(f"{path}: the last document has no line with {BLANK}. The file was cut off: fetch it again.")


def _answers_beside(path: Path) -> dict[str, str]:
    beside = path.with_name(path.name.removesuffix(".doc_query") + ".answer")
    if not beside.is_file() or beside == path:
        return {}
    lines = [[part.strip() for part in line.split("|||")] for line in read_text(beside).split("\n") if line.strip()]
    if any(len(parts) != 2 for parts in lines):
        raise InputError(f"{beside}: lines `mark ||| answer` expected. Is it the file of this task, and whole?")
    return {mark: _joined(answer) for mark, answer in lines}


def _joined(words: str) -> str:
    """Words without the spaces between them, but for those between two Latin ones."""
    return re.sub(r"(?<![!-~])\s+|\s+(?![!-~])", "", words)


def chid(task: Task, path: Path) -> Iterator[Example]:
    """CHID as CLUE has it: passages with #idiom000000# marks, ten candidates for all of a line, the answers in `NAME_answer.json`."""
    beside = path.with_name(f"{path.stem}_answer.json")
    if not beside.is_file():
        raise InputError(f"{beside}: not found. CHID's answers lie there; the test split has none that are public.")
    answers = read_json(beside)
    for line in read_json_lines(path):
        choices = tuple(Choice(str(index), candidate.text()) for index, candidate in enumerate(line["candidates"].items()))
        for passage in line["content"].items():
            text = passage.text()
            for blank in re.finditer(r"#idiom\d+#", text):
                before, after = (re.sub(r"#idiom\d+#", task.other_blanks, part) for part in (text[: blank.start()], text[blank.end() :]))
                gold = answers[blank[0]].index(len(choices))
                yield Example(blank[0].strip("#"), {"before": before, "after": after}, choices, gold)


def cmrc2019(task: Task, path: Path) -> Iterator[Example]:
    """CMRC 2019: a passage with [BLANKn], the sentences that may fill its blanks (some fit none), and the right one of each blank."""
    for entry in read_json(path)["data"].items():
        text = entry["context"].text()
        choices = tuple(Choice(str(index), choice.text()) for index, choice in enumerate(entry["choices"].items()))
        blanks = list(re.finditer(r"\[BLANK\d+\]", text))
        answers = list(entry["answers"].items())
        if len(blanks) != len(answers):
            raise entry["answers"].refuse(f"an answer to each of the {len(blanks)} blanks")
        name = entry["context_id"].text() if "context_id" in entry else entry.where.rpartition("[")[2].strip("]")
        for blank, answer in zip(blanks, answers, strict=True):
            before, after = (re.sub(r"\[BLANK\d+\]", task.other_blanks, part) for part in (text[: blank.start()], text[blank.end() :]))
            yield Example(f"{name}:{blank[0].strip('[]')}", {"before": before, "after": after}, choices, answer.index(len(choices)))


def labelled(task: Task, path: Path) -> Iterator[Example]:
    """The classification tasks of CLUE: one object per line with some texts and a label."""
    lines = list(read_json_lines(path))
    words = dict(task.words) or _labels_beside(task, path, lines)
    choices = tuple(Choice(label, word) for label, word in words.items())
    labels = list(words)
    for number, line in enumerate(lines):
        label = line[task.label]
        if label.text() in task.ignored:
            continue
        if label.text() not in words:
            raise label.refuse(f"one of {', '.join(labels[:20])}")
        fields = {name: _text_or_list(line[name]) for name in task.fields}
        yield Example(str(number), fields, choices, labels.index(label.text()))


def _labels_beside(task: Task, path: Path, lines: Sequence[Place]) -> dict[str, str]:
    """All labels in a file and in labels.json beside it, sorted: words of themselves."""
    listed = path.with_name("labels.json")
    places = [*lines, *(read_json_lines(listed) if listed.is_file() else ())]
    return {label: label for label in sorted({place[task.label].text() for place in places})}


def _text_or_list(place: Place) -> str:
    return "、".join(item.text() for item in place.items()) if isinstance(place.value, list) else place.text().strip()


def cluewsc(task: Task, path: Path) -> Iterator[Example]:
    """CLUEWSC 2020: does the pronoun mean the noun? Two texts are compared: the noun in the pronoun's place, and the text as it is."""
    for number, line in enumerate(read_json_lines(path)):
        text, target, label = line["text"].text(), line["target"], line["label"].text()
        noun, pronoun = target["span1_text"].text(), target["span2_text"].text()
        begin = target["span2_index"].index(len(text) + 1)
        if not text.startswith(pronoun, begin) or not pronoun:
            raise target["span2_text"].refuse(f"the text at character {begin}")
        if label not in ("true", "false"):
            raise line["label"].refuse("true or false")
        fields = {"before": text[:begin], "after": text[begin + len(pronoun) :]}
        yield Example(str(number), fields, (Choice("true", noun), Choice("false", pronoun)), ("true", "false").index(label))


def c3(task: Task, path: Path) -> Iterator[Example]:
    """C3: [[sentences], [{question, choice, answer}], id] for each passage."""
    for entry in read_json(path).items():
        parts = list(entry.items())
        if len(parts) != 3:
            raise entry.refuse("[sentences, questions, id]")
        document = "\n".join(sentence.text() for sentence in parts[0].items())
        for number, question in enumerate(parts[1].items()):
            words = [choice.text() for choice in question["choice"].items()]
            if question["answer"].text() not in words:
                raise question["answer"].refuse("one of the choices")
            yield Example(
                f"{parts[2].text()}:{number}",
                {"document": document, "question": question["question"].text()},
                tuple(Choice(str(index), word) for index, word in enumerate(words)),
                words.index(question["answer"].text()),
                subset=path.stem,
            )


def wplc(task: Task, path: Path) -> Iterator[Example]:
    """WPLC: one object per line with `correct_word` and `masked_text`, where a <mask> stands for each of the word's characters.

    What follows the masks is ignored.
    """
    for number, line in enumerate(read_json_lines(path)):
        before, mask, _ = line["masked_text"].text().partition("<mask>")
        if not mask:
            raise line["masked_text"].refuse("a text with <mask>")
        yield Example(str(number), {"before": before, "word": line["correct_word"].text()})


def corpus(task: Task, path: Path) -> Iterator[Example]:
    """Any text: .txt with blank lines between documents, .jsonl with a text under `text`; see pangu.text.documents."""
    input_size(path)  # refuses what cannot be read
    texts = (text for block in read_blocks(path) for text in documents(block, "text"))
    return (Example(str(number), {"document": text}) for number, text in enumerate(texts) if text)


def _distinct(texts: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


READERS: dict[str, Callable[[Task, Path], Iterator[Example]]] = {
    reader.__name__: reader for reader in (squad, dureader, webqa, cloze_lines, chid, cmrc2019, labelled, cluewsc, c3, wplc, corpus)
}
