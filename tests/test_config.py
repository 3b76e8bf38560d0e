"""Run configurations: inheritance, overrides, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from groma.config import ConfigError, _keys, load_config, save_config

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
        ("data.max_skipped=1.5", "data.max_skipped is 1.5; expected a share from 0 to 1"),
        ("optim.warmup_ratio=3", "optim.warmup_ratio is 3.0; expected a share from 0 to 1"),
        ("model.lora.dropout=nan", "model.lora.dropout is nan; expected a share from 0 to 1"),
        ("model.lora.alpha=0", "model.lora.alpha is 0.0; expected a number above 0"),
        ("model.lora.rank=-1", "model.lora.rank is -1; expected 0 or more"),
        ("model.lora.rank=8", "'llm' must be in model.train"),
        ("model.quantise=3bit", "model.quantise is '3bit'; expected one of 8bit, 4bit"),
        ("model.quantise=4bit", "model.quantise is 4bit, in which no weight learns: give model.lora.rank too"),
        ("model.frozen_dtype=float16", "model.frozen_dtype is 'float16'; expected one of float32, bfloat16"),
        ("model.lr_scale.proposer=0", "model.lr_scale.proposer is 0.0; expected a number above 0"),
        ("model.lr_scale.llm=1", "model.lr_scale names 'llm', which does not learn: model.train is encoder, proposer"),
        ("optim.loss_weights.l1=-1", "optim.loss_weights.l1 is -1.0; expected 0 or more"),
        ("optim.max_nonfinite=-1", "optim.max_nonfinite is -1; expected 0 or more"),
        ("data.workers=-1", "data.workers is -1; expected 0 or more"),
        ("data.pack=true", "data.pack packs dialogues, and stage detection has none"),
        ("data.proposal_cache=x", "keeps what frozen parts propose: encoder and proposer must be out of model.train"),
        ("data.sources.0.source=gold", "data.sources.0.source is 'gold'; expected one of coco, sa1b"),
        ("data.sources.0.cap=-1", "data.sources.0.cap is -1; expected 0 or more"),
        ("data.sources.0.turns=-1", "data.sources.0.turns is -1; expected 0 or more"),
        ("data.sources.0.negatives=2", "data.sources.0.negatives is 2.0; expected a share from 0 to 1"),
        ("data.sources.0.negatives=0.1", "format 'regions' asks for nothing, so nothing can be absent"),
        ("data.sources.0.format=refer", "data.sources.0.split must be given: .* format 'refer' hold every split"),
        ("evaluate.every=5", "evaluate.every is 5, but neither evaluate.proposals nor evaluate.rec is given"),
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


def test_every_key_is_documented() -> None:
    keys = [(name.rpartition(".")[2], home) for name, home in _keys()]
    assert len(keys) > 60
    assert [f"{home.__name__}.{key}" for key, home in keys if f"``{key}``" not in home.__doc__] == []


def test_two_sources_of_one_name(good: Path, tmp_path: Path) -> None:
    twice = "data: {sources: [{name: a, format: rec, ann: a, images: i}, {name: a, format: llava, ann: b, images: i}]}"
    with pytest.raises(ConfigError, match="data.sources.1.name is 'a', like data.sources.0; expected another"):
        load_config(write(tmp_path, "twice.yaml", f"base: good.yaml\n{twice}"))


def test_what_needs_another_key_is_taken_with_it(good: Path) -> None:
    run = load_config(
        good, ["stage=instruct", "model.train=[llm, bridge]", "model.lora.rank=8", "model.quantise=4bit",
               "data.pack=true", "data.proposal_cache=kept", "data.sources.0.format=refer",
               "data.sources.0.split=train", "data.sources.0.negatives=0.2", "model.lr_scale.bridge=0.1",
               "optim.loss_weights.l1=0"],
    )  # fmt: skip
    assert (run.model.lora.rank, run.model.quantise, run.data.pack) == (8, "4bit", True)


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
