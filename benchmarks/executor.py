"""Cost of a sampler's own arithmetic per step, network excluded, against the schedulers of diffusers.

    python benchmarks/executor.py

The network is a function that returns a ready tensor. Each scheduler and the table imported from it run in turn in one
process, so the ratio is of the same machine at the same moment. Peak memory is that of a fresh process with a large state.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from fewstep import LeastSquares, Sampler, from_diffusers
from fewstep.zoo.mixtures import spectrum

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
STEPS = 10


def schedulers() -> dict[str, object]:
    return {
        "FlowMatchEuler": FlowMatchEulerDiscreteScheduler(),
        "DPM++ 2M": DPMSolverMultistepScheduler(**FLOW),
        "UniPC": UniPCMultistepScheduler(**FLOW),
    }


def replay(scheduler, x: torch.Tensor, output: torch.Tensor) -> float:
    """Seconds per step of a stock scheduler, as a pipeline drives it."""
    scheduler.set_timesteps(STEPS)
    start = time.perf_counter()
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x).prev_sample
    return (time.perf_counter() - start) / len(scheduler.timesteps)


def run(sampler: Sampler, x: torch.Tensor, output: torch.Tensor) -> float:
    """Seconds per step of the executor."""

    def field(state: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        return output

    start = time.perf_counter()
    sampler(field, x)
    return (time.perf_counter() - start) / sampler.nfe


def native(sampler: Sampler) -> Sampler:
    """The same numbers over a bare output: the benchmark's network has no path to convert predictions with."""
    return Sampler(sampler.times, sampler.a, sampler.b)


def paired(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Medians in microseconds and the median of the pairwise ratios theirs / ours."""
    for _ in range(20):
        ours()
        theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return (*(1e6 * statistics.median(side) for side in zip(*pairs, strict=True)), statistics.median(b / a for a, b in pairs))


def peak(kind: str, name: str) -> float:
    """Peak memory in units of one 64 MiB state, above that of a process which only holds the noise and the output."""
    out = subprocess.run([sys.executable, __file__, "--child", kind, name], capture_output=True, text=True, check=True)
    return float(out.stdout)


def child(kind: str, name: str) -> None:
    x, output = torch.randn(64, 4, 256, 256), torch.randn(64, 4, 256, 256)
    scheduler = schedulers()[name]
    table = native(from_diffusers(scheduler, STEPS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "theirs":
        replay(scheduler, x, output)
    else:
        run(table, x, output)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / x.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "executor.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # stock schedulers warn about their own settings
    if args.child:
        child(*args.child)
        return
    torch.set_num_threads(args.threads)
    x, output = torch.randn(4, 4, 128, 128), torch.randn(4, 4, 128, 128)
    rows = []
    for name, scheduler in schedulers().items():
        table = native(from_diffusers(scheduler, STEPS))
        ours, theirs, ratio = paired(lambda t=table: run(t, x, output), lambda s=scheduler: replay(s, x, output), args.rounds)
        row = {"table": name, "fewstep us": ours, "diffusers us": theirs, "ratio": ratio, "alive": table.plan.alive}
        rows.append(row | {"peak fewstep": peak("ours", name), "peak diffusers": peak("theirs", name)})
    field = spectrum().given()
    tuned = LeastSquares()(field, torch.randn(128, 64, generator=torch.Generator().manual_seed(0)), nfe=STEPS)
    for name in ("FlowMatchEuler", "DPM++ 2M", "UniPC"):
        scheduler = schedulers()[name]
        ours, theirs, ratio = paired(lambda: run(tuned, x, output), lambda s=scheduler: replay(s, x, output), args.rounds)
        rows.append({"table": f"tuned (dense), against {name}", "fewstep us": ours, "diffusers us": theirs, "ratio": ratio,
                     "alive": tuned.plan.alive})  # fmt: skip
    print(
        f"{STEPS} steps, state 4x4x128x128 float32, {args.threads} thread(s); microseconds per step, medians of {args.rounds}"
    )
    print("| table | fewstep | diffusers | diffusers / fewstep | tensors alive | peak fewstep | peak diffusers |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        extra = f"{r['peak fewstep']:.1f} | {r['peak diffusers']:.1f}" if "peak fewstep" in r else " | "
        print(f"| {r['table']} | {r['fewstep us']:.0f} | {r['diffusers us']:.0f} | {r['ratio']:.2f} | {r['alive']} | {extra} |")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
