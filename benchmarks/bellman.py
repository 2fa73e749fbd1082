"""BOSS stage 1: truncation errors from one Gram matrix against the plain loop over pairs, and the Bellman program.

    python benchmarks/bellman.py

100 knots, 100 samples, D = 3 x 64 x 64, on an Euler path of a closed-form mixture flow. For every pair of knots, the mean
over samples of || x_j - x_i - (t_j - t_i) v_i ||^2 in float32: as the published code does it (50 end points at a time, stacked)
and as the leanest loop over single pairs does. Each optimum is compared with that of a float64 loop.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from fewstep import TimeGrid, Trajectory, record
from fewstep.tuners.boss import bellman, truncation_errors
from fewstep.zoo.mixtures import mixture


def plain_loop(path: Trajectory, dtype: torch.dtype) -> np.ndarray:
    """The loop over pairs."""
    count = len(path.times) - 1
    errors = np.zeros((count + 1, count + 1))
    for i in range(count):
        x, v = path.states[i].to(dtype), path.velocities[i].to(dtype)
        for j in range(i + 1, count + 1):
            h = float(path.times[j] - path.times[i])
            errors[i, j] = float((path.states[j].to(dtype) - x - h * v).square().flatten(1).sum(1).mean())
    return errors


def published_loop(path: Trajectory, together: int = 50) -> np.ndarray:
    """The same as the published code computes it: 50 end points stacked into one tensor, float32."""
    count = len(path.times) - 1
    errors = np.zeros((count + 1, count + 1))
    for i in range(count):
        for first in range(i + 1, count + 1, together):
            last = min(first + together, count + 1)
            ends = torch.stack([path.states[j] for j in range(first, last)])
            h = (path.times[first:last] - path.times[i]).to(ends)[:, None, None]
            guess = path.states[i][None] + h * path.velocities[i][None]
            errors[i, first:last] = ((ends - guess) ** 2).flatten(2).sum(2).mean(1).numpy()
    return errors


def seconds(work, repeats: int) -> tuple[float, object]:
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--dim", type=int, default=3 * 64 * 64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bellman.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    power = torch.arange(1, args.dim + 1, dtype=torch.float64) ** -0.6
    means = torch.randn(8, args.dim, generator=generator, dtype=torch.float64) * power.sqrt()
    field = mixture(means, 0.05 * power).given()
    noise = torch.randn(args.samples, args.dim, generator=generator)
    path = record(field, TimeGrid.uniform(100), noise)

    gram, fast = seconds(lambda: truncation_errors(path), 5)
    published, _ = seconds(lambda: published_loop(path), 1)
    loop, slow = seconds(lambda: plain_loop(path, torch.float32), 1)
    exact = plain_loop(path, torch.float64)
    best, ours, theirs = (bellman(np.asarray(e), 20).knots for e in (exact, fast, slow))
    budgets = [k for k in best if k <= 20]
    agree = sum(bool((best[k] == ours[k]).all()) for k in budgets)
    agree_loop = sum(bool((best[k] == theirs[k]).all()) for k in budgets)

    rng = np.random.default_rng(0)
    big = np.triu(rng.random((1001, 1001)), 1)
    program, _ = seconds(lambda: bellman(big, 20), 5)
    result = {
        "knots": 100, "samples": args.samples, "dim": args.dim, "threads": args.threads, "gram seconds": gram,
        "published loop seconds": published, "published / gram": published / gram, "lean loop seconds": loop,
        "lean / gram": loop / gram, "optimal schedules (gram)": f"{agree} of {len(budgets)}",
        "optimal schedules (float32 loop)": f"{agree_loop} of {len(budgets)}", "bellman N=1000 K=20 seconds": program,
    }  # fmt: skip
    for key, value in result.items():
        print(f"{key:<34} {value:.4g}" if isinstance(value, float) else f"{key:<34} {value}")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
