"""The sampler directory: bit-equal round trips, and one clear line for whatever else lies on the disk."""

import copy
import errno
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep import artifact
from fewstep._types import ArtifactError
from fewstep.artifact import SAMPLER, SCHEDULER, atomic_write, check_fits, path_from_repr, read_sampler, scheduler_config
from fewstep.field import adapt
from fewstep.path import EDM, VE, VP, AffinePath, CondOT, Cosine, DiscreteVP
from fewstep.sampler import Provenance, Sampler

PROVENANCE = Provenance(
    method="least-squares(boss)",
    model='a "model"\n\u2028 ü',
    fingerprint="ab" * 32,
    path="CondOT()",
    shape=(3, 8, 8),
    raw="negated",
    conditions=("label=3", "guidance=2"),
    seed=2**40,
    versions={"fewstep": "0.1.0", "torch": "2.13"},
    measured={"rmse": 0.1 + 0.2, "reference_error": 5e-324},
)


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SMALL = Sampler(
    float64([0.0, 1 / 3]),
    float64([1.0, -0.0, 0.1]),
    float64([[0, 0], [1 / 3, 0], [1e-310, 2 / 3]]),
    clock=float64([999.0, 332.667]),
    provenance=PROVENANCE,
)
OTHER = Sampler(float64([0.5]), float64([1.0, 1.0]), float64([[0.0], [1.0]]), provenance=Provenance(raw="edm"))
"""Another table, for which no scheduler_config.json can be written."""


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a sampler; the test builds it, since beartype draws random numbers there."""
    n = draw(st.integers(1, 5))

    def row(length: int, values: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(values, min_size=length, max_size=length))

    number, unit, zero = st.floats(allow_nan=False, allow_infinity=False), st.floats(0.0, 1.0), st.sampled_from([0.0, -0.0])
    rows = [row(i, number) + row(n - i, zero) for i in range(n + 1)]
    clock = float64(row(n, number)) if draw(st.booleans()) else None
    predicts = draw(st.sampled_from(["velocity", "noise", "data", "score"]))
    numbers = {"times": float64(row(n, unit)), "a": float64(row(n + 1, number)), "b": float64(rows)}
    return numbers | {"clock": clock, "predicts": predicts}


def provenances() -> st.SearchStrategy[dict[str, Any]]:
    text = st.text(st.characters(codec="utf-8"), max_size=8)
    return st.fixed_dictionaries(
        {
            "method": text,
            "path": text | st.sampled_from(["CondOT()", "VP(beta_min=0.1, beta_max=20.0)"]),
            "shape": st.none() | st.lists(st.integers(0, 2**62), max_size=3).map(tuple),
            "raw": st.sampled_from(["plain", "negated", "v_prediction", "edm"]),
            "conditions": st.lists(text, max_size=2).map(tuple),
            "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
            "versions": st.dictionaries(text, text, max_size=2),
            "measured": st.dictionaries(text, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
        }
    )


def bits(sampler: Sampler) -> tuple[Any, ...]:
    """Everything of a sampler, such that == means bit-equal."""
    numbers = [v if v is None else v.view(torch.int64).tolist() for v in (sampler.times, sampler.a, sampler.b, sampler.clock)]
    return (*numbers, sampler.predicts, sampler.provenance)


def sign(document: dict[str, Any]) -> dict[str, Any]:
    """What a forger would do: edit the content, then compute the checksum anew."""
    content = {key: value for key, value in document.items() if key != "checksum"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {"checksum": hashlib.sha256(canonical.encode()).hexdigest()}


def load_or_refuse(folder: Path) -> Sampler | None:
    """The sampler, or None after one printable line; anything else fails the test."""
    try:
        return Sampler.load(folder)
    except ArtifactError as error:
        message = str(error)
    assert message.isprintable()
    assert 20 < len(message) < 1000
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property: every save also replaces an older artifact."""
    return tmp_path_factory.mktemp("artifact") / "made" / "sampler"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, Any]]:
    """A folder to damage, with the sound bytes and document of its sampler.json."""
    place = SMALL.save(tmp_path_factory.mktemp("artifact"))
    sound = (place / SAMPLER).read_bytes()
    return place, sound, json.loads(sound)


# --- round trips


@settings(max_examples=150)
@given(tables(), provenances())
@example({"times": float64([-0.0]), "a": float64([-0.0, 5e-324]), "b": float64([[-0.0], [1.7976931348623157e308]])}, {})
def test_load_is_bit_equal(folder, numbers, provenance):
    sampler = Sampler(**numbers, provenance=Provenance(**provenance))
    assert sampler.save(folder) == folder
    loaded = Sampler.load(folder)
    assert bits(loaded) == bits(sampler)
    assert all(math.isfinite(term.coefficient) for row in loaded.plan.rows for term in row)  # though sums may overflow
    assert {file.name for file in folder.iterdir()} <= {SAMPLER, SCHEDULER}


def test_large_table_and_gradients(tmp_path):
    n = 60
    b = torch.randn(n + 1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril(-1).requires_grad_()
    sampler = Sampler(torch.linspace(0, 1, n, dtype=torch.float64), torch.ones(n + 1, dtype=torch.float64), b)
    assert torch.equal(Sampler.load(sampler.save(tmp_path)).b, b)


def test_provenance_of_any_mapping_and_sequence_type(tmp_path):
    measured = {"rmse": torch.tensor(0.5).item(), "calls": 8}
    loose = replace(PROVENANCE, shape=torch.Size((3, 8, 8)), measured=measured)
    loaded = Sampler.load(replace(SMALL, provenance=loose).save(tmp_path))
    assert loaded.provenance == replace(PROVENANCE, measured={"rmse": 0.5, "calls": 8.0})


def test_schema_has_every_field_of_provenance(small):
    assert set(small[2]["provenance"]) == {field.name for field in fields(Provenance)}


def test_file_is_plain_ascii_and_readable(small):
    lines = small[1].decode("ascii").splitlines()
    assert '  "times": [0.0, 0.3333333333333333],' in lines
    assert "    [1e-310, 0.6666666666666666]" in lines


def test_checksum_is_the_documented_one(small):
    place, _, document = small
    assert sign(document)["checksum"] == document["checksum"]
    assert document["scheduler_sha256"] == hashlib.sha256((place / SCHEDULER).read_bytes()).hexdigest()


# --- scheduler_config.json


def test_scheduler_config_of_a_flow_network(small):
    config = json.loads((small[0] / SCHEDULER).read_text())
    assert list(config) == ["_class_name", "_fewstep_version", "times", "timesteps", "a", "b", "num_train_timesteps"]
    assert config["_class_name"] == "TableScheduler"
    assert config["times"] == SMALL.times.tolist()
    assert config["timesteps"] == [999.0, 332.667]
    assert config["a"] == SMALL.a.tolist()
    assert config["b"] == (-SMALL.b).tolist()
    assert config["num_train_timesteps"] == 1000


def test_timesteps_default_to_times():
    config = scheduler_config(replace(SMALL, clock=None, provenance=Provenance()))
    assert config is not None
    assert config["timesteps"] == config["times"] == SMALL.times.tolist()


@pytest.mark.parametrize("combines", ["velocity", "noise", "data"])
@pytest.mark.parametrize(
    ("path", "predicts", "raw", "sigma_data"),
    [
        (CondOT(), "velocity", "negated", 0.5),
        (VP(), "noise", "v_prediction", 0.5),
        (EDM(sigma_max=20.0), "data", "edm", 0.5),
        (VE(sigma_max=20.0), "data", "edm", 1.0),
    ],
)
def test_config_replays_on_the_bare_network(path: AffinePath, predicts, raw, sigma_data, combines):
    def bare(y, time):
        return torch.tanh(1.5 * y + time.view(-1, 1).to(y))

    model = adapt(bare, path=path, predicts=predicts, raw=raw, sigma_data=sigma_data, clock=lambda t: t)
    times = float64([0.1, 0.4, 0.8])
    b = float64([[0, 0, 0], [0.3, 0, 0], [0.2, 0.5, 0], [0.1, 0.3, 0.6]]) / 4
    sampler = Sampler(times, float64([path.start_scale, 1.0, 0.9, 0.8]), b, combines)
    sampler = replace(sampler, provenance=Provenance(raw=raw, path=repr(path)))
    config = scheduler_config(sampler, sigma_data=sigma_data)
    assert config is not None
    noise = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []
    for a, row in zip(config["a"], config["b"], strict=True):
        y = a * noise + sum((w * u for w, u in zip(row, outputs, strict=False)), torch.zeros_like(noise))
        if len(outputs) < 3:
            outputs.append(bare(y, float64(times[len(outputs)].item()).expand(5)))
    assert torch.allclose(y, sampler(model.given(), noise), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("raw", ["v_prediction", "edm"])
@pytest.mark.parametrize(
    "path", ["", "DiscreteVP(count=1000, sha256=0123456789ab)", "VP(beta_min=1e308, beta_max=-1e308)", "VE(sigma_min=0.0)"]
)
def test_no_config_where_the_path_cannot_be_rebuilt(tmp_path, raw, path):
    for predicts in ("velocity", "noise", "data"):
        sampler = replace(SMALL, predicts=predicts, provenance=Provenance(raw=raw, path=path))
        assert scheduler_config(sampler) is None
        assert bits(Sampler.load(sampler.save(tmp_path))) == bits(sampler)
        assert [file.name for file in tmp_path.iterdir()] == [SAMPLER]


def test_config_with_a_given_path():
    path = DiscreteVP(torch.linspace(0.99, 0.01, 10))
    sampler = replace(SMALL, predicts="noise", provenance=Provenance(raw="v_prediction", path=repr(path)))
    assert scheduler_config(sampler) is None
    config = scheduler_config(sampler, path)
    assert config is not None
    assert config["b"] == sampler.raw_table(path, "v_prediction")[1].tolist()


@pytest.mark.parametrize(
    "path", [CondOT(), Cosine(), VP(), VP(1e-3, 0.2), VE(), VE(sigma_max=80.0), EDM(), EDM(1e-05, 3.5)], ids=repr
)
def test_path_from_repr(path):
    assert path_from_repr(repr(path)) == path
    assert path_from_repr(repr(path).replace(".0)", ")")) == path  # as written by somebody who passed whole numbers


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("VE(sigma_min=0.01,sigma_max=10)", VE(0.01, 10.0)),
        ("VP(0.1, 20)", VP(0.1, 20.0)),
        (" VP ( beta_max = 9 )\n", VP(0.1, 9.0)),
        ("EDM(1e-05, sigma_max=+3.5)", EDM(1e-05, 3.5)),
        ("CondOT( )", CondOT()),
    ],
)
def test_path_as_a_user_writes_it(text, path):
    assert path_from_repr(text) == path


@pytest.mark.parametrize(
    "text",
    [
        *("", "CondOT", "VP(beta_min=__import__('os'))", "AffinePath()", "DiscreteVP(count=3, sha256=0)", "torch()"),
        *("(" * 9999, f"VP({'-' * 9999}1)"),
    ],
)
def test_path_from_any_other_text_is_none(text):
    assert path_from_repr(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EDM(sigma_mn=0.01)", r'the path "EDM\(sigma_mn=0.01\)": EDM takes sigma_min and sigma_max, not "sigma_mn"'),
        ("CondOT(x=1.0)", 'CondOT takes no arguments, not "x"'),
        ("VP(1, 2, 3)", "VP takes beta_min and beta_max, got 3 values"),
        ("VP(1, beta_min=2)", "beta_min is given twice"),
        ("VP(beta_min=1, beta_min=2)", "beta_min is given twice"),
        ("VP(beta_min=)", r"not written as in VP\(beta_min=0.1, beta_max=20.0\)"),
        ("VP(beta_min=1.0=2.0)", "not written as in VP"),
        ("VP(\nTrue)", 'beta_min must be a number, got "True"'),
        ("VP(2 - 1)", 'beta_min must be a number, got "2 - 1"'),
        ("VE(1for x in y)", "sigma_min must be a number, got"),  # of which Python's parser warns
        ("VE(sigma_max=0)", "VE needs 0 < sigma_min < sigma_max, all finite; got"),
    ],
)
def test_arguments_that_a_path_does_not_take_are_named(text, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        path_from_repr(text)
    assert "\n" not in str(caught.value)


# --- damage


def test_every_truncation_is_refused(small):
    place, sound, _ = small
    for length in range(len(sound) - 1):  # without its last byte, a line break, the file is still whole
        (place / SAMPLER).write_bytes(sound[:length])
        assert load_or_refuse(place) is None
    (place / SAMPLER).write_bytes(sound[:-1])
    assert bits(Sampler.load(place)) == bits(SMALL)


@settings(max_examples=250)
@given(st.data())
def test_flipped_bytes_never_give_another_sampler(small, data):
    place, sound, _ = small
    damaged = bytearray(sound)
    for at in data.draw(st.lists(st.integers(0, len(sound) - 1), min_size=1, max_size=3)):
        damaged[at] ^= data.draw(st.integers(1, 255))
    (place / SAMPLER).write_bytes(damaged)
    loaded = load_or_refuse(place)
    assert loaded is None or bits(loaded) == bits(SMALL)


@given(st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"")
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 5000)
def test_arbitrary_bytes_are_refused(small, content):
    (small[0] / SAMPLER).write_bytes(content)
    assert load_or_refuse(small[0]) is None


def nodes(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield where
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, (*where, key))


def put(document: Any, where: tuple[Any, ...], value: Any) -> Any:
    if not where:
        return value
    document = copy.deepcopy(document)
    at = document
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    return document


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**30), 1e308, 5e-324])
    | st.floats()
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
) | st.sampled_from([deep(300), deep(900), "\ud800", "\x1b[2J\r\n" * 3, "x" * 5000])


@settings(max_examples=300)
@given(st.data(), JSON, st.booleans())
def test_replaced_nodes_are_refused_or_sound(small, data, value, forge):
    place, _, document = small
    where = data.draw(st.sampled_from(list(nodes(document))))
    changed = put(document, where, value)
    if forge and isinstance(changed, dict):
        changed = sign(changed)
    (place / SAMPLER).write_text(json.dumps(changed))
    (place / SCHEDULER).unlink(missing_ok=True)
    loaded = load_or_refuse(place)
    if loaded is not None:  # the forger wrote another sound sampler: then it is one in every respect
        assert bits(Sampler.load(loaded.save(place))) == bits(loaded)


@settings(max_examples=60)
@given(st.data(), st.sampled_from([deep(3), deep(950), 10**400, "a\nb"]))
def test_forged_extra_keys_are_refused(small, data, value):
    place, _, document = small
    where = data.draw(st.sampled_from([(), ("provenance",)]))
    key = data.draw(st.sampled_from(["extra", "__class__", "x" * 9999, "\n\x1b"]))
    (place / SAMPLER).write_text(json.dumps(sign(put(document, (*where, key), value))))
    assert load_or_refuse(place) is None


def edited(where: str, value: Any, *, forge: bool = True) -> Callable[[Path, dict[str, Any]], None]:
    def edit(file: Path, document: dict[str, Any]) -> None:
        changed = put(document, tuple(where.split(".")), value)
        file.write_text(json.dumps(sign(changed) if forge else changed))

    return edit


def written(content: str | bytes) -> Callable[[Path, dict[str, Any]], None]:
    return lambda file, _: atomic_write(file, content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (written(b"\xff\xfe"), r"sampler\.json is not the JSON that fewstep wrote \('utf-8'.*cut off or edited; save"),
        (written('{"a": 1'), r"is not the JSON that fewstep wrote \(Expecting ',' delimiter: line 1"),
        (written('{"a": NaN}'), r"is not the JSON that fewstep wrote \(Out of range float"),
        (written('{"a": 1e999}'), r"is not the JSON that fewstep wrote \(Out of range float"),
        (written('{"a": 1, "a": 2}'), r"the same key twice in one object"),
        (written("[" * 100_000), r"is not the JSON that fewstep wrote \(maximum recursion depth"),
        (written("[1]"), r"is not a sampler: it is no JSON object with a schema_version from 1 on"),
        (written("{}"), r"no JSON object with a schema_version"),
        (edited("schema_version", True), r"no JSON object with a schema_version"),
        (edited("schema_version", 0), r"no JSON object with a schema_version"),
        (edited("schema_version", 2), r"has schema version 2, .* reads up to 1: written by a newer fewstep; upgrade"),
        (edited("a", [1.0], forge=False), r"was edited or damaged: its content has checksum \w+, the file says \w+\.\.\."),
        (edited("checksum", deep(300), forge=False), r"was edited or damaged: .* the file says nothing; save"),
        (edited("times", [0.0, 1.5]), r"does not hold a sampler: times\.1: Input should be less than or equal to 1; save"),
        (edited("times", [-1e-9, 0.5]), r"times\.0: Input should be greater than or equal to 0"),
        (edited("times", [0.0, "0.5"]), r"times\.1: Input should be a valid number"),
        (edited("times", [0.0] * 1001), r"times: List should have at most 1000 items"),
        (edited("a", [1.0, 10**400, True]), r"a\.1: Input should be a valid number \(and 1 more\)"),
        (edited("a", [1.0]), r"does not hold a sampler: a table of n calls has times .* got \(2,\), \(1,\), \(3, 2\); save"),
        (edited("b", [[0.0, 0.0], [0.5], [0.5, 0.5]]), r"does not hold a sampler: expected sequence of length 2"),
        (edited("b", [[0.0, 1.0], [0.5, 0.0], [0.5, 0.5]]), r"b must be zero on and above its diagonal"),
        (edited("clock", [1.0]), r"clock must have one entry per call"),
        (edited("predicts", "image"), r"predicts: Input should be 'velocity', 'noise', 'data' or 'score'"),
        (edited("extra", 1), r"extra: Extra inputs are not permitted"),
        (edited("provenance.raw", "pickle"), r"provenance\.raw: Input should be"),
        (edited("provenance.measured", {"rmse": None}), r"provenance\.measured\.rmse: Input should be a valid number"),
    ],
)  # fmt: skip
def test_message_for_a_damaged_file(tmp_path, small, damage, message):
    damage(tmp_path / SAMPLER, small[2])
    with pytest.raises(ArtifactError, match=message) as caught:
        read_sampler(tmp_path)
    assert str(tmp_path / SAMPLER) in str(caught.value)


def test_message_for_a_missing_file(tmp_path):
    atomic_write(tmp_path / "file", "")
    (tmp_path / "odd" / SAMPLER).mkdir(parents=True)
    for name, found in [
        ("", "it is missing"),
        ("nowhere\n", "nowhere  is no folder"),
        ("file", "file is no folder"),
        ("odd", "it is not a file"),
        ("a\0b", "is no folder"),
    ]:
        with pytest.raises(
            ArtifactError, match=rf"expected a sampler folder with .*sampler\.json, but .*{found}; pass a folder"
        ):
            read_sampler(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / SAMPLER)
    with pytest.raises(ArtifactError, match="but it is not a file"):
        read_sampler(tmp_path)


def test_message_for_an_unreadable_file(small, monkeypatch):
    with pytest.raises(ArtifactError, match=r"cannot read .*: File name too long; check its name and permissions"):
        read_sampler("x" * 5000)
    monkeypatch.setattr(Path, "open", fail(OSError(errno.EACCES, "Permission denied")))
    with pytest.raises(ArtifactError, match=r"cannot read .*sampler\.json: Permission denied; check"):
        read_sampler(small[0])


def test_message_for_a_huge_file(tmp_path):
    with (tmp_path / SAMPLER).open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ArtifactError, match=r"has more than 16777216 bytes, no sampler is that large; save"):
        read_sampler(tmp_path)


def test_scheduler_config_must_belong_to_the_sampler(tmp_path):
    message = (
        r"scheduler_config\.json does not belong to the sampler\.json beside it: expected checksum {}, got \w{{12}}; delete"
    )
    SMALL.save(tmp_path)
    (tmp_path / SCHEDULER).write_text("{}")
    with pytest.raises(ArtifactError, match=message.format(r"\w{12}")):
        read_sampler(tmp_path)
    (tmp_path / SCHEDULER).unlink()
    assert bits(read_sampler(tmp_path)) == bits(SMALL)
    OTHER.save(tmp_path)
    (tmp_path / SCHEDULER).write_text("{}")
    with pytest.raises(ArtifactError, match=message.format("of no file")):
        read_sampler(tmp_path)


# --- saving


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"times": float64([0.0, 1.25])},
            r"cannot save this sampler: times\.1: Input should be less than or equal to 1; correct it",
        ),
        (
            {"provenance": replace(PROVENANCE, measured={"rmse": float("nan")})},
            r"measured\.rmse: Input should be a finite number",
        ),
        ({"provenance": replace(PROVENANCE, seed=2**64)}, r"provenance\.seed: Input should be less than"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message):
        replace(SMALL, **change).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_too_large_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "SIZE_LIMIT", 500)
    with pytest.raises(
        ArtifactError, match=r"cannot save this sampler: a file would have \d{3,4} bytes, at most 500 can be read back"
    ):
        SMALL.save(tmp_path)


def fail(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def test_message_for_an_unwritable_folder(tmp_path, monkeypatch):
    atomic_write(tmp_path / "file", "kept")
    with pytest.raises(
        ArtifactError, match=r"cannot write .*/file: File exists; a file is where a folder should be; choose another"
    ):
        SMALL.save(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"cannot write .*/file/below: Not a directory; a file is where a folder should be"):
        SMALL.save(tmp_path / "file" / "below")
    with pytest.raises(ArtifactError, match=r"cannot write .*: .*null byte; choose another folder"):
        SMALL.save("a\0b")
    (tmp_path / "odd" / SAMPLER).mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"cannot write .*/odd: Is a directory; a folder is where the file should be"):
        SMALL.save(tmp_path / "odd")
    assert [file.name for file in (tmp_path / "odd").iterdir()] == [SAMPLER]
    assert (tmp_path / "file").read_text() == "kept"
    for number, message in [
        (errno.EACCES, "Permission denied; make the folder writable or choose another one"),
        (errno.EROFS, "Read-only file system; make the folder writable or choose another one"),
        (errno.ENOSPC, "No space left on device; free some space or choose another folder"),
    ]:
        monkeypatch.setattr(Path, "mkdir", fail(OSError(number, os.strerror(number))))
        with pytest.raises(ArtifactError, match=f"cannot write .*/new: {message}"):
            SMALL.save(tmp_path / "new")
    monkeypatch.setattr(Path, "mkdir", fail(OSError("disk gone")))
    with pytest.raises(ArtifactError, match=r"cannot write .*/new/x\.txt: disk gone; choose another folder"):
        atomic_write(tmp_path / "new" / "x.txt", "")


def strike(patch: pytest.MonkeyPatch, error: BaseException, k: int, *, after: bool) -> list[str]:
    """Let `error` strike once, before or after the k-th disk operation; returns a list that then holds its name."""
    struck: list[str] = []
    left = iter(range(k - 1, -1, -1))

    def wrap(owner: Any, name: str) -> None:
        operation = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            mine = next(left, None) == 0
            if mine:
                struck.append(name)
            if mine and not after:
                raise error
            result = operation(*args, **kwargs)
            if mine:
                raise error
            return result

        patch.setattr(owner, name, call)

    wrap(os, "fsync")
    wrap(os, "replace")
    wrap(Path, "unlink")
    return struck


@pytest.mark.parametrize(
    ("old", "new"),
    [(SMALL, OTHER), (OTHER, SMALL), (SMALL, replace(SMALL, clock=None)), (None, SMALL)],
    ids=["to one file", "to two files", "two files", "new folder"],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["Ctrl-C", "full"]
)
def test_save_cut_short_leaves_one_whole_artifact(tmp_path, monkeypatch, error, old, new, after):
    for k in range(1, 99):
        place = tmp_path / str(k)
        if old is not None:
            old.save(place)
        before = contents(place)
        raised: BaseException | None = None
        with monkeypatch.context() as patch:
            struck = strike(patch, error, k, after=after)
            try:
                new.save(place)
            except (KeyboardInterrupt, ArtifactError) as caught:
                raised = caught
        left = {name: content for name, content in contents(place).items() if not name.endswith(".tmp")}
        if left != before:  # then sampler.json has been replaced, and all is new
            assert bits(read_sampler(place)) == bits(new)
            assert set(left) == {SAMPLER, SCHEDULER} - ({SCHEDULER} if new is OTHER else set())
        if left == contents(place):
            assert raised or left != before
        else:  # only a clean-up that was itself cut short may leave a temporary file
            assert struck == ["unlink"]
        assert not isinstance(raised, ArtifactError) or "No space left on device; free some space" in str(raised)
        if not struck:
            break
    assert k > 4
    assert raised is None


def contents(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()} if place.exists() else {}


# --- atomic_write


def test_atomic_write(tmp_path):
    file = tmp_path / "made" / "report.txt"
    atomic_write(file, "ü\n")
    assert file.read_bytes() == "ü\n".encode()
    atomic_write(str(file), b"\x00")
    assert file.read_bytes() == b"\x00"
    assert [f.name for f in file.parent.iterdir()] == ["report.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_atomic_write_keeps_the_old_file(tmp_path, monkeypatch, operation, error):
    file = tmp_path / "report.txt"
    atomic_write(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, fail(error))
        if isinstance(error, OSError):
            with pytest.raises(ArtifactError, match=r"cannot write .*report\.txt: No space left on device; free some space or"):
                atomic_write(file, "new")
        else:
            with pytest.raises(KeyboardInterrupt):
                atomic_write(file, "new")
    assert [f.name for f in tmp_path.iterdir()] == ["report.txt"]
    assert file.read_text() == "old"


# --- check_fits


def network(seed: int) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((2,), float(seed)))

        def forward(self, x, t):
            return self.weight * x

    return Net()


def test_check_fits_accepts_its_own_model_and_the_unknown():
    model = adapt(network(0), shape=(2,), name="mine")
    own = Provenance(path="CondOT()", shape=(2,), fingerprint=model.fingerprint())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fits(replace(SMALL, provenance=own), model)
        check_fits(replace(SMALL, provenance=Provenance()), model)
        check_fits(replace(SMALL, provenance=own), adapt(lambda x, t: -x))
        check_fits(replace(SMALL, provenance=replace(own, fingerprint="")), adapt(network(1)))


def test_check_fits_refuses_another_path_or_shape():
    model = adapt(network(0), path=VP(), shape=(2,), name="mine")
    with pytest.raises(ArtifactError, match=r"made for CondOT\(\), mine lives on VP\(.*\); run `fewstep tune` on it"):
        check_fits(replace(SMALL, provenance=Provenance(path="CondOT()")), model)
    with pytest.raises(ArtifactError, match=r"samples of shape \(3, 8\), mine makes \(2,\); run `fewstep tune` on it"):
        check_fits(replace(SMALL, provenance=Provenance(shape=(3, 8))), model)


def test_check_fits_warns_about_another_network():
    model = adapt(network(0), name="mine")
    for name, said in [("yo\nurs", "yo urs"), ("", "unnamed")]:
        made = Provenance(fingerprint="ab" * 32, model=name)
        with pytest.warns(
            UserWarning, match=f"on another network \\({said}, abababab.*than mine .*allowed and usually lies between"
        ):
            check_fits(replace(SMALL, provenance=made), model)
