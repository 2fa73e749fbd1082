"""Published step times for Euler's method on the digits model: BOSS, GITS and OSS as multiples of uniform steps' error.

    python benchmarks/grids.py [--nfe 4,6,8] [--seeds 0,1,2]

Grids from 100 noises each, RMSE on 100 others to the converged solution; the range over seeds.
"""

import cyclopts
import torch

from fewstep import Boss, TimeGrid, load, methods, reference, tabulate
from fewstep.noise import draw

TUNERS = {
    "BOSS": Boss(),
    "OSS": Boss(states="student"),
    "GITS, discount 1.15": Boss(cost="deviation", discount=1.15),
    "GITS, no discount": Boss(cost="deviation"),
}


def main(nfe: str = "4,6,8", seeds: str = "0,1,2", noises: int = 100) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model, budgets = load("digits"), tuple(map(int, nfe.split(",")))
    assert model.shape is not None
    field = model.given(torch.arange(noises) % 10)
    ratios: dict[str, dict[int, list[float]]] = {name: {n: [] for n in budgets} for name in TUNERS}
    for seed in map(int, seeds.split(",")):
        noise, fresh = (draw((noises, *model.shape), seed, which) for which in (0, 7))
        end = reference(field, fresh).end

        def error(grid: TimeGrid, fresh: torch.Tensor = fresh, end: torch.Tensor = end) -> float:
            return float((tabulate(methods.euler, grid)(field, fresh) - end).double().square().mean().sqrt())

        for name, tuner in TUNERS.items():
            for n, grid in tuner.grids(field, noise, budgets).items():
                ratios[name][n].append(error(grid) / error(TimeGrid.uniform(n)))
    print(f"| grid | {' | '.join(f'NFE {n}' for n in budgets)} |\n|{'---|' * (len(budgets) + 1)}")
    for name, found in ratios.items():
        print(f"| {name} | {' | '.join(f'{min(v):.2f}-{max(v):.2f}' for v in found.values())} |")


if __name__ == "__main__":
    cyclopts.run(main)
