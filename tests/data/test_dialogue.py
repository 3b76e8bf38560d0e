"""Dialogues from JSON lists: LLaVA's layout and Groma Instruct's, from real text and by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groma import markup
from groma.data.dialogue import Dialogue, GromaInstruct, grounded_answer
from groma.data.prompts import build_prompt
from groma.data.records import AnnotationError
from groma.processor import GromaProcessor

Write = Callable[[str, Any], Path]


def llava(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_dialogue(write: Write) -> None:
    talk = llava("<image>\nWhat is\nit?", "A <r1> cup.", "Why?")
    data = Dialogue(write("c.json", [{"id": "x", "image": "a.png", "conversations": talk}, {"id": "y"}]), "/im")
    assert len(data) == 1
    assert [turn.text for turn in data[0].turns] == ["What is it?", markup.escape("A <r1> cup.")]
    assert data[0].record == "c.json#x"
    talk[1]["from"] = "human"
    with pytest.raises(AnnotationError, match=r"c.json: conversation 0, turn 1: from 'human', expected the assistant"):
        Dialogue(write("c.json", [{"id": "x", "image": "a.png", "conversations": talk}]), "/im")


def test_image_names_carry_folders(write: Write) -> None:
    names = ["coco/train2017/000000000009.jpg", "sam/images/sa_545504.jpg", "llava/llava_pretrain/images/0.jpg"]
    content = [{"id": i, "image": n, "conversations": llava("<image>", "A.")} for i, n in enumerate(names)]
    talks = [{**record, "conversations": llava("Describe it.\n<image>", "It is.")} for record in content]
    data = Dialogue(write("sharegpt4v.json", talks), "/data")
    assert [data[i].image for i in range(3)] == [f"/data/{name}" for name in names]
    assert {data[i].turns[0].text for i in range(3)} == {"Describe it."}
    with pytest.raises(AnnotationError, match=r"conversation 0, turn 0: got '<image>', expected words"):
        Dialogue(write("c.json", content), "/data")


def test_real_conversations(shared_data: Path, processor: GromaProcessor) -> None:
    file = shared_data / "groma_style_derived/llava_conversation_format.json"
    data = Dialogue(file, "/im")
    genuine = json.loads(file.read_text("utf-8"))
    assert len(data) == len(genuine) == 30
    assert data.problems == []
    for i, record in enumerate(genuine):
        said = [" ".join(turn["value"].replace("<image>", "").split()) for turn in record["conversations"]]
        assert [markup.unescape(turn.text) for turn in data[i].turns] == said
        ids = build_prompt(processor, data[i].turns).ids
        assert (ids == processor.word_id("<image>")).sum() == 1  # the template's own


def test_real_questions_and_answers_one_by_one(shared_data: Path, write: Write) -> None:
    lines = (shared_data / "llava_eval/coco2014_val_gpt4_qa_30x3.jsonl").read_text("utf-8").splitlines()
    genuine = [json.loads(line) for line in lines]
    content = [{"id": r["id"], "image": r["image"], "conversations": llava(r["instruction"] + "\n<image>", r["output"])}
               for r in genuine]  # fmt: skip
    data = Dialogue(write("qa.json", content), "/im")
    assert len(data) == 90
    assert [data[i].turns[0].text for i in range(90)] == [" ".join(r["instruction"].split()) for r in genuine]


BOWLS = "<p>two [big] bowls</p> <roi><ground_box><ground_box></roi>"
GROMA: dict[str, Any] = {
    "file_name": "a.png",
    "width": 100,
    "height": 50,
    "boxes": [[10, 5, 20, 10], [50, 0, 60, 10], [0, 0, 100, 50], [5, 5, 0, 5]],
    "conversation": [
        {"value": "What is <r1> here?", "box_inds": []},
        {"value": f"A <p>red cup</p><roi><ground_box></roi> and {BOWLS}, see <r5>.", "box_inds": [1, 0, 2]},
        {"value": "And now?"},
        {"value": "Nothing.", "box_inds": []},
    ],
}


def test_groma_instruct(write: Write, processor: GromaProcessor) -> None:
    data = GromaInstruct(write("g.json", [GROMA, {**GROMA, "id": 71}]), "/im")
    sample = data[0]
    assert [data[0].record, data[1].record, sample.image] == ["g.json#0", "g.json#71", "/im/a.png"]
    texts = [turn.text for turn in sample.turns]
    assert texts == [
        f"[grounding] {markup.escape('What is <r1> here?')}",
        f"A <p>red cup</p><roi><ground_box></roi> and <p>{markup.escape('two [big] bowls')}</p>"
        f"<roi><ground_box><ground_box></roi>, see {markup.escape('<r5>')}.",
        "[grounding] And now?",
        "Nothing.",
    ]
    expected = [[0.5, 0.0, 1.0, 0.2], [0.1, 0.1, 0.3, 0.3], [0.0, 0.0, 1.0, 1.0]]  # the first is cut to the image
    assert torch.allclose(sample.turns[1].boxes, torch.tensor(expected))
    prompt = build_prompt(processor, sample.turns)
    assert (prompt.ids == processor.word_id("<ground_box>")).sum() == len(prompt.ground_boxes) == 3
    assert (prompt.ids == processor.word_id("[grounding]")).sum() == 2
    assert not {processor.word_id(w) for w in ("<r1>", "<r5>")} & set(prompt.ids.tolist())


def answered(value: Any, box_inds: Any) -> dict[str, Any]:
    return {**GROMA, "conversation": [{"value": "What?"}, {"value": value, "box_inds": box_inds}]}


ONE = "<p>a cup</p><roi><ground_box></roi>"


@pytest.mark.parametrize(
    "record, says",
    [
        (answered(ONE, [0, 1]), "conversation 0, turn 1: 1 <ground_box> in '<p>a cup</p>"),
        (answered("A cup.", [0]), "0 <ground_box> in 'A cup.', but 1 boxes"),
        (answered(ONE, [4]), "box_inds has 4, expected indices of 4 boxes"),
        (answered(ONE, [-1]), "box_inds has -1"),
        (answered(ONE, [True]), "box_inds has True"),
        (answered(ONE, None), "box_inds = None"),
        (answered(ONE, [3]), "box 3 is [5, 5, 0, 5], expected one with an area"),
        (answered("<p>a cup</p>", []), "a lone <p> at '<p>a cup</p>'"),
        (answered("<p>a<roi><ground_box></roi>", [0]), "a lone <p>"),
        (answered("<p>a <p>b</p><roi><ground_box></roi>", [0]), "a lone <p>"),
        (answered("<p>a</p> at <roi><ground_box></roi>", [0]), "a lone <p>"),
        (answered("it <ground_box>", [0]), "a lone <ground_box>"),
        (answered("<roi></roi>", []), "a lone <roi>"),
        (answered("<roi><ground_box>", [0]), "a lone <roi>"),
        (answered("</roi><roi><ground_box>", [0]), "a lone </roi>"),
        (answered(" ", []), "an answer without a word"),
        (answered(7, []), "value = 7"),
        ({**GROMA, "conversation": GROMA["conversation"][:3]}, "conversation 0: 3 turns, expected pairs"),
        ({**GROMA, "conversation": []}, "0 turns"),
        ({**GROMA, "conversation": ["?", "!"]}, "got '?'"),
        ({**GROMA, "boxes": [[1, 2, 3]] * 3}, "turn 1: record 1: bbox [1, 2, 3], expected four numbers"),
        ({**GROMA, "width": 0}, "size 0 x 50"),
        ({"file_name": "a.png"}, "no 'boxes'"),
        ([], "got []"),
    ],
)
def test_bad_groma_instruct(write: Write, record: Any, says: str) -> None:
    path = write("g.json", [record])
    with pytest.raises(AnnotationError) as error:
        GromaInstruct(path, "/im")
    assert says in str(error.value)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    with pytest.raises(AnnotationError, match="expected a list"):
        GromaInstruct(write("object.json", {}), "/im")
    rest = GromaInstruct(write("g.json", [record, GROMA]), "/im", max_problems=0.5)
    assert (len(rest), len(rest.problems)) == (1, 1)


def test_groups() -> None:
    assert grounded_answer("<roi> <ground_box>\n<ground_box> </roi>", 2) == "<roi><ground_box><ground_box></roi>"
    assert grounded_answer("<p> </p><roi><ground_box></roi> it", 1) == "<roi><ground_box></roi> it"
    assert grounded_answer("the </s> <p>cup </s></p><roi><ground_box></roi>", 1) == (
        f"the {markup.escape('</s>')} <p>{markup.escape('cup </s>')}</p><roi><ground_box></roi>"
    )


@pytest.mark.parametrize(
    "content, says",
    [
        ({}, "expected a list"),
        ([{"image": "a"}], "no 'conversations'"),
        ([{"image": "a", "conversations": llava("What?", " \n")}], "turn 1: got ' \\n', expected words"),
        ([{"image": 3}], "image = 3"),
        ([7], "got 7"),
        ("[{", "not JSON"),
    ],
)
def test_bad_dialogues(write: Write, content: Any, says: str) -> None:
    path = write("bad.json", content)
    with pytest.raises(AnnotationError) as error:
        Dialogue(path, "/im")
    assert str(error.value).startswith(str(path))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
