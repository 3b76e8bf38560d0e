"""GRIT in its three layouts: the real record, nested and broken expressions, shards whole and damaged."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from groma import markup
from groma.data.grit import Grit, read_expression
from groma.data.images import read_image
from groma.data.records import AnnotationError

CAPTION = "a red cup on a table by a wall"
CUP, CUP_ON_TABLE, TABLE = [0, 9], [0, 20], [13, 20]
BOX = [0.1, 0.2, 0.5, 0.6]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROMA_CACHE", str(tmp_path / "cache"))


def row(*ref_exps: list[Any], caption: str = CAPTION, **columns: Any) -> dict[str, Any]:
    return {"caption": caption, "ref_exps": list(ref_exps), **columns}


def expression(span: list[int], score: float = 0.9, box: list[float] = BOX) -> list[Any]:
    return [*map(float, span), *box, score]


@pytest.fixture
def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def answers(data: Grit) -> list[str]:
    return [markup.unescape(sample.turns[1].text).replace("<roi><ground_box></roi>", "*") for sample in data]


def test_the_real_record(shared_data: Path, tmp_path: Path) -> None:
    record = json.loads((shared_data / "grit_sample/grit_one_record.json").read_text())
    path = tmp_path / "grit.json"
    path.write_text(json.dumps([{"file": "1.jpg", "caption": record["caption"], "ref_exps": record["ref_exps"]}]))
    data = Grit(path, "/im")
    assert answers(data) == ["<p>a wire hanger with a paper cover that reads we heart our customers</p>*"]
    outer = [0.019422357885505368, 0.027634161214033764, 0.9593302408854166, 0.969467560450236]
    assert data[0].turns[1].boxes.tolist() == [pytest.approx(outer, abs=1e-6)]
    assert (data[0].image, data[0].record) == ("/im/1.jpg", "grit.json#0")
    # With the outer one's score under the limit, the inner one is next.
    assert answers(Grit(path, "/im", min_score=0.7)) == [
        "a wire hanger with <p>a paper cover that reads we heart our customers</p>*"
    ]
    # As noun chunks, which do not overlap, both stay.
    path.write_text(json.dumps([{"file": "1.jpg", "caption": record["caption"], "ref_exps": record["noun_chunks"]}]))
    assert answers(Grit(path, "/im")) == [
        "<p>a wire hanger</p>* with <p>a paper cover</p>* that reads we heart our customers"
    ]


def test_expressions(tmp_path: Path) -> None:
    other = [0.6, 0.0, 1.05, 0.4]
    rows = [
        row(expression(CUP), expression(TABLE), file="0.jpg"),
        row(expression(TABLE), expression(CUP_ON_TABLE), expression(CUP), file="1.jpg"),
        row(expression(CUP, box=other), expression(CUP), expression(CUP), file="2.jpg"),
        row(expression(CUP, score=-0.1), file="3.jpg"),  # nothing is left
        row(file="4.jpg"),
        row(expression(CUP)[:6], expression(TABLE, box=[0.5, 0.5, 0.5, 0.9]), file="5.jpg"),  # no score; an empty box
        row([0, 3, *BOX, 1], caption="é<p> cup", file="6.jpg"),
    ]
    path = tmp_path / "grit.json"
    path.write_text(json.dumps(rows))
    data = Grit(path, "/im")
    assert [Path(sample.image).name for sample in data] == ["0.jpg", "1.jpg", "2.jpg", "5.jpg", "6.jpg"]
    assert answers(data) == [
        "<p>a red cup</p>* on <p>a table</p>* by a wall",
        "<p>a red cup on a table</p>* by a wall",
        "<p>a red cup</p><roi><ground_box><ground_box></roi> on a table by a wall",
        "<p>a red cup</p>* on a table by a wall",
        "<p>é<p</p>*> cup",
    ]
    assert data[2].turns[1].boxes.tolist() == [pytest.approx(BOX), pytest.approx([0.6, 0.0, 1.0, 0.4])]
    assert data.problems == []


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0.5, 9, *BOX, 0.9], r"span \(0.5, 9\)"),
        ([0, 31, *BOX, 0.9], "inside a caption of 30 characters"),
        ([9, 9, *BOX, 0.9], "inside a caption of 30"),
        ([-1, 9, *BOX, 0.9], "inside a caption of 30"),
        ([0, 9, 64, 10, 128, 40, 0.9], r"in \[0, 1\]"),
        ([0, 9, 0.5, 0.2, 0.1, 0.6, 0.9], "x1 <= x2"),
        ([0, 9, *BOX, 0.9, 1], "expected .start, end, x1"),
        ([0, 9, *BOX, None], "expected .start, end, x1"),
        ([0, 9, float("nan"), 0.2, 0.5, 0.6, 0.9], "expected .start, end, x1"),
        ([0, 9, True, 0.2, 0.5, 0.6, 0.9], "expected .start, end, x1"),
        ("0 9", "expected .start, end, x1"),
    ],
)
def test_a_bad_expression(values: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        read_expression(values, 30)


def test_expressions_asked_one_by_one(tmp_path: Path) -> None:
    other = [0.6, 0.0, 1.0, 0.4]
    path = tmp_path / "grit.json"
    path.write_text(json.dumps([row(expression(CUP), expression(CUP, box=other), expression(TABLE), file="0.jpg")]))
    data, asked = Grit(path, "/im", turns=1), {}
    for epoch in range(20):
        data.set_epoch(epoch)
        question, answer = data[0].turns
        phrase = question.text.partition("<p>")[2].partition("</p>")[0]
        asked[phrase] = (answer.text, [pytest.approx(box) for box in answer.boxes.tolist()])
    assert asked == {
        "a red cup": ("<roi><ground_box><ground_box></roi>", [BOX, other]),
        "a table": ("<roi><ground_box></roi>", [BOX]),
    }
    assert len(Grit(path, "/im", turns=8)[0].turns) == 4


def test_a_picture_is_named_by_file_or_filename(tmp_path: Path) -> None:
    path = tmp_path / "grit.json"
    rows = [{key: f"{key}.jpg", **row(expression(CUP))} for key in ("file", "filename")]
    path.write_text(json.dumps(rows))
    data = Grit(path, tmp_path)
    assert [Path(data[i].image).name for i in range(2)] == ["file.jpg", "filename.jpg"]


def test_bad_rows_are_problems(tmp_path: Path) -> None:
    good = row(expression(CUP), file="0.jpg")
    bad = [row(expression([0, 99]), file="1.jpg"), {**good, "caption": None}, {"caption": "no file"}, 7,
           {**good, "ref_exps": "none"}, row([1, 2, *BOX, 1], caption="a  b", file="2.jpg")]  # fmt: skip
    path = tmp_path / "grit.json"
    path.write_text(json.dumps([good, *bad, good]))
    data = Grit(path, "/im", max_problems=0.9)
    assert (len(data), len(data.problems)) == (2, len(bad))
    assert "record 1: ref_exps: span (0.0, 99.0)" in data.problems[0]
    assert "are blank" in data.problems[-1]
    with pytest.raises(AnnotationError, match="6 of 8 records unusable"):
        Grit(path, "/im")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    """The public set has ids; what img2dataset writes has keys, and says which downloads failed."""
    rows = [row(expression(CUP), id=17957, width=20, height=10), row(expression(TABLE), id=3, width=20, height=10)]
    public = write_parquet(tmp_path / "coyo_0_snappy.parquet", rows)
    data = Grit(public, "/im")
    assert [(s.image, s.record) for s in data] == [
        ("/im/17957.jpg", "coyo_0_snappy.parquet#17957"), ("/im/3.jpg", "coyo_0_snappy.parquet#3")
    ]  # fmt: skip
    assert answers(data)[1] == "a red cup on <p>a table</p>* by a wall"
    keyed = [
        row(expression(CUP), key="000000000", status="success", id=1),
        row(expression(CUP), key="000000001", status="failed_to_download", id=2),
        row(expression([0, 99]), key="000000002", status="success", id=3),
    ]
    write_parquet(tmp_path / "shards/00000.parquet", keyed)
    write_parquet(tmp_path / "shards/00001.parquet", [row(expression(CUP), key="000010000", status="success", id=1)])
    data = Grit(tmp_path / "shards", tmp_path, max_problems=0.4)
    assert [Path(s.image).relative_to(tmp_path).as_posix() for s in data] == ["000000000.jpg", "000010000.jpg"]
    assert len(data.problems) == 1
    (tmp_path / "00000.tar").touch()
    (tmp_path / "00001").mkdir()
    data = Grit(tmp_path / "shards", tmp_path, max_problems=0.4)
    assert [Path(s.image).relative_to(tmp_path).as_posix() for s in data] == [
        "00000.tar/000000000.jpg", "00001/000010000.jpg"
    ]  # fmt: skip


def test_broken_parquet(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "shards/a.parquet", [row(expression(CUP), id=1)])
    data = good.read_bytes()
    for name, content in (("b", data[: len(data) // 2]), ("c", b""), ("d", b"PAR1" * 9)):
        (tmp_path / f"shards/{name}.parquet").write_bytes(content)
    found = Grit(tmp_path / "shards", "/im", max_problems=0.8)
    assert (len(found), len(found.problems)) == (1, 3)
    assert all("cannot be read to its end" in line and "\n" not in line for line in found.problems)
    other = write_parquet(tmp_path / "other.parquet", [{"id": 1, "text": "x"}])
    with pytest.raises(AnnotationError, match="columns id, text, expected caption, ref_exps, and key or id"):
        Grit(other, "/im")


def test_tars(tmp_path: Path, picture: bytes) -> None:
    def sample(key: str, span: list[int], kind: str = "jpg") -> dict[str, bytes]:
        record = row(expression(span), key=key, id=7, url="x", status="success")
        return {f"{key}.{kind}": picture, f"{key}.json": json.dumps(record).encode(), f"{key}.txt": CAPTION.encode()}

    folder = tmp_path / "grit"
    write_tar(folder / "00000.tar", {**sample("000000000", CUP), **sample("000000003", TABLE, "webp")})
    bad = {"000010001.json": b"{}", "000010002.jpg": picture, "000010003.jpg": picture, "000010003.json": b"{oh",
           "000010004.jpg": picture, "000010004.json": b"[]"}  # fmt: skip
    write_tar(folder / "00001.tar", {**sample("000010000", CUP_ON_TABLE), **bad})
    (folder / "00000_stats.json").write_text("{}")
    data = Grit(folder, folder, max_problems=0.6)
    assert [s.record for s in data] == ["grit#000000000", "grit#000000003", "grit#000010000"]
    assert [Path(s.image).relative_to(folder).as_posix() for s in data] == [
        "00000.tar/000000000.jpg", "00000.tar/000000003.webp", "00001.tar/000010000.jpg"
    ]  # fmt: skip
    assert answers(data)[2] == "<p>a red cup on a table</p>* by a wall"
    assert {read_image(s.image).size for s in data} == {(20, 10)}
    assert len(data.problems) == 4
    assert data.locality > 0
    # Unpacked beside, and flat.
    (tmp_path / "out/00000").mkdir(parents=True)
    unpacked = Grit(folder, tmp_path / "out", max_problems=0.6)
    assert [Path(s.image).relative_to(tmp_path).as_posix() for s in unpacked] == [
        "out/00000/000000000.jpg", "out/00000/000000003.webp", "out/000010000.jpg"
    ]  # fmt: skip
    assert unpacked.locality == 0
    assert len(Grit(folder / "00000.tar", folder)) == 2


def test_a_damaged_tar(tmp_path: Path, picture: bytes) -> None:
    files: dict[str, bytes] = {}
    for number in range(5):
        files |= {f"{number}.jpg": picture, f"{number}.json": json.dumps(row(expression(CUP))).encode()}
    whole = write_tar(tmp_path / "t/00000.tar", files).read_bytes()
    (tmp_path / "t/00001.tar").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "t/00002.tar").write_bytes(b"no tar at all" * 100)
    data = Grit(tmp_path / "t", tmp_path / "t", max_problems=0.9)
    assert 5 < len(data) < 10
    assert any("00001.tar: damaged" in line for line in data.problems)
    assert any("00002.tar" in line for line in data.problems)


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"no \*.tar and no \*.parquet"):
        Grit(tmp_path, tmp_path)
