"""What each command can be told: typed, printable, from flags or a file. Imports no torch, so that help is instant."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token


def _listed(kind: type[int] | type[float]) -> Any:
    def convert(_: Any, tokens: tuple[Token, ...] | list[Token]) -> tuple[Any, ...]:
        return tuple(kind(piece) for token in tokens for piece in token.value.split(",") if piece.strip())

    return convert


Integers = Annotated[tuple[int, ...], Parameter(n_tokens=1, converter=_listed(int))]
Numbers = Annotated[tuple[float, ...], Parameter(n_tokens=1, converter=_listed(float))]
Words = Annotated[
    tuple[str, ...],
    Parameter(
        n_tokens=1, converter=lambda _, tokens: tuple(p.strip() for t in tokens for p in t.value.split(",") if p.strip())
    ),
]


@Parameter(name="*")
@dataclass(frozen=True)
class Conditions:
    """Which conditions of the model to look at: every --condition with every --guidance."""

    guidance: Numbers = ()
    """Classifier-free guidance scales, e.g. 1,2,4."""
    condition: tuple[str, ...] = ()
    """A condition such as label=3 (repeatable). Default: all classes in turn, or none."""


@Parameter(name="*")
@dataclass(frozen=True)
class TuneConfig:
    """Settings of `fewstep tune`."""

    nfe: Integers = (4, 6, 8, 10)
    """Budgets of network calls."""
    effort: Literal["search", "fit", "learn"] = "fit"
    """search: training-free; fit: closed-form fits as well; learn: then Gauss-Newton steps on all times and coefficients."""
    guidance: Numbers = ()
    """Classifier-free guidance scales, e.g. 1,2,4."""
    condition: tuple[str, ...] = ()
    """A condition such as label=3 (repeatable)."""
    each: bool = False
    """Tune one table per condition and guidance value instead of one for all."""
    metric: Literal["rmse", "worst"] = "rmse"
    """Choose by the error over all samples, or of the worst condition."""
    noise: int | None = None
    """Fitting noises per condition, and as many to choose by; default: what the effort and the size of a sample need."""
    seed: int = 0
    """Seed of all noise."""
    out: Path = Path("fewstep-tune")
    """Folder for samplers and report; an interrupted run resumes from it."""


def settings_in(path: Path, config: type) -> dict[str, Any]:
    """The settings of a TOML, YAML or JSON file, checked against the fields of `config`.

    Raises:
        ValueError: unreadable, or an unknown key (the nearest one is suggested).
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = _parsed(text, path.suffix)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither TOML, YAML nor JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold settings by name, such as nfe = [4, 8]")
    known = [f.name for f in fields(config)]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(known)}"
            raise ValueError(f'unknown key "{key}" in {path}; {hint}')
    return data


def _parsed(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix not in (".yaml", ".yml"):
        return tomllib.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise json.JSONDecodeError(" ".join(str(error).split()), text, 0) from None


def flag_value(words: Sequence[str], flag: str) -> str:
    """What follows `flag`, or its = sign; nothing where it is not given."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == flag:
            return value or following
    return ""


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The same settings as command-line words, so that a file and flags go through one parser."""
    words: list[str] = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words += [flag] if value else [flag.replace("--", "--no-", 1)] if key == "attention" else []
        elif key == "condition":
            for entry in value if isinstance(value, list) else [value]:
                words.append(f"--condition={entry}")
        else:
            words.append(f"{flag}=" + (",".join(map(str, value)) if isinstance(value, list) else str(value)))
    return words


def parse_conditions(condition: tuple[str, ...], guidance: tuple[float, ...]) -> list[dict[str, Any]] | None:
    """The arguments of `Model.given` that the flags mean, or None where nothing was asked for.

    Raises:
        ValueError: a condition that is not label=INTEGER.
    """
    parsed = []
    for text in condition:
        key, _, value = text.partition("=")
        if key.strip() != "label" or not value.strip().isdecimal():
            raise ValueError(
                f'a condition is written label=3, got "{text}"; for other conditions use Python: tune(conditions=[...])'
            )
        parsed.append({"label": int(value)})
    if not parsed and not guidance:
        return None
    return [{**one, "guidance": w} for one in parsed or [{}] for w in guidance or (1.0,)]


def to_toml(config: TuneConfig) -> str:
    """The settings as a TOML file that ``--config`` reads back."""

    def value(v: object) -> str:
        plain = list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v
        # TOML writes text as JSON does, but for pairs of surrogates and the delete character.
        return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")

    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    return "\n".join(f"{name} = {value(v)}" for name, v in settings.items() if v is not None) + "\n"
