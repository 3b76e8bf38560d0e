"""pack: the same entries from memory and from disk, built once, by one process, whole or not at all."""

import copy
import json
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from groma.data import store
from groma.data.cache import CacheError, build_once, found
from groma.data.records import AnnotationError, Records
from groma.data.store import Packed, Problems, Spill, pack
from groma.structures import Sample

VALUES = [1, "ä", {"a": [1.5, None]}, [], "\ud800", {"b": "x" * 3000}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GROMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is kept on disk."""
    monkeypatch.setattr(store, "LARGE", 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a b.json"
    path.write_text("[]")
    return path


class Reads:
    """A ``read`` that counts how often it is asked, and notes a problem."""

    def __init__(self, values: list[Any] = VALUES) -> None:
        self.values, self.asked, self.problems = values, 0, Problems()

    def __call__(self) -> Iterator[Any]:
        self.asked += 1
        self.problems.append("one")
        yield from self.values

    def pack(self, file: Path, key: str = "k") -> Packed:
        return pack(self, self.problems, [file], key)


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "entries").iterdir() if path.is_dir())


def test_in_memory(file: Path, cache: Path) -> None:
    packed = Reads().pack(file)
    assert list(packed) == VALUES
    assert (len(packed), packed.problems, packed.folder) == (6, ["one"], None)
    with pytest.raises(IndexError):
        packed[6]
    assert not cache.exists()
    assert list(pickle.loads(pickle.dumps(packed))) == VALUES


@pytest.mark.usefixtures("large")
def test_on_disk_is_read_once(file: Path, cache: Path) -> None:
    first, second = Reads(), Reads()
    built, mapped = first.pack(file), second.pack(file)
    assert list(built) == list(mapped) == VALUES
    assert (first.asked, second.asked) == (1, 0)
    assert mapped.problems == ["one"]
    assert mapped.problems.total == 1
    [folder] = folders(cache)
    assert folder == mapped.folder
    assert sorted(path.name for path in folder.iterdir()) == ["ends.npy", "entries.bin", "meta.json"]
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["key"], meta["files"]) == ("k", [[str(file), 2, file.stat().st_mtime_ns]])
    assert not mapped.ends.flags.owndata
    assert not mapped.data.flags.owndata


@pytest.mark.usefixtures("large")
def test_a_change_builds_anew(file: Path) -> None:
    Reads().pack(file)
    other = Reads([1])
    assert (list(other.pack(file, "other key")), other.asked) == ([1], 1)
    file.write_text("[ ]")
    changed = Reads([2])
    assert (list(changed.pack(file)), changed.asked) == ([2], 1)


@pytest.mark.usefixtures("large")
def test_none_at_all(file: Path) -> None:
    for _ in range(2):
        packed = Reads([]).pack(file)
        assert (list(packed), len(packed), packed.nbytes) == ([], 0, 0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["entries.bin", "ends.npy", "meta.json"])
def test_a_damaged_index_does_not_count(file: Path, cache: Path, name: str) -> None:
    Reads().pack(file)
    damaged = folders(cache)[0] / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    reads = Reads()
    assert (list(reads.pack(file)), reads.asked) == (VALUES, 1)


@pytest.mark.usefixtures("large")
def test_sent_to_a_worker_by_name(file: Path, cache: Path) -> None:
    packed = Reads([list(range(10000))] * 10).pack(file)
    sent = pickle.dumps(packed)
    assert len(sent) < 1000
    assert list(pickle.loads(sent)) == list(packed)
    (folders(cache)[0] / "meta.json").unlink()
    with pytest.raises(CacheError, match="the index is gone"):
        pickle.loads(sent)


def test_large_entries_of_small_files_go_to_disk_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGE", 1000)
    first, second = Reads(), Reads()
    built, mapped = first.pack(file), second.pack(file)
    assert list(built) == list(mapped) == VALUES
    assert built.folder == mapped.folder is not None
    assert (first.asked, second.asked) == (2, 0)
    assert (built.problems, mapped.problems.total) == (["one"], 1)  # not those of both readings


@pytest.mark.usefixtures("large")
def test_a_reading_that_fails_leaves_nothing(file: Path, cache: Path) -> None:
    def read() -> Iterator[Any]:
        yield "x" * (3 << 20)
        raise AnnotationError("cut")

    with pytest.raises(AnnotationError, match="^cut$"):
        pack(read, Problems(), [file], "k")
    assert folders(cache) == []


@pytest.mark.usefixtures("large")
def test_a_file_written_to_meanwhile(file: Path, cache: Path) -> None:
    def read() -> Iterator[Any]:
        yield 1
        file.write_text("[1, 2]")

    with pytest.raises(CacheError, match="changed while"):
        pack(read, Problems(), [file], "k")
    assert folders(cache) == []


@pytest.mark.usefixtures("large")
def test_a_cache_that_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROMA_CACHE", str(file / "inside a file"))
    with pytest.raises(CacheError) as error:
        Reads().pack(file)
    assert str(file / "inside a file") in str(error.value)
    assert "set $GROMA_CACHE" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("entries", [["x" * 999] * 9000, [1] * 60000], ids=["entries", "ends"])
def test_a_full_disk(file: Path, cache: Path, entries: list[Any]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(CacheError, match=r"cannot be written.*set \$GROMA_CACHE") as error:
            Reads(entries).pack(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert folders(cache) == []
    assert list(Reads(entries).pack(file)) == entries


BUILDER = """
import sys, time
from pathlib import Path
from groma.data import store
store.LARGE = 0
def read():
    Path(sys.argv[2]).open("a").write("read\\n")
    for i in range(30):
        yield "x" * 100_000
        time.sleep(float(sys.argv[3]))
packed = store.pack(read, store.Problems(), [Path(sys.argv[1])], "k")
print(len(packed), sum(map(len, packed)))
"""


def start(root: Path, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BUILDER, *map(str, arguments)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def test_one_of_several_processes_builds(root: Path, file: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    ranks = [start(root, file, told, 0.01) for _ in range(2)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["30 3000000\n"] * 2
    assert told.read_text() == "read\n"


def test_a_killed_build_does_not_count(root: Path, file: Path, cache: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    process = start(root, file, told, 0.5)
    while not list(cache.glob("entries/*.tmp/entries.bin")) or not told.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert [path.suffix for path in folders(cache)] == [".tmp"]
    assert start(root, file, told, 0).communicate(timeout=120)[0] == "30 3000000\n"
    assert told.read_text() == "read\nread\n"
    assert [path.suffix for path in folders(cache)] == [folders(cache)[0].suffix] != [".tmp"]


def test_build_once_names_by_all_files(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for path in files:
        path.write_text("x")
    built = build_once("kind", "k", files, lambda folder: {})
    assert found("kind", "k", files) == built
    assert found("kind", "k", files[:1]) is None
    assert found("kind", "other", files) is None
    files[1].write_text("xy")
    assert found("kind", "k", files) is None


# -- problems


def test_problems_are_counted_beyond_those_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PROBLEMS_KEPT", 2)
    problems = Problems()
    problems.extend("abc")
    problems.append("d")
    for same in (problems, pickle.loads(pickle.dumps(problems)), copy.copy(problems)):
        assert (same, same.total) == (["a", "b"], 4)
    problems.clear()
    assert (problems, problems.total) == ([], 0)


class Numbers(Records):
    def _read(self) -> Iterator[Any]:
        for i in range(1000):
            if self._usable(self._odd, i) is not None:
                yield i

    def _odd(self, i: int) -> int:
        if i % 4 == 0:
            raise AnnotationError(f"{self.file}: {i}")
        return i

    def _sample(self, entry: Any, draw: Any) -> Sample:
        raise NotImplementedError


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_the_share_is_of_all_problems(file: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(store, "PROBLEMS_KEPT", 5)
    monkeypatch.setattr(store, "LARGE", limit)
    for _ in range(2):
        with pytest.raises(AnnotationError, match="250 of 1000 records unusable, more than 24.0%.*: 0$"):
            Numbers(file, "/im", max_problems=0.24)
        data = Numbers(file, "/im", max_problems=0.25)
        assert (len(data), len(data.problems), data.problems.total) == (750, 5, 250)


# -- Spill


@pytest.mark.parametrize("limit", [0, 50, 1 << 20])
def test_spill(monkeypatch: pytest.MonkeyPatch, limit: int, cache: Path) -> None:
    monkeypatch.setattr(store, "LARGE", limit)
    spill = Spill()
    keys: list[Any] = [5, "b", 5, 2**70, "5", -1, "b", 0]
    for i, key in enumerate(keys):
        spill.add(key, [i, "ö" * 10])
    read: Callable[[Any], list[int]] = lambda key: [i for i, _ in spill[key]]  # noqa: E731
    assert [read(key) for key in (5, "b", "5", 2**70, -1, 0)] == [[0, 2], [1, 6], [4], [3], [5], [7]]
    assert read(7) == read("c") == []
    assert [[i for i, _ in group] for group in spill] == [[0, 2], [1, 6], [3], [4], [5], [7]]
    known = Spill()
    for key in ("5", 5, "z"):
        known.add(key, None)
    assert [i for i, _ in spill.others(known)] == [1, 3, 5, 6, 7]
    assert [i for i, _ in spill.repeats()] == [2, 6]
    assert not [path for path in cache.glob("*") if path.is_file()]  # the file has no name


def test_spill_of_nothing() -> None:
    spill = Spill()
    assert (spill[1], list(spill), list(spill.others(Spill())), list(spill.repeats())) == ([], [], [], [])
