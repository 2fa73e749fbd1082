"""What every JSON file of fewstep has in common: strict schemas, versions, and complaints in one line."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from . import __version__
from ._disk import refusal, short


class Strict(BaseModel):
    """A schema that takes its own fields and types only: no extra key, no conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def first_complaint(error: ValidationError) -> str:
    """The first of pydantic's complaints, in one short line."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    where = ".".join(map(str, first["loc"]))
    return f"{short(where)}: {short(first['msg'])}" + (f" (and {len(others)} more)" if others else "")


def read_versioned(file: Path, data: bytes, *, what: str, version: int, remedy: str) -> dict[str, Any]:
    """The JSON object in `data`, if a fewstep of at most this schema version wrote it.

    Args:
        file: named in messages.
        data: its bytes.
        what: what the file should describe, e.g. "sampler".
        version: newest schema version that can be read.
        remedy: ends the messages.

    Raises:
        ArtifactError: no JSON of plain finite numbers, a key twice in one object, no object with a ``schema_version``, or a
            newer one.
    """
    try:
        content = json.loads(data.decode(), object_pairs_hook=_unique)
        json.dumps(content, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{file} is not the JSON that fewstep wrote ({short(error)}): cut off or edited; {remedy}") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if type(found) is not int or found < 1:
        raise refusal(f"{file} is not a {what}: it is no JSON object with a schema_version from 1 on; {remedy}")
    if found > version:
        raise refusal(
            f"{file} has schema version {short(found)}, fewstep {__version__} reads up to {version}: "
            "written by a newer fewstep; upgrade with pip install -U fewstep"
        )
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("the same key twice in one object")
    return content
