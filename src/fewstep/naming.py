"""From the names that users type to samplers: directories, methods, grids, stock schedulers, tuners."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from ._tabulate import tabulate
from ._types import BudgetError, FewstepError, Field
from .artifact import check_fits
from .candidates import grids, home
from .composite import start_scale
from .coordinates import Coordinates
from .field import Model
from .methods import registry
from .sampler import Sampler
from .stock import stock_samplers
from .tuners import Bespoke, Boss, LearnedKnots, LeastSquares, NonStationary

SCHEDULES = {"boss": Boss(), "gits": Boss(cost="deviation", discount=1.15), "oss": Boss(states="student")}
"""Grids that are found on the model: each also names its own tuner, Euler or DDIM on it."""

TUNERS = {
    **SCHEDULES,
    "fit": LeastSquares(),
    "bespoke-euler": Bespoke("euler"),
    "bespoke-midpoint": Bespoke("midpoint"),
    "nonstationary": NonStationary(),
}
LEARNED = "learned"
"""As a grid: the method's knots are learnt."""


def resolve(name: str, model: Model, field: Field, noise, budgets: Sequence[int] | None) -> dict[str, Sampler]:
    """The samplers that a name stands for, by display name.

    Args:
        name: a directory saved by fewstep (one sampler, or a folder of nfe-N folders); a registered method, optionally
            ``method@grid``, also on the grids "boss", "gits", "oss" and "learned" that are found on the model; a stock
            scheduler as `fewstep evaluate` prints it; a tuner: "boss", "gits", "oss", "fit", "bespoke-euler",
            "bespoke-midpoint", "nonstationary". What is tuned is tuned on `noise`.
        model: directories are checked to belong to it.
        field: what tuners tune on.
        noise: noise for tuners.
        budgets: NFE values; None takes a directory's own.

    Raises:
        FewstepError: an unknown name (the nearest is suggested), no sampler for these budgets, or a directory that is unsound.
    """
    path = Path(name)
    if path.is_dir():
        return _from_directory(path, model, budgets)
    if not budgets:
        raise BudgetError(f'"{name}" is not a directory, so the number of calls must be given: --nfe 8')
    found: dict[str, Sampler] = {}
    for nfe in budgets:
        sampler = _named(name, field, noise, nfe)
        found[name if len(budgets) == 1 else f"{name} ({nfe})"] = sampler
    return found


def _from_directory(path: Path, model: Model, budgets: Sequence[int] | None) -> dict[str, Sampler]:
    folders = (
        [path]
        if (path / "sampler.json").exists()
        else sorted(path.glob("**/nfe-*/"), key=lambda p: (p.parent, len(p.name), p.name))
    )
    if not folders:
        folders = [path]  # let the loader say what is missing
    found = {}
    for folder in folders:
        sampler = Sampler.load(folder)
        if budgets and sampler.nfe not in budgets:
            continue
        check_fits(sampler, model)
        found[str(folder)] = sampler
    if not found:
        raise BudgetError(f"{path} holds no sampler with {' or '.join(map(str, budgets or []))} calls")
    return found


def _named(name: str, field: Field, noise, nfe: int) -> Sampler:
    if nfe < 1:
        raise BudgetError(f"a budget is at least 1 call, got {nfe}")
    if name in TUNERS:
        return TUNERS[name](field, noise, nfe=nfe).named(name)
    path = home(field)
    base, _, grid_name = name.partition("@")
    methods = registry(path)
    if base in methods:
        method = methods[base]
        n = method.intervals(nfe)
        if grid_name == LEARNED:
            return LearnedKnots(method)(field, noise, nfe=nfe).named(name)
        family = grids(n, path)
        if grid_name in SCHEDULES:
            family[grid_name] = SCHEDULES[grid_name].grids(field, noise, (n,))[n]
        if grid_name and grid_name not in family:
            raise FewstepError(f'unknown grid "{grid_name}" in "{name}"; grids are {", ".join([*family, *SCHEDULES, LEARNED])}')
        plain = "uniform" if Coordinates.of(field).path is None else "angle"
        try:
            return tabulate(method, family[grid_name or plain], start_scale=start_scale(field)).named(name)
        except ValueError as error:
            raise FewstepError(f'"{name}" cannot walk this grid: {error}') from None
    stock = stock_samplers(path, nfe)
    if name in stock:
        return stock[name].sampler.rebase(path, "velocity").named(name)
    known = [*methods, *stock, *TUNERS]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise FewstepError(
        f'unknown sampler "{name}" at {nfe} calls: not a directory, method, stock scheduler or tuner; '
        + (f"did you mean {' or '.join(near)}?" if near else "see `fewstep methods`")
    )
