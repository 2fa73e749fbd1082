"""The sampler directory: numbers, never code.

``sampler.json`` holds the table bit for bit, its provenance and a checksum; ``scheduler_config.json`` holds the same table
over the network's bare outputs, for `TableScheduler`. Files are replaced whole, ``sampler.json`` last, and it names the
``scheduler_config.json`` that belongs to it: a folder that was saved half-way or edited is refused, never misread.
"""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError

from ._disk import atomic_write as atomic_write
from ._disk import disk_errors, one_line, read_regular, refusal, set_aside, short, staged
from ._export import path_from_repr as path_from_repr
from ._export import scheduler_config
from ._schema import Strict, first_complaint, read_versioned
from ._types import Bare, Prediction

if TYPE_CHECKING:
    from .field import Model
    from .path import AffinePath
    from .sampler import Sampler

SAMPLER = "sampler.json"
SCHEDULER = "scheduler_config.json"
SCHEMA_VERSION = 1
SIZE_LIMIT = 16 * 2**20
"""Bytes; the largest table that the schema allows stays below it, so anything longer is not ours."""

MOST_CALLS = 1000
"""A few-step sampler that calls its network more often than this is a mistake, or an attack on memory."""

_AGAIN = "save the sampler again with fewstep"
_Time = Annotated[float, Field(ge=0.0, le=1.0)]
_PerCall = Annotated[list[float], Field(max_length=MOST_CALLS)]
_PerState = Annotated[list[float], Field(max_length=MOST_CALLS + 1)]


class _Provenance(Strict):
    """`Provenance` in JSON's types; the same fields (an unknown one fails, on both sides)."""

    method: str
    model: str
    fingerprint: str
    path: str
    shape: list[Annotated[int, Field(ge=0, lt=2**63)]] | None
    raw: Bare
    sigma_data: float
    conditions: list[str]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None
    versions: dict[str, str]
    measured: dict[str, float]


class _Document(Strict):
    """``sampler.json``; `Sampler` itself checks how the shapes of the numbers fit together."""

    schema_version: Literal[1]
    predicts: Prediction
    times: Annotated[list[_Time], Field(max_length=MOST_CALLS)]
    clock: _PerCall | None
    a: _PerState
    b: Annotated[list[_PerCall], Field(max_length=MOST_CALLS + 1)]
    provenance: _Provenance
    scheduler_sha256: str | None
    checksum: str


def write_sampler(sampler: "Sampler", directory: str | Path, path: "AffinePath | None" = None) -> Path:
    """Write `sampler` into `directory`, which is made if it is missing; all or nothing.

    Args:
        sampler: the table.
        directory: the folder.
        path: as for `scheduler_config`.

    Returns:
        The directory.

    Raises:
        ArtifactError: the folder cannot be written, or the sampler holds something that `read_sampler` would refuse.
    """
    folder = Path(directory)
    document = _document(sampler)
    config = scheduler_config(sampler, path)
    scheduler = None if config is None else _pretty(config)
    document["scheduler_sha256"] = None if scheduler is None else hashlib.sha256(scheduler).hexdigest()
    table = _pretty(document | {"checksum": _checksum(document)})
    if (size := max(len(table), len(scheduler or b""))) > SIZE_LIMIT:
        raise refusal(f"cannot save this sampler: a file would have {size} bytes, at most {SIZE_LIMIT} can be read back")
    with disk_errors(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        new_scheduler = None if scheduler is None else stack.enter_context(staged(folder / SCHEDULER, scheduler))
        new_table = stack.enter_context(staged(folder / SAMPLER, table))
        with set_aside(folder / SCHEDULER, until_gone=new_table):
            if new_scheduler is not None:
                os.replace(new_scheduler, folder / SCHEDULER)
            os.replace(new_table, folder / SAMPLER)
    return folder


def read_sampler(directory: str | Path) -> "Sampler":
    """Read a directory that `write_sampler` wrote; the numbers are bit-equal.

    Raises:
        ArtifactError: anything else, in one line that names the file and the remedy.
    """
    from .sampler import Provenance, Sampler

    folder = Path(directory)
    document = _parse(folder / SAMPLER, read_regular(folder / SAMPLER, SIZE_LIMIT))
    known = document.provenance.model_dump()
    known |= {"conditions": tuple(known["conditions"]), "shape": None if known["shape"] is None else tuple(known["shape"])}
    try:
        times, a, b = (torch.tensor(v, dtype=torch.float64) for v in (document.times, document.a, document.b))
        clock = None if document.clock is None else torch.tensor(document.clock, dtype=torch.float64)
        sampler = Sampler(times, a, b, document.predicts, clock, Provenance(**known))
    except ValueError as error:
        raise refusal(f"{folder / SAMPLER} does not hold a sampler: {short(error, 300)}; {_AGAIN}") from error
    _check_scheduler(folder / SCHEDULER, document.scheduler_sha256)
    return sampler


def check_fits(sampler: "Sampler", model: "Model") -> None:
    """Refuse a sampler for another path or state shape; warn about one that was tuned on another network.

    What is unknown on either side is not compared.

    Raises:
        ArtifactError: the model lives on another path or makes samples of another shape.
    """
    made = sampler.provenance
    if made.path and made.path != repr(model.path):
        raise refusal(f"this sampler was made for {made.path}, {model.name} lives on {model.path!r}; run `fewstep tune` on it")
    if made.shape is not None and model.shape is not None and tuple(made.shape) != tuple(model.shape):
        raise refusal(
            f"this sampler was made for samples of shape {tuple(made.shape)}, {model.name} makes {tuple(model.shape)}; "
            "run `fewstep tune` on it"
        )
    actual = model.fingerprint() if made.fingerprint else ""
    if actual and actual != made.fingerprint:
        message = (
            f"this table was tuned on another network ({short(made.model) or 'unnamed'}, {short(made.fingerprint, 8)}) than "
            f"{model.name} ({actual[:8]}): transferring it is allowed and usually lies between a table tuned for this model "
            "and uniform steps; run `fewstep tune` for the best"
        )
        warnings.warn(one_line(message), UserWarning, stacklevel=2)


def _document(sampler: "Sampler") -> dict[str, Any]:
    """The validated content, still without the two checksums."""
    made = sampler.provenance
    content = {
        "schema_version": SCHEMA_VERSION,
        "predicts": sampler.predicts,
        **{name: getattr(sampler, name).detach().tolist() for name in ("times", "a", "b")},
        "clock": None if sampler.clock is None else sampler.clock.detach().tolist(),
        "provenance": {field.name: _plain(getattr(made, field.name)) for field in dataclasses.fields(made)},
        "scheduler_sha256": None,
        "checksum": "",
    }
    try:
        return _Document.model_validate(content).model_dump()
    except ValidationError as error:
        raise refusal(f"cannot save this sampler: {first_complaint(error)}; correct it and save again") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _pretty(document: Mapping[str, Any]) -> bytes:
    """ASCII JSON, one line per entry and one per row of `b`: a person can read and compare tables."""

    def text(key: str, value: Any) -> str:
        if key != "b":
            return json.dumps(value, allow_nan=False)
        return "[\n    " + ",\n    ".join(json.dumps(row, allow_nan=False) for row in value) + "\n  ]"

    return ("{\n" + ",\n".join(f'  "{key}": {text(key, value)}' for key, value in document.items()) + "\n}\n").encode()


def _checksum(document: Mapping[str, Any]) -> str:
    """SHA-256 over the content, not the layout: sorted keys, shortest exact floats, no spaces, without the checksum."""
    content = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _parse(file: Path, data: bytes) -> _Document:
    content = read_versioned(file, data, what="sampler", version=SCHEMA_VERSION, remedy=_AGAIN)
    said, actual = content.get("checksum"), _checksum(content)
    if said != actual:
        got = short(said, 12) if isinstance(said, str) else "nothing"
        raise refusal(f"{file} was edited or damaged: its content has checksum {actual[:12]}, the file says {got}; {_AGAIN}")
    try:
        return _Document.model_validate(content)
    except ValidationError as error:
        raise refusal(f"{file} does not hold a sampler: {first_complaint(error)}; {_AGAIN}") from error


def _check_scheduler(file: Path, expected: str | None) -> None:
    if not os.path.lexists(file):
        return
    actual = hashlib.sha256(read_regular(file, SIZE_LIMIT)).hexdigest()
    if actual != expected:
        raise refusal(
            f"{file} does not belong to the {SAMPLER} beside it: expected checksum {(expected or 'of no file')[:12]}, got "
            f"{actual[:12]}; delete it, or {_AGAIN}"
        )
