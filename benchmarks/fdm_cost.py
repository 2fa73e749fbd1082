"""Cost of a training step with divergence matching, in units of the same step without it (CFM).

    python benchmarks/fdm_cost.py

Steps of all settings alternate in one process, so that a ratio is of the same machine at the same moment; a step is loss,
backward pass and Adam. A setting with `every` k is timed over k steps. Peak memory is that of a fresh process (Linux or a
GPU) above weights and optimiser.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from fewstep import adapt
from fewstep.keyed import Keyed
from fewstep.training.batch import Batch, Objective, pieces_of
from fewstep.training.objective import FlowAndDivergence, Regression
from fewstep.training.objective.fdm import Form

PROBED: list[tuple[Form, float, int]] = [
    ("vector", 1.0, 1), ("vector", 1 / 4, 1), ("vector", 1 / 8, 1), ("vector", 1 / 16, 1), ("vector", 1 / 8, 2),
    ("vector", 1 / 8, 4), ("vector", 1 / 4, 4),
    ("two_probes", 1.0, 1), ("two_probes", 1 / 16, 1),
]  # fmt: skip
EXACT: list[tuple[Form, float, int]] = [("exact", 1.0, 1), ("exact", 1 / 16, 1)]


class MLP(nn.Module):
    """The network of the paper's 2-D experiments: four hidden layers of 512."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(3, 512), nn.SiLU(), *hidden, nn.Linear(512, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Velocity (batch, 2)."""
        return self.layers(torch.cat([x, t[:, None]], 1))


def u_net(attention: bool) -> UNet2DModel:
    down = "AttnDownBlock2D" if attention else "DownBlock2D"
    up = "AttnUpBlock2D" if attention else "UpBlock2D"
    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", down), up_block_types=(up, "UpBlock2D"), norm_num_groups=8,
        add_attention=attention, attention_head_dim=32,
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (MLP, (512, 2)),
    "U-Net": (lambda: u_net(False), (16, 3, 32, 32)),
    "U-Net + attention": (lambda: u_net(True), (16, 3, 32, 32)),
}


def objectives(name: str) -> dict[str, tuple[Objective, int]]:
    """Label -> objective and the number of steps after which its cost repeats."""
    found: dict[str, tuple[Objective, int]] = {"CFM": (Regression(), 1)}
    for form, share, every in PROBED + (EXACT if name == "MLP" else []):
        label = f"{form}, share {Fraction(share)}, every {every}"
        found[label] = (FlowAndDivergence(weight=0.01, form=form, share=share, every=every), every)
    return found


def stepper(name: str, device: str) -> Callable[..., None]:
    """``step(objective, batch)``: one training step of a fresh network with its optimiser."""
    make, (size, *shape) = NETWORKS[name]
    torch.manual_seed(0)
    network = make().to(device)
    optimiser = torch.optim.Adam(network.parameters(), 1e-4)
    model = adapt(network)
    x0, x1 = torch.randn(size, *shape, device=device), torch.randn(size, *shape, device=device)
    t = torch.linspace(0.01, 0.99, size, dtype=torch.float64, device=device)
    count = iter(range(10**9))

    def step(objective: Objective, n: int = size) -> None:
        batch = Batch(x0[:n], x1[:n], t[:n], None, Keyed(0, next(count), 0, n))
        for piece in pieces_of(objective, model, batch):  # as the training loop does
            (piece().each.sum() / n).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def seconds(step: Callable[[], None], repeats: int, device: str) -> float:
    """Mean duration of a step; CPU time of the process unless a GPU does the work."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def times(name: str, rounds: int, device: str) -> dict[str, float]:
    """Label -> median over the rounds of the ratio to CFM's step of the same round; CFM's own entry in seconds."""
    settings = objectives(name)
    steps = {label: partial(stepper(name, device), objective) for label, (objective, _) in settings.items()}

    many = 8 if name == "MLP" else 1  # one short step would be measured badly

    def one_round() -> dict[str, float]:
        return {label: seconds(step, settings[label][1] * many, device) for label, step in steps.items()}

    one_round()
    table = [one_round() for _ in range(rounds)]
    ratios = {label: statistics.median(row[label] / row["CFM"] for row in table) for label in steps}
    return ratios | {"CFM": statistics.median(row["CFM"] for row in table)}


def peak(name: str, label: str, device: str) -> float:
    """MiB that the steps of a fresh process need at once, weights and Adam's moments left out."""
    command = [sys.executable, __file__, "--child", name, label, "--device", device]
    # glibc hands freed blocks back at once, so that the peak is of what is alive and not of fragments
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | exact).stdout)


def resident(what: str) -> int:
    """Bytes, VmRSS now or VmHWM at the highest."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if what in line)


def child(name: str, label: str, device: str) -> None:
    objective, cycle = objectives(name)[label]
    step = stepper(name, device)
    step(Regression(), 2)  # kernels and Adam's moments are in place
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    for _ in range(cycle):
        step(objective)
    after = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    print((after - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fdm_cost.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.child:
        name, label = args.child
        child(name, label, args.device)
        return
    rows = []
    for name in NETWORKS:
        ratios = times(name, args.rounds, args.device)
        memory = {label: peak(name, label, args.device) for label in ratios}
        for label, ratio in ratios.items():
            row = {"network": name, "objective": label, "memory MiB": memory[label]}
            relative = {"time": ratio, "memory": memory[label] / memory["CFM"]}
            rows.append(row | ({"seconds": ratio} if label == "CFM" else relative))
    print(f"time and peak memory of a training step over CFM's, {args.device}, medians of {args.rounds} rounds")
    print("| network | objective | time | memory |")
    print("|---|---|---|---|")
    for r in rows:
        cells = (
            f"{1e3 * r['seconds']:.1f} ms | {r['memory MiB']:.0f} MiB"
            if "seconds" in r
            else f"{r['time']:.2f} | {r['memory']:.2f}"
        )
        print(f"| {r['network']} | {r['objective']} | {cells} |")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
