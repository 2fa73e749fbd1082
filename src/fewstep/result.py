"""What `tune` returns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ._types import BudgetError
from .candidates import Candidate
from .evaluation import Report
from .path import AffinePath
from .sampler import Sampler


@dataclass(frozen=True, eq=False)
class TuneResult:
    """Tuned samplers by budget, with the measurements that chose them.

    Attributes:
        samplers: one per NFE.
        report: every row of the final measurement, and the facts behind it.
        path: of the model, where it is known.
        rivals: the best stock scheduler of each budget, as a table over velocities, where there is one.
    """

    samplers: Mapping[int, Sampler]
    report: Report
    path: AffinePath | None
    rivals: Mapping[int, Candidate]

    def __getitem__(self, nfe: int) -> Sampler:
        if nfe not in self.samplers:
            raise BudgetError(f"tuned for {sorted(self.samplers)} calls, asked for {nfe}; run tune(..., nfe={nfe})")
        return self.samplers[nfe]

    def __iter__(self) -> Iterator[int]:
        return iter(self.samplers)

    def by_name(self, *, rivals: bool = False) -> dict[str, Sampler]:
        """Samplers by display name, for reports; with `rivals`, the best stock scheduler of the same budget after each."""
        named = {}
        for n, sampler in self.samplers.items():
            named[f"fewstep, {n} calls"] = sampler
            if rivals and n in self.rivals:
                named[f"{self.rivals[n].name}, {n} calls"] = self.rivals[n].sampler
        return named

    def with_training_cost(self, passes: int | None) -> "TuneResult":
        """The same result, its report telling the cost of tuning as a share of the model's training, if that is known.

        The measurement at the end, which changes no table, is not in that share.
        """
        if passes is None:
            return self
        share = self.report.facts["tuning passes"] / passes
        facts = {**self.report.facts, "network passes of the model's training": passes, "share of training": f"{share:.3%}"}
        return replace(self, report=replace(self.report, facts=facts))

    def save(self, directory: str | Path) -> list[Path]:
        """Write every sampler into ``directory/nfe-N``; returns those folders."""
        return [sampler.save(Path(directory) / f"nfe-{nfe}", path=self.path) for nfe, sampler in self.samplers.items()]
