"""How noisy the gradient of the divergence term is beside the regression's, on trained models: what bounds its weight.

    python benchmarks/fdm_noise.py [--data cifar10-train.parquet]

Standard deviation of the gradient over batches of 8, of the vector form on the whole batch in units of the regression's, on the
bundled digits (64 numbers a sample) and, with --data, the CIFAR-10 flow in models/ (3,072). On a share p of the batch the
term's noise is 1 / sqrt(p) times that: with weight w it equals the regression's at w = sqrt(p) / ratio.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep import load
from fewstep.training.assemble import assemble
from fewstep.training.data import open_source
from fewstep.training.objective import FlowAndDivergence, Regression
from fewstep.training.recipe import RECIPES, Recipe

FLOW = Path(__file__).parents[1] / "models" / "cifar10-flow"


def gradient_noise(recipe: Recipe, name: str, batches: int) -> tuple[int, float]:
    """Numbers of a sample, and the ratio."""
    parts = assemble(recipe, open_source(recipe.data))
    network = load(name).network
    assert isinstance(network, nn.Module)
    model, weights = parts.model(network.requires_grad_(True)), list(network.parameters())
    regression, both = Regression("velocity"), FlowAndDivergence(weight=1.0, share=1.0)
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in range(batches):
        batch = parts.batch(step, 0, 8, torch.device("cpu"))
        plain = regression(model, batch).each.mean()
        for kept, loss in zip(seen, (plain, both(model, batch).each.mean() - plain), strict=True):
            found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            kept.append(torch.cat([g.flatten() for g in found if g is not None]).double())
    flow, term = (torch.stack(kept).var(0).sum().sqrt() for kept in seen)
    return math.prod(parts.data.shape), float(term / flow)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    parser.add_argument("--batches", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [("digits", RECIPES["digits"])]
    if args.data:
        cases.append((str(FLOW), replace(RECIPES["cifar10-flow"], data=args.data)))
    print(
        "| model | numbers d | noise of the term / of the regression | / sqrt(d) | weight at which they are equal, share 1/16 |"
    )
    print("|---|---|---|---|---|")
    for name, recipe in cases:
        size, ratio = gradient_noise(recipe, name, args.batches)
        print(f"| {Path(name).name} | {size} | {ratio:.1f} | {ratio / math.sqrt(size):.2f} | {0.25 / ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
