"""The published recipe: its configurations, the folders that datasets/README.md describes, and ten steps of each stage
on the stand-in that datasets/make_standin.py lays out there."""

from __future__ import annotations

import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from groma.config import ConfigError, load_config
from groma.data.loader import collate
from groma.processor import GromaProcessor
from groma.settings import RunConfig
from groma.training.callbacks import read_metrics
from groma.training.data import examples, model_inputs
from groma.training.recipe import missing_sets, require_inputs
from groma.training.run import train

STAGES = (1, 2, 3)
GPUS = 8


def recipe(stage: int, root: Path | str = "/data", *more: str) -> RunConfig:
    return load_config(f"stage{stage}.yaml", [f"data_root={root}", "output=out", "model.init=start", *more])


@pytest.fixture(scope="module")
def standin(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "standin"
    command = [sys.executable, "datasets/make_standin.py", str(folder), "--pictures", "4"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{folder}\n"
    return folder


@pytest.fixture(scope="module")
def sections(root: Path) -> dict[str, list[str]]:
    """The headings of datasets/README.md → the paths below data_root that each lists."""
    _, *texts = re.split(r"^## ", (root / "datasets" / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        text.partition("\n")[0]: [
            line.split("  ")[0].strip()
            for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
            for line in block.splitlines()
        ]
        for text in texts
    }


# What the paper says (arXiv 2404.13013): parts that learn, epochs, records a step, rate, decay, warm-up, shares.
PUBLISHED = {
    1: ({"proposer"}, 12, 64, 2e-4, 1e-4, (100, 0.0), {}),
    2: ({"bridge", "regions", "vocabulary"}, 2, 128, 1e-4, 0.0, (0, 0.03), {"grit": 0.1}),
    3: ({"bridge", "regions", "vocabulary", "llm"}, 1, 128, 1e-5, 0.0, (0, 0.03), {"sharegpt4v": 0.23, "coco": 0.5}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_published_numbers(stage: int) -> None:
    run = recipe(stage)
    parts, epochs, batch, rate, decay, warmup, shares = PUBLISHED[stage]
    optim = run.optim
    assert run.stage == ("detection", "alignment", "instruct")[stage - 1]
    assert (set(run.model.train), optim.epochs, optim.max_steps) == (parts, epochs, 0)
    assert optim.batch_size * optim.accumulate * GPUS == batch
    assert (optim.lr, optim.weight_decay, optim.warmup_steps, optim.warmup_ratio) == (rate, decay, *warmup)
    assert (optim.schedule, optim.clip, optim.dtype, run.data.max_length) == ("cosine", 1.0, "bfloat16", 2048)
    assert {s.name: s.ratio for s in run.data.sources if s.ratio != 1} == shares
    assert {s.name for s in run.data.sources if s.source == "sa1b"} == ({"sa1b"} if stage == 1 else set())
    assert (optim.gradient_checkpointing, optim.deepspeed) == ((True, "zero3.json") if stage == 3 else (False, None))
    assert not any(s.negatives for s in run.data.sources)  # the paper trains on none


@pytest.mark.parametrize("stage", STAGES)
def test_every_path_is_in_the_section_it_names(stage: int, sections: dict[str, list[str]]) -> None:
    for source in recipe(stage, "ROOT").data.sources:
        assert source.section in sections, source.name
        listed = [Path(path) for section in sections.values() for path in section]
        own = [Path(path) for path in sections[source.section]]
        for path, among in ((Path(source.ann), own), (Path(source.images), listed)):
            below = path.relative_to("ROOT")
            assert any(below in (there, *there.parents) for there in among), f"{source.name}: {below}"


def test_every_path_of_the_readme_is_in_the_standin(sections: dict[str, list[str]], standin: Path) -> None:
    for path in (path for section in sections.values() for path in section):
        folder = (standin / path).parent
        assert folder.is_dir(), path
        assert path.endswith("…") or any(there.suffix == Path(path).suffix for there in folder.iterdir()), path


def test_the_commands_of_the_readme_run(
    root: Path, standin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(standin, tmp_path / "data", symlinks=True)
    text = (root / "datasets" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line.partition("#")[0].strip() for line in text.splitlines() if "python datasets/prepare_" in line]
    assert len(commands) == 3
    for command in commands:
        _, script, *words = shlex.split(command.replace("/data/", f"{tmp_path}/data/"))
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(str(root / script), run_name="__main__")
    made = json.loads((tmp_path / "data" / "refcoco" / "refcocog_train.json").read_text())
    assert {image["file_name"] for image in made["images"]} == {f"{i:012}.jpg" for i in (2, 3, 4)}  # 1 is of val


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_missing_from_the_standin(stage: int, standin: Path) -> None:
    assert missing_sets(recipe(stage, standin)) == []


def test_what_is_missing_is_told_at_once(standin: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(standin, data, symlinks=True)
    (data / "refcoco" / "refcoco" / "instances.json").unlink()
    (data / "vg" / "image_data.json").unlink()
    shutil.rmtree(data / "grit")
    assert missing_sets(recipe(2, data)) == [
        f"refcoco: no {data}/refcoco/refcoco/instances.json (datasets/README.md, section "
        "'RefCOCO, RefCOCO+, RefCOCOg')",
        f"vg: no {data}/vg/image_data.json (datasets/README.md, section 'Visual Genome')",
        f"grit: no {data}/grit (datasets/README.md, section 'GRIT')",
    ]
    packed = recipe(2, data, f"data.sources.6.ann={data}/grit.tar", f"data.sources.6.images={data}/grit.tar/in/it")
    (data / "grit.tar").write_bytes(b"")
    assert [line.partition(":")[0] for line in missing_sets(packed)] == ["refcoco", "vg"]  # a tar is opened later
    scored = [f"evaluate.proposals={{ann: {data}/no.json, images: {data}}}", "evaluate.every=5"]
    assert missing_sets(recipe(1, data, *scored)) == [f"evaluate.proposals: no {data}/no.json"]
    assert missing_sets(recipe(1, data, scored[0])) == []  # never asked for
    with pytest.raises(ConfigError, match=r"^model.init: no config.json in start; data sets missing \(3\): refcoco: "):
        require_inputs(recipe(2, data))


def test_the_tool_names_all_of_it_in_one_line(root: Path) -> None:
    given = ["data_root=/nowhere", "output=/nowhere/out", "model.init=/nowhere/init"]
    command = [sys.executable, "tools/train_net.py", "--config", "stage1.yaml", *given]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    for told in ("no config.json in /nowhere/init", "missing (5)", "/nowhere/coco/train2017", "section 'COCO'",
                 "/nowhere/sa1b", "section 'SA-1B'"):  # fmt: skip
        assert told in done.stderr


SMALL = ("model.init=null", "model.frozen_dtype=float32", "data.workers=0", "optim.batch_size=2", "optim.accumulate=1",
         "optim.max_steps=10", "optim.dtype=float32", "optim.matmul_precision=highest", "optim.deepspeed=null",
         "log={every: 1, tensorboard: false}", "save.every=0")  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_every_set_reaches_the_model(stage: int, standin: Path, tiny: Path) -> None:
    run = recipe(stage, standin, *SMALL, f"model.config={tiny}")
    mixture, dataset = examples(run, GromaProcessor.from_pretrained(str(tiny)))
    seen = set()
    for keys in mixture:
        if keys[0].source not in seen:
            seen.add(keys[0].source)
            inputs = model_inputs(collate([dataset.make(key) for key in keys]))
            assert len(inputs["pixel_values"]) == 2
            assert ("targets" in inputs) == (stage == 1)
            assert ("labels" in inputs) == (stage > 1)
    assert len(seen) == len(run.data.sources)
    assert [problem for source in mixture.sources for problem in source.records.problems] == []


@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps(stage: int, standin: Path, tiny: Path, tmp_path: Path) -> None:
    final = train(recipe(stage, standin, *SMALL, f"model.config={tiny}", f"output={tmp_path}"), device="cpu")
    assert (final / "config.json").is_file()
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["event"] == "train"]
    assert len(losses) == 10
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_the_standin_is_the_same_again_and_spares_what_is_there(root: Path, standin: Path, tmp_path: Path) -> None:
    command = [sys.executable, "datasets/make_standin.py", str(tmp_path / "again"), "--pictures", "4"]
    subprocess.run(command, cwd=root, capture_output=True, timeout=60, check=True)
    files = [path.relative_to(standin) for path in standin.rglob("*") if path.is_file()]
    assert len(files) > 80
    assert [f for f in files if (standin / f).read_bytes() != (tmp_path / "again" / f).read_bytes()] == []
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "is not an empty folder" in done.stderr
