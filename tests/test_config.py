"""Run configurations: inheritance, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from groma.config import ConfigError, load_config, save_config

GOOD = """
stage: detection
output: out
data_root: /data
model: {config: tiny, train: [encoder, proposer]}
data: {sources: [{name: a, format: regions, ann: "${data_root}/a.json", images: "${data_root}/images"}]}
optim: {lr: 1e-3}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_bases_overrides_and_interpolation(good: Path, tmp_path: Path) -> None:
    write(tmp_path, "middle.yaml", "base: good.yaml\noptim: {batch_size: 8}\nseed: 5")
    top = write(tmp_path, "top.yaml", "base: middle.yaml\nstage: alignment\nseed: 6")
    run = load_config(top, ["optim.lr=2e-5", "data_root=/other", "data.sources.0.ratio=0.5", "evaluate.rec.ann=r",
                            "data.sources[0].turns=3", "evaluate.rec.images=i", "optim.loss_weights.l1=2"])  # fmt: skip
    assert (run.stage, run.seed, run.optim.batch_size, run.optim.lr) == ("alignment", 6, 8, 2e-5)
    assert run.data.sources[0].ann == "/other/a.json"
    assert (run.data.sources[0].ratio, run.data.sources[0].turns) == (0.5, 3)
    assert run.optim.loss_weights == {"l1": 2.0}
    assert run.evaluate.rec is not None and run.evaluate.proposals is None
    assert run.prompt_stage == "align"
    assert load_config(good).prompt_stage == "instruct"


def test_saved_configuration_reads_back_equal(good: Path, tmp_path: Path) -> None:
    run = load_config(good, ["evaluate.proposals.ann=a", "evaluate.proposals.images=b", "data.words=[cup, red]"])
    save_config(run, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr_rate=1", "optim.lr_rate in override .*: no such key; nearest: optim.lr$"),
        ("batch_size=3", "nearest: optim.batch_size"),
        ("data.sources.0.rato=1", "nearest: data.sources.ratio"),
        ("optim.lr=abc", "optim.lr in override 'optim.lr=abc': Value 'abc' of type 'str' could not be converted to Fl"),
        ("optim.max_steps=1.5", "could not be converted to Integer"),
        ("optim.lr=[1", "the value is not YAML"),
        ("optim.lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("optim=3", "optim in override"),
        ("optim.lr.x=3", "optim.lr in override"),
        ("foo.bar=3", "foo in override .*: no such key; nearest"),
        ("evaluate.rec.an=3", "nearest: evaluate.\\w+.ann"),
        ("data.sources.7.ratio=1", "data.sources.7. in override"),
        ("stage=other", "stage is 'other'; expected one of detection, alignment, instruct"),
        ("model.train=[legs]", "'legs'; expected one of encoder, proposer"),
        ("model.train=[]", "model.train is empty"),
        ("model.init=x", "exactly one of model.init"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources.0.format=voc", "data.sources.0.format is 'voc'; expected one of detection, regions"),
        ("data.sources.0.ratio=0", "expected a share above 0"),
        ("optim.batch_size=0", "optim.batch_size is 0; expected a number above 0"),
        ("optim.lr=nan", "optim.lr is nan"),
        ("optim.warmup_steps=-1", "expected 0 or more"),
        ("optim.schedule=step", "expected one of cosine, linear, constant"),
        ("evaluate.rec.ann=x", "evaluate.rec.images must be given"),
        ("output=???", "output must be given"),
        ("output=${nothing}", "'nothing' not found"),
        ("data.words=3", "data.words is 3"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(good: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(good, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: good.yaml\noptim: {lr_rate: 1}", "^optim.lr_rate in bad.yaml: no such key; nearest: optim.lr$"),
        ("base: good.yaml\noptim: {lr: fast}", "^optim.lr in bad.yaml: Value 'fast'"),
        ("base: good.yaml\ndata: {sources: [{form: rec}]}", "form in bad.yaml: no such key; .*sources.format$"),
        ("base: bad.yaml", "^bad.yaml: bases form a cycle: bad.yaml -> bad.yaml$"),
        ("base: nowhere.yaml", "base 'nowhere.yaml' not found; beside it: bad.yaml, good.yaml"),
        ("base: good.yaml\ndata_root: ???", "data_root.* must be given"),
        ("stage: [", "not readable YAML"),
        ("- a\n- b", "expected a mapping of keys, got a list"),
        ("", "must be given"),
    ],
)  # fmt: skip
def test_bad_files(good: Path, tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_longer_cycle_names_every_file(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml")
    write(tmp_path, "b.yaml", "base: a.yaml")
    with pytest.raises(ConfigError, match="a.yaml: bases form a cycle: a.yaml -> b.yaml -> a.yaml"):
        load_config(tmp_path / "a.yaml")


def test_missing_file_says_what_ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, good: Path) -> None:
    monkeypatch.setattr("groma.config.SHIPPED", tmp_path)
    assert load_config("good.yaml").output == "out"  # a bare name is looked up among the shipped ones
    with pytest.raises(ConfigError, match="no configuration 'stage9.yaml'; shipped ones: good.yaml"):
        load_config("stage9.yaml")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tabletop_configurations(root: Path, stage: int) -> None:
    path = root / "projects" / "tabletop" / "configs" / f"stage{stage}.yaml"
    run = load_config(path, ["data_root=/d", "output=o", "model.init=m"])
    assert run.stage == ("detection", "alignment", "instruct")[stage - 1]
    assert all(source.ann.startswith("/d/train/") for source in run.data.sources)
    header = path.read_text().split("\nbase:")[0]
    assert all(f"# {word}:" in header for word in ("command", "hardware", "hours", "expected"))
