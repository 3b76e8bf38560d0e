"""The drawn world: same seed same bytes, true boxes and masks, held-out pairs kept out."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("vtkmodules")

from projects.tabletop.masks import compressed_rle, polygons, tight_box
from projects.tabletop.meshes import kind_mesh
from projects.tabletop.observed import observe
from projects.tabletop.records import Settings, make_scene
from projects.tabletop.render import Renderer
from projects.tabletop.vocabulary import HELD_OUT, KINDS
from projects.tabletop.world import Scene, sample_scene


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(640, 480)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coarse", [False, True])
def test_meshes_face_outwards(kind: str, coarse: bool) -> None:
    mesh = kind_mesh(kind, coarse)
    corners = mesh.points[mesh.triangles]  # (F, 3, 3)
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(face, axis=1)
    normal = mesh.normals[mesh.triangles].mean(axis=1)
    agrees = np.sum(face * normal, axis=1)[area > 1e-7] > 0
    assert agrees.mean() > 0.97
    assert np.sum(corners[:, 0] * face) > 0  # the volume by Gauss: positive when walls face outwards
    assert mesh.points[:, 2].min() == pytest.approx(0, abs=0.035)  # a rounded foot may dip a little


def test_same_seed_same_bytes_whatever_came_before(renderer: Renderer) -> None:
    settings = Settings(train=4, val=0, test=0, seed=3)
    first = [make_scene(renderer, settings, "train", i) for i in range(3)]
    again = [make_scene(Renderer(640, 480), settings, "train", i) for i in (2, 0, 1)]
    assert [again[1], again[2], again[0]] == first
    assert first[0][0] != first[1][0]
    assert make_scene(renderer, Settings(4, 0, 0, seed=4), "train", 0)[0] != first[0][0]


def test_boxes_hold_their_masks_and_nothing_more(renderer: Renderer) -> None:
    for index in range(4):
        scene = sample_scene(5, "val", index)
        drawn = renderer.render(scene)
        for i, thing in enumerate(observe(scene, drawn)):
            mask = drawn.ids == i + 1
            assert thing.area == mask.sum() <= thing.whole_area
            if thing.box:
                x1, y1, x2, y2 = thing.box
                assert mask[y1:y2, x1:x2].sum() == thing.area
                assert mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any()
                left, top, right, bottom = thing.whole_box  # the camera's own projection agrees with VTK's
                assert left - 1 <= x1 and top - 1 <= y1 and x2 <= right + 1 and y2 <= bottom + 1


def test_hidden_objects_are_not_annotated(renderer: Renderer) -> None:
    scene = next(s for s in (sample_scene(6, "val", i) for i in range(99)) if len(s.objects) > 4)
    front, back = scene.objects[0], scene.objects[1]
    eye = scene.camera.position
    behind = 1.25  # of the distance from the eye to the one in front, along the table
    x, y = eye[0] + behind * (0.0 - eye[0]), eye[1] + behind * (-1.0 - eye[1])
    large = front.__class__(**{**front.__dict__, "kind": "box", "x": 0.0, "y": -1.0, "scale": (1.6, 1.6, 2.2)})
    small = back.__class__(**{**back.__dict__, "kind": "ball", "x": x, "y": y, "scale": (0.5, 0.5, 0.5)})
    pair = Scene(**{**scene.__dict__, "objects": (large, small)})
    shown, hidden = observe(pair, renderer.render(pair))
    assert shown.annotated
    assert shown.visibility == 1
    assert hidden.visibility < 0.3
    assert not hidden.annotated
    assert hidden.whole_area > 200


def test_training_scenes_hold_no_held_out_pair_and_test_scenes_do() -> None:
    train = [o for i in range(150) for o in sample_scene(0, "train", i).objects]
    test = [o for i in range(150) for o in sample_scene(0, "test", i).objects]
    assert not {(o.colour, o.kind) for o in train} & HELD_OUT
    share = np.mean([(o.colour, o.kind) in HELD_OUT for o in test])
    assert 0.06 < share < 0.17  # 12 of 108 pairs
    assert {o.kind for o in train} == set(KINDS)
    counts = [len(sample_scene(0, "train", i).objects) for i in range(150)]
    assert min(counts) >= 2
    assert max(counts) == 10


def test_a_picture_larger_than_usual(renderer: Renderer) -> None:
    large = Renderer(960, 720)
    scene = sample_scene(1, "val", 0, 960, 720)
    drawn = large.render(scene)
    assert drawn.image.shape == (720, 960, 3)
    with pytest.raises(ValueError, match="960x720, this renderer 640x480"):
        renderer.render(scene)


def test_polygons_and_run_lengths_give_the_mask_back() -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    ring = np.hypot(*np.mgrid[-20:20, -30:30]) < 18
    ring &= np.hypot(*np.mgrid[-20:20, -30:30]) > 9
    masks = [ring, *(rng.random((13, 17)) < share for share in rng.uniform(0.15, 0.95, size=80))]
    for mask in masks:
        height, width = mask.shape
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons(mask), height, width)))
        assert np.array_equal(drawn, mask)
        run_lengths = {"size": [height, width], "counts": compressed_rle(mask).encode()}
        assert np.array_equal(coco_mask.decode(run_lengths), mask)
        assert coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) == run_lengths
        x1, y1, x2, y2 = tight_box(mask)
        assert coco_mask.toBbox(run_lengths).tolist() == [x1, y1, x2 - x1, y2 - y1]


def test_an_empty_mask_has_no_box() -> None:
    with pytest.raises(ValueError, match="empty mask"):
        tight_box(np.zeros((4, 4), bool))


def test_a_record_is_json(renderer: Renderer) -> None:
    _, record = make_scene(renderer, Settings(1, 1, 1, seed=0), "test", 0)
    assert json.loads(json.dumps(record))["things"][0]["kind"] in KINDS
