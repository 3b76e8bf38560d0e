"""Visual Genome's region descriptions: both versions of the real files, boxes by hand, and broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from groma.data.records import AnnotationError
from groma.data.vg import VisualGenome

URL = "https://cs.stanford.edu/people/rak248"


def region(number: int, phrase: str, x: Any = 10, y: int = 5, **changes: Any) -> dict[str, Any]:
    """A region of 20 x 10 pixels of image 1."""
    return {"region_id": number, "image_id": 1, "phrase": phrase, "x": x, "y": y, "width": 20, "height": 10, **changes}


@pytest.fixture
def vg(tmp_path: Path) -> Any:
    """vg(regions, …): a VisualGenome of image 1, 100 x 50 pixels, with these."""

    def make(regions: Any, **options: Any) -> VisualGenome:
        images = [{"image_id": i, "width": 100, "height": 50, "url": f"{URL}/VG_100K_2/{i}.jpg"} for i in (1, 2)]
        (tmp_path / "image_data.json").write_text(json.dumps(images))
        records = regions if regions and "regions" in regions[0] else [{"id": 1, "regions": regions}]
        (tmp_path / "region_descriptions.json").write_text(json.dumps(records))
        return VisualGenome(tmp_path / "region_descriptions.json", tmp_path / "images", **options)

    return make


@pytest.mark.parametrize(
    ("file", "counts"),
    [("region_descriptions.json", [262, 256, 255, 257, 248]),
     ("region_descriptions_v1.0.json", [265, 256, 259, 258, 250])],
)  # fmt: skip
def test_real_regions(shared_data: Path, file: str, counts: list[int]) -> None:
    real = shared_data / "vg_region_sample"
    data = VisualGenome(real / file, "/im")
    assert [len(regions) for _, _, regions in data.entries] == counts
    assert data.problems == []
    assert [Path(name).parts for name, _, _ in data.entries] == [
        ("VG_100K_2", "1.jpg"), *(("VG_100K", f"{i}.jpg") for i in (2, 3, 4, 5))
    ]  # fmt: skip
    phrase, box = data.entries[0][2][1]
    assert phrase == "shade is along the street"  # the file has a space at its end
    assert box == pytest.approx([194 / 800, 372 / 600, (194 + 182) / 800, (372 + 109) / 600])
    assert not any(phrase != phrase.strip() for _, _, regions in data.entries for phrase, _ in regions)


def test_rounds(shared_data: Path) -> None:
    real = shared_data / "vg_region_sample/region_descriptions.json"
    assert [len(s.turns) for s in VisualGenome(real, "/im", turns=1)] == [2] * 5
    many = VisualGenome(real, "/im")
    assert [len(s.turns) for s in many] == [20] * 5
    first = many[0].turns
    many.set_epoch(1)
    assert [t.text for t in many[0].turns] != [t.text for t in first]
    assert all(q.boxes.shape == (1, 4) and a.text[0].isupper() for q, a in zip(*[iter(first)] * 2, strict=True))


def test_a_region(vg: Any) -> None:
    data = vg([region(7, "  a red   cup "), region(8, " "), region(9, "a line", width=0.5), region(10, "far", x=200)])
    assert data.entries[0][2] == [["a red cup", pytest.approx([0.1, 0.1, 0.3, 0.3])]]
    assert data[0].turns[1].text == "A red cup"
    assert (data[0].record, data.problems) == ("region_descriptions.json#1", [])


def test_places_of_images(vg: Any, tmp_path: Path) -> None:
    assert vg([region(1, "cup")])[0].image == str(tmp_path / "images/1.jpg")
    (tmp_path / "images/VG_100K_2").mkdir(parents=True)
    assert vg([region(1, "cup")])[0].image == str(tmp_path / "images/VG_100K_2/1.jpg")


@pytest.mark.parametrize(
    ("records", "line"),
    [
        ([{"id": 9, "regions": []}], "image 9 is not in image_data.json"),
        ([{"id": 1, "regions": []}] * 2, "image 1 is there twice"),
        ([{"id": 1, "regions": [region(3, "cup", image_id=2)]}], "region 3 of image 2 among those of 1"),
        ([{"id": 1, "regions": [region(3, "cup", x=None)]}], "x = None"),
        ([{"id": 1, "regions": [region(3, "cup", x=float("nan"))]}], "expected four numbers"),
        ([{"id": 1, "regions": ["cup"]}], "got 'cup'"),
        ([{"id": "1", "regions": []}], "id = '1'"),
        ([{"id": 1, "regions": [{**region(3, "cup"), "phrase": 4}]}], "phrase = 4"),
    ],
)
def test_a_bad_record_is_a_problem(vg: Any, records: list[Any], line: str) -> None:
    data = vg([{"id": 2, "regions": [region(1, "bowl", image_id=2)]}, *records], max_problems=0.5)
    assert [s.turns[1].text for s in data] == ["Bowl"]
    assert len(data.problems) == 1
    assert line in data.problems[0]


def test_bad_image_data(vg: Any, tmp_path: Path) -> None:
    vg([region(1, "cup")])
    path = tmp_path / "image_data.json"
    path.write_text(path.read_text().replace("VG_100K_2/2", "../../2"))
    data = VisualGenome(tmp_path / "region_descriptions.json", "/im", max_problems=0.5)
    assert (len(data), len(data.problems)) == (1, 1)
    assert "image 2: url" in data.problems[0]
    path.unlink()
    with pytest.raises(AnnotationError, match="image_data.json: no such annotation file"):
        VisualGenome(tmp_path / "region_descriptions.json", "/im")
