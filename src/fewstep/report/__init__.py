"""Reports: one self-contained page, its pictures, and the same as Markdown, JSON and terminal output."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from .._disk import disk_errors, staged
from ..evaluation import Report
from ..sampler import Sampler
from .coefficients import Table, table_figure
from .console import to_console as to_console
from .frontier import frontier_figure
from .page import html, markdown
from .pictures import strips
from .samples import samples_figure
from .style import png, style
from .view import label, to_json

PICTURES = ("frontier.png", "samples.png", "table.png")


def write_report(
    report: Report,
    directory: str | Path,
    *,
    samplers: Mapping[str, Sampler] | None = None,
    pictures: Mapping[str, Tensor] | None = None,
    reference_picture: Tensor | None = None,
) -> Path:
    """Write ``report.html``, ``report.md``, ``report.json`` and PNG pictures into `directory`.

    Everything is made before the first file is replaced: if anything fails, an earlier report stays as it was.

    Args:
        report: the measurements; ``facts["summary"]``, if present, is the headline (otherwise it is made from the rows).
        directory: made if it is missing.
        samplers: tables to show, by row name, or ``"name, 8 calls"`` where several budgets share a name.
        pictures: samples (k, *shape) by the same keys, all from the same noise. Images are (1 or 3, H, W) in [-1, 1]; signals
            become curves, vectors points.
        reference_picture: the converged samples (k, *shape) from that noise.

    Returns:
        The path of ``report.html``.

    Raises:
        ArtifactError: the folder cannot be written.
        ValueError: pictures of different shapes, or without samples.
    """
    folder = Path(directory)
    contents = _contents(report, samplers or {}, pictures or {}, reference_picture)
    with disk_errors(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        ready = [(folder / name, stack.enter_context(staged(folder / name, data))) for name, data in contents.items()]
        for target, new in ready:
            os.replace(new, target)
        for name in PICTURES:  # of an earlier report that had more to show
            if name not in contents:
                (folder / name).unlink(missing_ok=True)
    return folder / "report.html"


def _contents(
    report: Report, samplers: Mapping[str, Sampler], pictures: Mapping[str, Tensor], reference: Tensor | None
) -> dict[str, bytes]:
    """Every file by name; the page last, so that it never shows what is not there."""
    tables = [Table(label(report, key, sampler), sampler) for key, sampler in samplers.items()]
    rows = strips(report, samplers, pictures, reference)
    with style():
        files = {"frontier.png": png(frontier_figure(report))}
        if rows:
            files["samples.png"] = png(samples_figure(rows))
        if tables:
            files["table.png"] = png(table_figure(tables))
        page = html(report, tables, rows)
    files["report.json"] = to_json(report).encode()
    files["report.md"] = markdown(report, list(files)[:-1]).encode()
    return files | {"report.html": page.encode()}
