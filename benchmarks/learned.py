"""What learning a table costs: Gauss-Newton against Adam through the unrolled sampler, from the same fit on the same noise.

    python benchmarks/learned.py [--nfe 4,8] [--seeds 0,1,2] [--iterations 400]

RMSE and median error on 512 noises of the digits model that neither saw, and the network passes of learning (a forward and
backward pass counted as three). Adam has the best of three learning rates, and like Gauss-Newton keeps the iterate that is best
on held-out noise; only the passes of the best rate are counted.
"""

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import cyclopts
import torch
from torch import Tensor

from fewstep import Boss, CountedField, Model, Sampler, load, reference
from fewstep.noise import draw
from fewstep.problem import Problem
from fewstep.tuners.least_squares import fit
from fewstep.tuners.nonstationary import learn_rows, numbers_of, rows_of

RATES = (3e-4, 1e-3, 3e-3)
CHECK = 10
"""Adam's iterations between looks at the held-out noise."""


@dataclass
class Row:
    """One line of the table; errors are of fresh noise, `held` is of the noise that chose the iterate."""

    nfe: int
    seed: int
    name: str
    rmse: float
    median: float
    held: float
    passes: int


def problem(model: Model, which: int, seed: int, size: int, tol: float) -> Problem:
    """Noise, all classes in turn, and where the converged solution takes it."""
    assert model.shape is not None
    field, noise = CountedField(model.given(torch.arange(size) % 10)), draw((size, *model.shape), seed, which)
    return Problem(field, noise, reference(field, noise, tol=tol))


def unrolled(table: Sampler, problem: Problem) -> Tensor:
    """The end point, with a graph to the numbers of the table."""
    features = [problem.noise]
    rows = torch.cat([table.a[:, None], table.b], dim=1).to(problem.noise)
    for i, t in enumerate(table.times):
        x = torch.einsum("j,j...->...", rows[i, : i + 1], torch.stack(features))
        features.append(problem.field(x, t))
    return torch.einsum("j,j...->...", rows[-1], torch.stack(features))


def adam(start: Sampler, fitting: Problem, held: Problem, rate: float, iterations: int) -> list[tuple[int, float, Sampler]]:
    """(iteration, error on `held`, table) of every iterate that was looked at."""
    write, theta = rows_of(start), numbers_of(start).requires_grad_()
    optimizer, seen = torch.optim.Adam([theta], lr=rate), [(0, held.score(start), start)]
    for k in range(1, iterations + 1):
        loss = (unrolled(write(theta), fitting) - fitting.solution.end).square().mean()
        (theta.grad,) = torch.autograd.grad(loss.double(), theta)
        optimizer.step()
        if k % CHECK == 0:
            table = write(theta.detach().clone())
            seen.append((k, held.score(table), table))
    return seen


def main(nfe: str = "4,8", seeds: str = "0,1,2", iterations: int = 400, count: int = 32) -> None:
    """Print the table and keep it."""
    torch.set_num_threads(1)
    model = load("digits")
    test, rows = problem(model, 7, 0, 512, 1e-4), []

    def add(name: str, n: int, seed: int, table: Sampler, held: float, passes: int) -> None:
        each = (table(test.field, test.noise) - test.solution.end).double().square().flatten(1).mean(1).sqrt()
        rows.append(Row(n, seed, name, float(each.square().mean().sqrt()), float(each.median()), held, passes))
        print("| " + " | ".join(f"{v:.5f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v
                                for v in asdict(rows[-1]).values()) + " |", flush=True)  # fmt: skip

    print("| NFE | seed | from the fit | RMSE | median | on held-out noise | network passes |\n|---|---|---|---|---|---|---|")
    for n, seed in product(map(int, nfe.split(",")), map(int, seeds.split(","))):
        fitting, held = (problem(model, which, seed, count, 5e-4) for which in (0, 1))
        few = fitting.part(0, 8)
        start, _ = fit(fitting.field, fitting.noise, fitting.solution, Boss()(few.field, few.noise, nfe=n))
        add("the fit itself", n, seed, start, held.score(start), 0)
        fields = [p.field for p in (fitting, held) if isinstance(p.field, CountedField)]
        for name, log in (("Gauss-Newton, 4 iterations", False), ("the same on the log loss", True)):
            before = sum(f.samples for f in fields)
            table = learn_rows(start, fitting, held, iterations=4, log_loss=log).sampler
            add(name, n, seed, table, held.score(table), sum(f.samples for f in fields) - before)
        runs = [adam(start, fitting, held, rate, iterations) for rate in RATES]
        for last in (iterations // 8, iterations // 4, iterations):
            _, error, table = min((seen for run in runs for seen in run if seen[0] <= last), key=lambda seen: seen[1])
            add(f"Adam, {last} iterations", n, seed, table, error, (3 * last + last // CHECK) * n * count)
    (Path(__file__).parent / "results" / "learned.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
