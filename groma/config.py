"""The typed configuration of a training run: strict YAML, ``base:`` inheritance, ``key=value`` overrides.

A file may start from another one (``base: base.yaml``, relative to the file) and refer to its own keys::

    base: base.yaml
    stage: alignment
    optim: {lr: 1.0e-4, batch_size: 32}
    data: {sources: [{name: rec, format: rec, ann: "${data_root}/train/rec.json", images: "${data_root}/train/images"}]}

Every key is one of the dataclasses of groma.settings; anything else is refused by name, with the
nearest key that exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_type_hints

from groma.settings import (
    BOX_FORMATS,
    CHOICES,
    FORMATS,
    HEADS,
    NOT_NEGATIVE,
    PARTS,
    POSITIVE,
    SHARES,
    SPLIT_FORMATS,
    RunConfig,
)

SHIPPED = Path(__file__).parent / "configs"
"""Where a bare name such as ``stage2.yaml`` is looked up after the path itself."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that names the file and the key."""


def load_config(path_or_name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration: its chain of bases, the file itself, then ``key=value`` overrides, in that order.

    Raises ConfigError for a missing file, a cycle of bases, an unknown key, a wrong type or an impossible value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = _find(str(path_or_name))
    config = OmegaConf.structured(RunConfig)
    for layer in _chain(path):
        config = _merge(config, layer)
    for override in overrides:
        _override(config, override)
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        run = None if missing else OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_told(error, path.name)) from error
    if not isinstance(run, RunConfig):
        raise ConfigError(f"{path.name}: {', '.join(missing)} must be given")
    _check(run, path.name)
    return run


def save_config(run: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that ``load_config`` reads back to an equal value."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(run), path)


def _find(name: str) -> Path:
    """The file of a path or of a shipped name."""
    for candidate in (Path(name), SHIPPED / name):
        if candidate.is_file():
            return candidate
    shipped = sorted(p.name for p in SHIPPED.glob("*.yaml"))
    raise ConfigError(f"no configuration {name!r}; shipped ones: {', '.join(shipped) or 'none'}")


def _read(path: Path) -> dict[str, Any]:
    """The YAML mapping of one file, interpolations untouched."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path.name}: not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name}: expected a mapping of keys, got a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _chain(path: Path) -> list[Path]:
    """The files a configuration is made of, the deepest base first."""
    chain = [path]
    while base := _read(chain[0]).get("base"):
        below = chain[0].parent / str(base)
        if not below.is_file():
            there = sorted(p.name for p in chain[0].parent.glob("*.yaml"))
            raise ConfigError(f"{chain[0].name}: base {base!r} not found; beside it: {', '.join(there)}")
        if below.resolve() in (p.resolve() for p in chain):
            names = " -> ".join(p.name for p in [*reversed(chain), below])
            raise ConfigError(f"{path.name}: bases form a cycle: {names}")
        chain.insert(0, below)
    return chain


def _merge(config: Any, layer: Path) -> Any:
    """``config`` with one file's keys on top."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    keys = {key: value for key, value in _read(layer).items() if key != "base"}
    try:
        merged = OmegaConf.merge(config, OmegaConf.create(keys))
        for key in _required(keys):  # merging leaves a default where a file says ???, "must be given"
            OmegaConf.update(merged, key, "???")
        return merged
    except OmegaConfBaseException as error:
        raise ConfigError(_told(error, layer.name)) from error


def _required(content: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """Dotted keys that a file marks with ``???``: they must be given by a file on top of it or an override."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _required(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"


def _override(config: Any, override: str) -> None:
    """Set one ``key=value`` in place; the value is read as YAML."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, for example optim.lr=1e-4")
    parent, _, last = key.rpartition(".")
    try:  # OmegaConf's own loader reads 1e-4 as a number, which YAML 1.1 does not.
        read = OmegaConf.to_container(OmegaConf.create(f"value: {text or 'null'}"), resolve=False)
        value = read["value"] if isinstance(read, dict) else None
        if parent and OmegaConf.select(config, parent) is None:
            OmegaConf.update(config, parent, {last: value}, merge=True)  # an optional section, still absent
        else:
            OmegaConf.update(config, key, value, merge=True)
    except YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {str(error).splitlines()[0]}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_told(error, f"override {override!r}")) from error


def _told(error: Any, where: str) -> str:
    """One line about an error of OmegaConf: the key, where it stands, and what is wrong or nearest."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationKeyError

    unknown = isinstance(error, (ConfigAttributeError, ConfigKeyError)) and is_dataclass(error.object_type)
    if unknown and not isinstance(error, InterpolationKeyError):
        return f"{error.full_key} in {where}: no such key; nearest: {_nearest(str(error.key), error.object_type)}"
    return f"{error.full_key} in {where}: {str(error).splitlines()[0]}"


def _nearest(key: str, section: Any) -> str:
    """The existing key most like the unknown ``key`` of a section: in that section first, then anywhere."""
    keys = dict(_keys())
    siblings = {name.rpartition(".")[2]: name for name, home in keys.items() if home is section}
    starts = [name for name in siblings if key.startswith(name) or name.startswith(key)]  # lr_rate: lr
    everywhere = {name.rpartition(".")[2]: name for name in reversed(keys)}
    near = difflib.get_close_matches
    close = [*starts[:1], *near(key, siblings, n=1, cutoff=0.5)] or near(key, everywhere, n=1, cutoff=0.75)
    close = close or near(key, siblings, n=1, cutoff=0.0)
    return siblings.get(close[0]) or everywhere[close[0]]


def _keys(section: Any = None, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, the dataclass it belongs to) of every key there is."""
    section = section or RunConfig
    hints = get_type_hints(section)
    for item in fields(section):
        yield prefix + item.name, section
        for inner in (hints[item.name], *get_args(hints[item.name])):
            if is_dataclass(inner):
                yield from _keys(inner, f"{prefix}{item.name}.")


def _check(run: RunConfig, where: str) -> None:
    """Refuse values that no run can use."""
    for problem in (*_wrong_values(run), *_wrong_sources(run), *_wrong_together(run)):
        raise ConfigError(f"{where}: {problem}")


def _wrong_values(run: RunConfig) -> Iterable[str]:
    """What is wrong with single keys."""
    parts = [("a part in model.train or model.lr_scale", p, PARTS) for p in (*run.model.train, *run.model.lr_scale)]
    choices = [(key, attrgetter(key)(run), allowed) for key, allowed in CHOICES.items()]
    for key, value, allowed in [*choices, *parts]:
        if value not in allowed:
            yield _expected_one(key, value, allowed)
    if not run.model.train:
        yield f"model.train is empty; name the parts that learn: {', '.join(PARTS)}"
    if not run.data.sources:
        yield "data.sources is empty; name at least one data set"
    if not isinstance(run.data.words, (str, list, type(None))):
        yield f"data.words is {run.data.words!r}; expected a list or a file name"
    numbers = [(key, attrgetter(key)(run)) for key in f"{POSITIVE} {NOT_NEGATIVE} {SHARES}".split()]
    numbers += [(f"model.lr_scale.{part}", factor) for part, factor in run.model.lr_scale.items()]
    numbers += [(f"optim.loss_weights.{name}", factor) for name, factor in run.optim.loss_weights.items()]
    for key, value in numbers:
        if key in SHARES.split() and not 0 <= value <= 1:
            yield f"{key} is {value}; expected a share from 0 to 1"
        positive = key in POSITIVE.split() or key.startswith("model.lr_scale")
        if not (value > 0 or (not positive and value == 0)):
            yield f"{key} is {value}; expected {'a number above 0' if positive else '0 or more'}"


def _wrong_sources(run: RunConfig) -> Iterable[str]:
    """What is wrong with the data sets."""
    names = [source.name for source in run.data.sources]
    for index, source in enumerate(run.data.sources):
        key = f"data.sources.{index}"
        for name, value, allowed in (("format", source.format, FORMATS), ("source", source.source, HEADS)):
            if value not in allowed:
                yield _expected_one(f"{key}.{name}", value, allowed)
        if names.index(source.name) != index:
            yield f"{key}.name is {source.name!r}, like data.sources.{names.index(source.name)}; expected another"
        if not source.ratio > 0:
            yield f"{key}.ratio is {source.ratio}; expected a share above 0"
        for name, number in (("cap", source.cap), ("turns", source.turns)):
            if number < 0:
                yield f"{key}.{name} is {number}; expected 0 or more"
        if not 0 <= source.negatives <= 1:
            yield f"{key}.negatives is {source.negatives}; expected a share from 0 to 1"
        if source.negatives and source.format in BOX_FORMATS:
            yield f"{key}.negatives: format {source.format!r} asks for nothing, so nothing can be absent"
        if source.format in SPLIT_FORMATS and not source.split:
            yield f"{key}.split must be given: the files of format {source.format!r} hold every split"


def _wrong_together(run: RunConfig) -> Iterable[str]:
    """What needs or excludes another key."""
    model, train = run.model, run.model.train
    if (model.init is None) == (model.config is None):
        yield "give exactly one of model.init (a saved model) and model.config (random weights)"
    for part in model.lr_scale:
        if part not in train:
            yield f"model.lr_scale names {part!r}, which does not learn: model.train is {', '.join(train)}"
    if model.lora.rank and "llm" not in train:
        yield "model.lora.rank gives the language model adapters, so 'llm' must be in model.train"
    if model.quantise and not model.lora.rank:
        yield f"model.quantise is {model.quantise}, in which no weight learns: give model.lora.rank too"
    if run.data.pack and run.stage == "detection":
        yield "data.pack packs dialogues, and stage detection has none"
    if run.data.proposal_cache and {"encoder", "proposer"} & set(train):
        yield "data.proposal_cache keeps what frozen parts propose: encoder and proposer must be out of model.train"
    if run.evaluate.every and not (run.evaluate.proposals or run.evaluate.rec):
        yield f"evaluate.every is {run.evaluate.every}, but neither evaluate.proposals nor evaluate.rec is given"


def _expected_one(key: str, value: Any, allowed: Iterable[str]) -> str:
    return f"{key} is {value!r}; expected one of {', '.join(filter(None, allowed))}"
