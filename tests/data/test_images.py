"""read_image: every mode to upright RGB, every bad file to one clear line."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groma.data.images import ImageError, read_image

BROKEN = Path(__file__).parents[2].parent / "shared/data/broken_images"
FAIL = {
    "bmp_b_reallybig.bmp", "broken.png", "broken_data_stream.png", "made_bomb_20000x20000_1bit.png",
    "made_coco_cut_half.jpg", "made_empty.jpg", "made_header_only_65000x65000.png", "made_html.jpg",
    "made_lfs_pointer.jpg", "ultrahdr.jpg", "unknown_compression_method.png", "zero_width.gif",
}  # fmt: skip


def one_line(error: pytest.ExceptionInfo[ImageError], path: Path) -> str:
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert "expected" in text
    return text


@pytest.mark.filterwarnings("ignore")
def test_the_collection_of_broken_images() -> None:
    if not BROKEN.is_dir():
        pytest.skip(f"no collection of broken images at {BROKEN}")
    for path in sorted(BROKEN.iterdir()):
        if path.suffix in (".md", ".json"):
            continue
        if path.name in FAIL:
            with pytest.raises(ImageError) as error:
                read_image(path)
            one_line(error, path)
        else:
            image = read_image(path)
            assert image.mode == "RGB", path
            assert min(image.size) > 0, path
    assert read_image(BROKEN / "orientation_rectangle.jpg").size == (1, 2)
    assert np.asarray(read_image(BROKEN / "i_trns.png")).max() > 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(expected))


def test_modes(tmp_path: Path) -> None:
    sixteen = np.array([[0, 257, 65535]], dtype=np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 255]

    Image.new("RGBA", (2, 2), (200, 0, 0, 0)).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)

    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "c.tif")
    assert read_image(tmp_path / "c.tif").getpixel((1, 1)) == (255, 255, 255)

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "d.png", transparency=1)
    assert [read_image(tmp_path / "d.png").getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]

    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "e.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "e.gif").getpixel((0, 0)) == (255, 0, 0)

    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(read_image(tmp_path / "f.tif"))[0, :, 1].tolist() == [0, 128, 255]


def test_cut_files_fail_every_time(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"):
        path = tmp_path / name
        noise.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for _ in range(2):
            with pytest.raises(ImageError) as error:
                read_image(path)
            one_line(error, path)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"hello", "5 bytes"),
        (b"\xff\xd8\xff", "no image"),
    ],
)
def test_no_image(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert says in one_line(error, path)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match=r"unreadable|no such"):
        read_image("a\0b.jpg")


# -- through a tar


@pytest.fixture
def tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tar of a picture, a cut one, an empty file and a text."""
    monkeypatch.setenv("GROMA_CACHE", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png", exif=exif)
    whole = (tmp_path / "a.png").read_bytes()
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.png", whole), ("in/cut.png", whole[:9000]), ("empty.png", b""), ("t.png", b"hello")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_through_a_tar(tar: Path) -> None:
    image = read_image(tar / "a.png")
    assert image.size == (120, 160)
    assert np.array_equal(np.asarray(image), np.asarray(read_image(tar.parent / "a.png")))


@pytest.mark.parametrize(
    "name, says",
    [
        ("in/cut.png", "damaged image data"),
        ("empty.png", "an empty file"),
        ("t.png", "no image known to Pillow (5 bytes)"),
        ("no.png", "no such file among the 4 of train.tar"),
        ("in", "no such file among the 4"),
        ("../a.png", "no such file among the 4"),
    ],
)
def test_unusable_in_a_tar(tar: Path, name: str, says: str) -> None:
    for _ in range(2):
        with pytest.raises(ImageError) as error:
            read_image(f"{tar}/{name}")
        assert says in one_line(error, Path(f"{tar}/{name}"))


def test_through_what_is_no_tar(tar: Path) -> None:
    for file, says in ((tar.parent / "a.png", "no tar"), (tar.with_suffix(".tgz"), "compressed with gzip")):
        if not file.exists():
            file.write_bytes(gzip.compress(tar.read_bytes()))
        with pytest.raises(ImageError) as error:
            read_image(file / "a.png")
        assert says in one_line(error, file / "a.png")
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_folder_called_tar_is_a_folder(tar: Path) -> None:
    folder = tar.parent / "folder.tar"
    folder.mkdir()
    Image.new("RGB", (3, 2)).save(folder / "a.png")
    assert read_image(folder / "a.png").size == (3, 2)
