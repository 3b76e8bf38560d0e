"""Is a data set fit for training? Every image it names and every record of it, looked at once.

report = check("rec.json", "images")
report.counts        {"image-missing": 2, "box-outside": 1}
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from groma.data import check_files
from groma.data.check_images import Progress, check_images
from groma.data.check_notes import KINDS, Finding, Notes
from groma.data.formats import open_records
from groma.data.records import AnnotationError
from groma.data.shards import split_path

AUTO = "auto"


@dataclass(frozen=True)
class Report:
    """What a check found. ``records``: of the file; ``images``: named in it; ``found``: of those, readable ones."""

    file: str
    format: str
    records: int
    images: int
    found: int
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each kind that occurs, in the order of KINDS."""
        counted = Counter(finding.kind for finding in self.findings)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain JSON values."""
        return {**asdict(self), "counts": self.counts}

    def lines(self, most: int = 20) -> list[str]:
        """For people: a heading, then each kind with its count and its first ``most`` findings."""
        heading = f"{self.file} ({self.format}): {self.records} records, {self.found} of {self.images} images readable"
        lines = [heading if self.findings else f"{heading}, nothing wrong"]
        for kind, count in self.counts.items():
            lines.append(f"{kind}: {count} ({KINDS[kind]})")
            told = [f for f in self.findings if f.kind == kind]
            lines += [f"  {finding.record}  {finding.told}" for finding in told[:most]]
            lines += [f"  … and {count - most} more"] if count > most else []
        return lines


def check(
    annotations: str | Path,
    images: str | Path,
    form: str = AUTO,
    split: str = "",
    fast: bool = False,
    jobs: int = 1,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Look through an annotation file and the images it names.

    ``form``: one of groma.settings.FORMATS, or "auto", which looks at a JSON file's first record. ``split``: the part
    of a set whose files hold several. ``fast``: headers of images only. ``jobs``: threads that decode images. Raises
    AnnotationError for what cannot be read as that format at all: everything less is a finding.
    """
    file, folder = Path(annotations), Path(images)
    if not folder.is_dir() and split_path(folder) is None:
        raise AnnotationError(f"{folder}: no such folder of images")
    form = guess(file) if form == AUTO else form
    records = open_records(form, file, folder, split=split, max_problems=1.0)
    notes = Notes(file, folder, "xyxy" if form == "jsonl" else "xywh")
    look = check_files.RAW.get(form)
    if look is None:
        check_files.as_read(notes, records)
    else:
        look(notes)
    if not notes.records:
        raise AnnotationError(f"{file}: no record in it")
    notes.judge_boxes()
    for problem in records.problems:
        notes.add("record-unusable", file.name, problem.removeprefix(f"{file}: "))
    if more := records.problems.total - len(records.problems):
        notes.add("record-unusable", file.name, f"{more} more, which are counted but not told")
    named, notes.images = notes.images, {}
    for name, sizes in named.items():  # where the reader looks: Objects365 and V3Det write folders that are not there
        for size, record in sizes.items():
            notes.image(records.path(name).removeprefix(f"{records.images}/"), record, size)
    found = check_images(notes, fast, jobs, progress)
    return Report(str(file), form, notes.records, len(notes.images), found, tuple(notes.findings))


def guess(file: Path) -> str:
    """The format of a file whose format was not said. Raises AnnotationError where it cannot be told."""
    if file.suffix == ".jsonl":
        return "jsonl"
    if file.suffix != ".json":
        raise AnnotationError(f"{file}: its format cannot be told from its name; say --format")
    return check_files.json_layout(file)
