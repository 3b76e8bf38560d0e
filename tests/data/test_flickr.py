"""Flickr30k Entities from its authors' files: the real example, sentences and XML by hand, and hostile XML."""

from pathlib import Path
from typing import Any

import pytest

from groma.data.flickr import Flickr30k, read_sentence, read_xml
from groma.data.records import AnnotationError

BOX = (0.0, 0.0, 0.5, 1.0)


def thing(names: list[str], box: tuple[int, ...] | None) -> str:
    """An object of an annotation file."""
    named = "".join(f"<name>{name}</name>" for name in names)
    keys = ("xmin", "ymin", "xmax", "ymax")
    bounds = "".join(f"<{k}>{v}</{k}>" for k, v in zip(keys, box, strict=True)) if box else ""
    rest = f"<bndbox>{bounds}</bndbox>" if box else "<scene>1</scene><nobndbox>0</nobndbox>"
    return f"<object>{named}{rest}</object>"


@pytest.fixture
def flickr(tmp_path: Path) -> Any:
    """flickr({id: (sentences, objects)}, …): a Flickr30k of such images, of 101 x 51 pixels."""
    for folder in ("Sentences", "Annotations"):
        (tmp_path / folder).mkdir()

    def make(content: dict[str, tuple[list[str], list[str]]], unrelated: str = "", **options: Any) -> Flickr30k:
        (tmp_path / "train.txt").write_text("".join(f"{number}\n" for number in content))
        for number, (sentences, things) in content.items():
            (tmp_path / f"Sentences/{number}.txt").write_text("".join(f"{s} \n" for s in sentences))
            size = "<size><width>101</width><height>51</height><depth>3</depth></size>"
            xml = f"<annotation><filename>{number}.jpg</filename>{size}{''.join(things)}</annotation>"
            (tmp_path / f"Annotations/{number}.xml").write_text(xml)
        if unrelated:
            (tmp_path / "UNRELATED_CAPTIONS").write_text(f"# format: <imageID> <sentence number>\n{unrelated}\n")
        return Flickr30k(tmp_path, "/im", **options)

    return make


def test_real_sentences(shared_data: Path, tmp_path: Path) -> None:
    real = shared_data / "flickr30k_entities_sample"
    for name in ("Sentences", "Annotations"):
        (tmp_path / name).symlink_to(real / name)
    (tmp_path / "train.txt").write_text("1000092795\n")
    data = Flickr30k(tmp_path, "/im")
    answers = [sample.turns[1] for sample in data]
    assert {sample.image for sample in data} == {"/im/1000092795.jpg"}
    assert data[1].record == "Sentences/1000092795.txt:2"
    one, two = "<roi><ground_box></roi>", "<roi><ground_box><ground_box></roi>"
    assert [answer.text for answer in answers] == [
        f"<p>Two young guys</p>{two} with shaggy hair look at their hands while hanging out in the yard.",
        f"<p>Two young, White males</p>{two} are outside near <p>many bushes</p>{two}.",
        f"<p>Two men</p>{two} in green shirts are standing in a yard.",
        f"<p>A man</p>{one} in a blue shirt standing in a garden.",
        f"<p>Two friends</p>{two} enjoy time spent together.",
    ]
    # 1 taken from each coordinate; the box of chain 6 is the second of chain 1. The image is 333 x 500.
    first, second = [158 / 333, 124 / 500, 218 / 333, 334 / 500], [196 / 333, 109 / 500, 260 / 333, 372 / 500]
    assert answers[0].boxes.tolist() == [pytest.approx(first), pytest.approx(second)]
    assert answers[3].boxes.tolist() == [pytest.approx(second)]
    assert all(sample.turns[0].text.startswith("[grounding] ") for sample in data)


def test_real_split_lists(shared_data: Path) -> None:
    """The lists of the release are read; their images are not in the excerpt, which is told of each."""
    real = shared_data / "flickr30k_entities_sample"
    for split in ("val", "test"):
        data = Flickr30k(real, "/im", split=split, max_problems=1.0)
        assert (len(data), len(data.problems)) == (0, 1000)


def test_chains_and_boxes(flickr: Any) -> None:
    things = [thing(["1", "3"], (1, 1, 51, 51)), thing(["2"], None), thing(["1"], (11, 11, 11, 21))]  # a line
    sentences = ["[/EN#1/people/other A boy] on [/EN#2/scene a [hill] ] .", "[/EN#3/other One] and [/EN#1/people he] ."]
    data = flickr({"5": (sentences[1:], things)})
    assert data[0].turns[1].text == "<p>One</p><roi><ground_box></roi> and <p>he</p><roi><ground_box></roi>."
    assert data[0].turns[1].boxes.tolist() == [pytest.approx([0, 0, 50 / 101, 50 / 51])] * 2
    data = flickr({"5": (sentences, things)}, max_problems=0.5)
    assert (len(data), len(data.problems)) == (1, 1)
    assert "Sentences/5.txt: line 1: brackets in" in data.problems[0]


def test_unrelated_captions_are_left_out(flickr: Any) -> None:
    content = {"5": (["One .", "Two .", "Three ."], []), "6": (["Four .", "Five ."], [])}
    assert [s.turns[1].text for s in flickr(content, unrelated="5 2\n6 1")] == ["One.", "Three.", "Five."]
    assert len(flickr({**content, "5": (["One .", " ", ""], [])}, unrelated="7 1")) == 3


def test_read_sentence() -> None:
    chains = {"1": [BOX], "2": [BOX, (0.5, 0.0, 1.0, 1.0)]}
    text, phrases = read_sentence(
        "[/EN#1/people A  man] 's hat , [/EN#0/notvisual it] : [/EN#2/other two cups] !", chains
    )
    assert text == "A man's hat, it: two cups!"
    assert {text[slice(*span)]: boxes for span, boxes in phrases.items()} == {
        "A man": chains["1"],
        "two cups": chains["2"],
    }
    for broken in ("[/EN#1/people A man", "A man] .", "[/EN#x/people A man]", "[/EN#1/people ] x"):
        with pytest.raises(ValueError, match="brackets in"):
            read_sentence(broken, chains)


def test_special_words_are_text(flickr: Any) -> None:
    data = flickr({"5": (["[/EN#1/other A <roi> sign] says </s> ."], [thing(["1"], (1, 1, 51, 51))])})
    text = data[0].turns[1].text
    assert (text.count("<roi>"), "</s>" in text) == (1, False)


BOMB = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_document_type_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(BOMB, encoding)
    with pytest.raises(AnnotationError, match="declares a document type"):
        read_xml(path)
    secret = tmp_path / "secret"
    secret.write_text("x")
    path.write_text(f'<!DOCTYPE a [<!ENTITY b SYSTEM "file://{secret}">]><a>&b;</a>', encoding)
    with pytest.raises(AnnotationError, match="declares a document type"):
        read_xml(path)


@pytest.mark.parametrize(
    ("xml", "line"),
    [
        ("", "cannot be read"),
        ("<annotation>", "cannot be read"),
        ("<annotation/>", "width = None, expected a number"),
        ("<annotation><size><width>0</width><height>5</height></size>" + thing(["1"], (1, 1, 2, 2)) + "</annotation>",
         "expected positive numbers"),
        ("<annotation><size><width>9</width><height>9</height></size>" + thing(["1"], (5, 1, 2, 2)) + "</annotation>",
         "is reversed"),
        ("<annotation><size><width>9</width><height>9</height></size><object><bndbox/></object></annotation>",
         "xmin = None"),
    ],
)  # fmt: skip
def test_a_bad_image_is_a_problem(flickr: Any, tmp_path: Path, xml: str, line: str) -> None:
    flickr({"5": (["One ."], []), "6": (["Two ."], [])})
    (tmp_path / "Annotations/5.xml").write_text(xml)
    data = Flickr30k(tmp_path, "/im", max_problems=0.5)
    assert [s.turns[1].text for s in data] == ["Two."]
    assert len(data.problems) == 1
    assert line in data.problems[0]


def test_lists(flickr: Any, tmp_path: Path) -> None:
    flickr({"5": (["One ."], [])})
    with pytest.raises(AnnotationError, match=r"val.txt: no such annotation file; lists there: train.txt"):
        Flickr30k(tmp_path, "/im", split="val")
    (tmp_path / "train.txt").write_text("5\n../../etc/passwd\n5\n7\n")
    data = Flickr30k(tmp_path, "/im", max_problems=1.0)
    assert len(data) == 1
    assert ["expected an image id" in data.problems[0], "7.xml: no such" in data.problems[1]] == [True, True]
