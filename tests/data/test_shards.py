"""Tars as folders: every kind of tar a program writes, hostile and broken ones, and the samples webdataset sees."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from groma.data import shards
from groma.data.shards import Shard, ShardError, Shards, member_path, read_member, split_path

FILES = {
    "a.jpg": b"first",
    "train2017/b.jpg": b"x" * 1000,
    "deep/er/" + "n" * 180 + ".txt": "ä".encode(),
    "deep/" + "é" * 90 + ".png": b"long",
    "empty.json": b"",
}
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GROMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(name, files, format): a tar; a file may also be given as a TarInfo without content."""

    def write(name: str, files: object = FILES, kind: int = tarfile.PAX_FORMAT) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=kind) as tar:
            for member, content in files.items() if isinstance(files, dict) else files:  # type: ignore[attr-defined]
                info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
                info.size = len(content or b"")
                tar.addfile(info, io.BytesIO(content or b""))
        return path

    return write


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format(make: Make, kind: int, cache: Path) -> None:
    files = {k: v for k, v in FILES.items() if kind != tarfile.USTAR_FORMAT or ("n" * 180 not in k and "é" not in k)}
    path = make("a.tar", files, kind)
    for _ in range(2):
        assert {name: read_member(path / name) for name in files} == files
        shards._open_as.cache_clear()  # the second time from the cache folder
    assert [member.name for member in Shard(path).members()] == list(files)
    assert Shard(path).damage == ""
    assert len(list(cache.glob("tars/a.tar-*/members.npy"))) == 1


def test_a_path_through_a_tar(make: Make, tmp_path: Path) -> None:
    path = make("coco.tar/train2017.tar")
    assert read_member(f"{path}/./train2017//b.jpg") == b"x" * 1000
    assert read_member(member_path(path, "a.jpg")) == b"first"
    assert split_path(path / "train2017/b.jpg") == (path, "train2017/b.jpg")
    assert split_path(path) == (path, "")
    assert split_path(tmp_path / "no/b.jpg") == split_path(tmp_path) == split_path("a\0b") is None
    for name in ("no.jpg", "train2017", "../a.jpg", "train2017/../a.jpg", ""):
        with pytest.raises(ShardError, match=r"got no such file among the 5 of train2017.tar, expected"):
            read_member(f"{path}/{name}")
    assert Shard(path).find("/a.jpg") is None


def test_written_by_tar_of_a_folder(make: Make) -> None:
    folder = tarfile.TarInfo("./train")
    folder.type = tarfile.DIRTYPE
    path = make("a.tar", [(folder, None), ("./train/a.jpg", b"1"), ("./b.jpg", b"2")])
    assert (read_member(path / "train/a.jpg"), read_member(path / "b.jpg")) == (b"1", b"2")
    assert [member.name for member in Shard(path).members()] == ["train/a.jpg", "b.jpg"]


def test_links_sparse_files_and_names_that_leave_are_passed_over(make: Make) -> None:
    links = [tarfile.TarInfo(f"link{i}.jpg") for i in range(3)]
    for link, kind in zip(links, (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE), strict=True):
        link.type, link.linkname = kind, "/etc/passwd"
    bad = [("../up.jpg", b"u"), ("/etc/abs.jpg", b"a"), ("x/../../y.jpg", b"y"), ("a\udcff.jpg", b"latin")]
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.pax_headers = {"GNU.sparse.size": "10", "GNU.sparse.map": "5,1"}
    path = make("a.tar", [*((link, None) for link in links), *bad, (sparse, b"s"), ("ok.jpg", b"ok")])
    assert [member.name for member in Shard(path).members()] == ["a\udcff.jpg", "ok.jpg"]
    assert read_member(path / "ok.jpg") == b"ok"
    assert read_member(path / "a\udcff.jpg") == b"latin"


def test_the_last_of_one_name_counts(make: Make) -> None:
    path = make("a.tar", [("a.jpg", b"old"), ("b.jpg", b"b"), ("a.jpg", b"new")])
    assert read_member(path / "a.jpg") == b"new"
    assert [member.name for member in Shard(path).members()] == ["b.jpg", "a.jpg"]


def test_a_tar_written_anew(make: Make) -> None:
    assert read_member(make("a.tar", {"a": b"1"}) / "a") == b"1"
    path = make("a.tar", {"b": b"", "a": b"22"})
    os.utime(path, ns=(1, 1))
    assert read_member(path / "a") == b"22"


def test_cut_tars(make: Make) -> None:
    whole = make("whole.tar", {f"{i}.jpg": bytes([i]) * 700 for i in range(5)}).read_bytes()
    path = make("cut.tar")
    for end in (1, 511, 512, 600, 1300, 1536, 1540, 2000, 3000, 5 * 1536 - 1, 5 * 1536, 5 * 1536 + 512, len(whole)):
        path.write_bytes(whole[:end])
        os.utime(path, ns=(end, end))
        complete = sum(i * 1536 + 512 + 700 <= end for i in range(5))
        if complete == 0:
            with pytest.raises(ShardError, match="got no (tar, or a damaged one|such file among the 0 of .* damaged)"):
                read_member(path / "0.jpg")
            continue
        assert [(m.name, m.read()) for m in Shard(path).members()] == [
            (f"{i}.jpg", bytes([i]) * 700) for i in range(complete)
        ]
        assert bool(Shard(path).damage) == (end < 5 * 1536 + 512)
        if complete < 5:
            with pytest.raises(ShardError, match=r"cut.tar/4.jpg: got no such file among .* which is damaged: "):
                read_member(path / "4.jpg")


def test_a_damaged_header(make: Make) -> None:
    path = make("a.tar", {f"{i}.jpg": bytes([i]) * 700 for i in range(5)})
    content = bytearray(path.read_bytes())
    content[2 * 1536 + 150] ^= 0xFF
    path.write_bytes(content)
    assert [key for key, _ in Shard(path).samples()] == ["0", "1"]
    assert "a damaged header" in Shard(path).damage


def test_a_header_that_leads_backwards(make: Make) -> None:
    path = make("a.tar", {"0.jpg": b"0", "1.jpg": b"1"})
    content = bytearray(path.read_bytes())
    content[1024 + 124 : 1024 + 136] = tarfile.itn(-2048, 12, tarfile.GNU_FORMAT)
    content[1024 + 148 : 1024 + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(content[1024:1536]))[0]
    path.write_bytes(content)
    assert [member.name for member in Shard(path).members()] == ["0.jpg"]
    assert Shard(path).damage


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "got no tar, or a damaged one"),
        (b"x" * 5000, "got no tar, or a damaged one"),
        (b"\x89PNG\r\n", "got no tar, or a damaged one"),
        (gzip.compress(b"x" * 5000), "compressed with gzip, expected an uncompressed tar: unpack it, or tar it again"),
        (b"\x28\xb5\x2f\xfd000", "compressed with zstd"),
    ],
)
def test_what_is_no_tar(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    for read in (lambda: read_member(path / "a.jpg"), Shard(path).samples, lambda: Shard(path).find("a")):
        with pytest.raises(ShardError) as error:
            read()
        assert says in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        again = pickle.loads(pickle.dumps(error.value))
        assert (str(again), again.got) == (str(error.value), error.value.got)


def test_an_empty_tar(make: Make) -> None:
    path = make("a.tar", {})
    assert list(Shard(path).samples()) == []
    with pytest.raises(ShardError, match="among the 0 of a.tar"):
        read_member(path / "a")


def test_a_tar_that_shrinks_while_open(make: Make) -> None:
    path = make("a.tar")
    [*_, member] = [m for m in Shard(path).members() if m.size]
    path.write_bytes(path.read_bytes()[: member.offset + 1])
    with pytest.raises(ShardError, match="cut at 1 of 4 bytes"):
        member.read()


def test_few_tars_are_held_open(make: Make) -> None:
    paths = [make(f"{i}.tar", {"a.jpg": b"%d" % i}) for i in range(2 * shards.OPEN)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert [read_member(path / "a.jpg") for path in paths] == [b"%d" % i for i in range(len(paths))]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 3 * shards.OPEN


def read_many(path: Path, seed: int, told: "multiprocessing.Queue[bool]") -> None:
    told.put(all(read_member(path / f"{i * seed % 200}.jpg") == b"%d" % (i * seed % 200) * 999 for i in range(1, 2000)))


def test_safe_after_fork(make: Make) -> None:
    path = make("a.tar", {f"{i}.jpg": b"%d" % i * 999 for i in range(200)})
    assert read_member(path / "3.jpg") == b"3" * 999  # open before the fork
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    workers = [context.Process(target=read_many, args=(path, seed, told)) for seed in (3, 7)]
    for worker in workers:
        worker.start()
    read_many(path, 11, told)  # type: ignore[arg-type]
    assert [told.get(timeout=60) for _ in range(3)] == [True] * 3
    for worker in workers:
        worker.join()


# -- runs of samples


def test_samples(make: Make) -> None:
    files = {
        "000.jpg": b"j0", "000.json": b'{"a": 1}', "x/000.JPG": b"jx", "001.seg.png": b"s", "001.Cls": b"c",
        "noext": b"", ".hidden": b"", "__meta__/info.json": b"{}", "a.b/002.txt": b"t", "000.txt": b"again",
    }  # fmt: skip
    path = make("a.tar", files)
    got = [(key, {ext: m.read() for ext, m in found.items()}) for key, found in Shard(path).samples()]
    assert got == [
        ("000", {"jpg": b"j0", "json": b'{"a": 1}'}),
        ("x/000", {"jpg": b"jx"}),
        ("001", {"seg.png": b"s", "cls": b"c"}),
        ("a.b/002", {"txt": b"t"}),
        ("000", {"txt": b"again"}),
    ]


def test_which_tars(make: Make, tmp_path: Path) -> None:
    for name in ("s/00.tar", "s/01.tar", "s/sub/02.tar", "s/x.txt", "t/a-09.tar", "t/a-10.tar", "t/a-11.tar"):
        make(name)
    names = lambda place: [str(Path(f).relative_to(tmp_path)) for f in Shards(place).files]  # noqa: E731
    assert names(tmp_path / "s") == ["s/00.tar", "s/01.tar", "s/sub/02.tar"]
    assert names(tmp_path / "s/0?.tar") == ["s/00.tar", "s/01.tar"]
    assert names(f"{tmp_path}/t/a-{{09..11}}.tar") == ["t/a-09.tar", "t/a-10.tar", "t/a-11.tar"]
    assert names(tmp_path / "t/a-10.tar") == ["t/a-10.tar"]
    assert [shard.path.name for shard in Shards(tmp_path / "s")] == ["00.tar", "01.tar", "02.tar"]
    assert len(Shards(tmp_path / "t")) == 3
    with pytest.raises(ShardError, match=r"a-12.tar: got no such file, expected one for each number of \{10..12\}"):
        Shards(f"{tmp_path}/t/a-{{10..12}}.tar")
    for place in (tmp_path / "no", tmp_path / "*.zip"):
        with pytest.raises(ShardError, match="no tar there"):
            Shards(place)


def test_only_compressed_ones(tmp_path: Path, make: Make) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.tar.gz").write_bytes(gzip.compress(make("a.tar").read_bytes()))
    [shard] = Shards(tmp_path / "s")
    with pytest.raises(ShardError, match="compressed with gzip"):
        shard.samples()
    make("s/a.tar")
    assert [shard.path.name for shard in Shards(tmp_path / "s")] == ["a.tar"]


def test_webdataset_writes_what_is_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "w-000.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for i in range(20):
            sink.write({"__key__": f"k/{i:05d}", "json": {"i": i}, "jpg": bytes([i]) * 100 * i, "txt": f"t {i}"})
    found = list(Shard(path).samples())
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert len(found) == len(theirs) == 20
    for (key, files), sample in zip(found, theirs, strict=True):
        assert key == sample["__key__"]
        assert {ext: member.read() for ext, member in files.items()} == {
            ext: value for ext, value in sample.items() if not ext.startswith("__")
        }
        assert json.loads(files["json"].read())["i"] == int(key[2:])
        assert read_member(member_path(path, files["jpg"].name)) == sample["jpg"]
