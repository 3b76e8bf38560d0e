"""A million records: first start, later start, memory and disk, printed: pytest -m slow -s tests/data/test_scale.py"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RECORDS = 1_000_000
WORDS = "a red cup on the wooden table beside an old lamp with two green bowls behind it while rain falls".split()

START = """
import json, sys, time
from pathlib import Path
from groma.data.formats import open_records

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

form, path = sys.argv[1:]
open_records(form, path + ".small", "/")  # imports, and first uses, are not the records'
before, started, worked = memory("VmRSS"), time.perf_counter(), time.process_time()
data = open_records(form, path, "/")
took, worked = time.perf_counter() - started, time.process_time() - worked
after, peak = memory("VmRSS"), memory("VmHWM")
started = time.process_time()
for i in range(0, len(data), len(data) // 1000):
    data[i]
each = (time.process_time() - started) / 1000
print(json.dumps(dict(count=len(data), took=took, worked=worked, grown=after - before, peak=peak - before, each=each,
                      disk=data.entries.nbytes)))
"""


def llava(count: int) -> Iterator[str]:
    draw = random.Random(0)
    yield "["
    for i in range(count):
        turns = [
            {
                "from": ("human", "gpt")[j % 2],
                "value": ("<image>\n" if j == 0 else "") + " ".join(draw.choices(WORDS, k=12)),
            }
            for j in range(4)
        ]
        yield ",\n" * (i > 0) + json.dumps({"id": f"{i:012d}", "image": f"train/{i:012d}.jpg", "conversations": turns})
    yield "]"


def coco(count: int) -> Iterator[str]:
    """``count`` annotations of a third as many images, in another order, before the images."""
    draw = random.Random(0)
    yield '{"annotations": ['
    for i in range(count):
        mark = {"id": i, "image_id": draw.randrange(count // 3), "category_id": 1, "iscrowd": 0, "area": 12.5}
        corner = [round(draw.uniform(0, 300), 2), round(draw.uniform(0, 300), 2), 40.25, 50.75]
        yield "," * (i > 0) + json.dumps({**mark, "bbox": corner, "segmentation": [[*corner] * 4]})
    yield '], "images": ['
    for i in range(count // 3):
        yield "," * (i > 0) + json.dumps({"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480})
    yield '], "categories": [{"id": 1, "name": "thing"}]}'


@pytest.mark.slow
@pytest.mark.parametrize("form, lines", [("llava", llava), ("detection", coco)])
def test_a_million_records(root: Path, tmp_path: Path, form: str, lines: Callable[[int], Iterator[str]]) -> None:
    path = tmp_path / f"{form}.json"
    for file, count in ((path, RECORDS), (Path(f"{path}.small"), 30)):
        with file.open("w") as out:
            out.writelines(lines(count))
    environment = {**os.environ, "GROMA_CACHE": str(tmp_path / "cache")}
    starts = []
    for _ in range(2):
        command = [sys.executable, "-c", START, form, str(path)]
        run = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert run.returncode == 0, run.stderr
        starts.append(json.loads(run.stdout))
    first, later = starts
    count, size = first["count"], path.stat().st_size
    print(
        f"\n{form}: {count} samples of {RECORDS} records in {size >> 20} MB"
        f"\n  first {first['took']:7.2f} s ({first['worked']:.0f} of work), {first['peak'] >> 20} MB more memory"
        f"\n  later {later['took']:7.2f} s, {later['grown'] / count:.1f} bytes of memory a sample"
        f"\n  on disk {first['disk'] / count:.0f} bytes a sample; {later['each'] * 1e6:.0f} µs to read one"
    )
    assert first["count"] == later["count"] == (RECORDS if form == "llava" else RECORDS // 3)
    assert first["peak"] < 150 << 20
    assert later["grown"] < 24 * count
