"""From a recipe to the parts of a run: path, network, objective, coupling, time law."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._model import SourcePoints
from .._types import FewstepError
from ..artifact import path_from_repr
from ..field import Model, adapt
from ..keyed import Keyed, generator
from ..path import AffinePath
from ..zoo import load
from ..zoo.networks import build, kind_of
from .batch import Batch, Objective
from .coupling import COUPLINGS, Coupling
from .data import Source
from .objective import FlowAndDivergence, Regression
from .recipe import Recipe, changed
from .source import APART, with_source
from .timelaw import LAWS, TimeLaw, draw_times


@dataclass(frozen=True)
class Parts:
    """What a recipe says, as objects.

    Attributes:
        recipe: the recipe.
        data: where samples come from.
        source: where paths start; None: standard normal noise.
        path: the affine path.
        objective: what is minimised.
        regression: its regression alone, which a loss on samples kept aside is measured with.
        coupling: how noise and data are paired.
        law: of the training times.
        model: puts any network that is called ``network(x, t, label)`` into this recipe's `Model`.
    """

    recipe: Recipe
    data: Source
    source: Source | None
    path: AffinePath
    objective: Objective
    regression: Objective
    coupling: Coupling
    law: TimeLaw
    model: Callable[[nn.Module], Model]
    _last: list[tuple[int, tuple[Tensor, Tensor, Tensor | None]]] = field(default_factory=list, repr=False)

    def batch(self, step: int, start: int, stop: int, device: torch.device) -> Batch:
        """Samples `start` to `stop` of the batch of one step: the same ones whoever asks."""
        recipe, total = self.recipe, self.recipe.batch
        mine = Keyed(recipe.seed, step, start, stop)
        if self.coupling.whole:  # it looks at the whole batch, once for all pieces of a step
            x0, x1, label = self._coupled(step)
            x0, x1, label = x0[start:stop], x1[start:stop], None if label is None else label[start:stop]
        else:
            x0, x1, label = self.pairs(mine)
        if label is not None:
            dropped = mine.uniform("label") < recipe.label_dropout
            assert self.data.classes is not None  # a source with labels knows how many there are
            label = torch.where(dropped, self.data.classes, label).to(device)
        t = draw_times(self.law, mine, total, self.path, self.span, recipe.stratified)
        return Batch(x0.to(device), x1.to(device), t.to(device), label, mine)

    @property
    def passes(self) -> float:
        """Forward passes that a sample's share of a step costs, a backward pass being two."""
        return self.objective.passes(math.prod(self.data.shape))

    @cached_property
    def span(self) -> tuple[float, float]:
        """The times at which everything that the objective needs is finite."""
        return self.objective.span(self.model(nn.Identity()))

    def pairs(self, keyed: Keyed) -> tuple[Tensor, Tensor, Tensor | None]:
        """Source and data, coupled, with labels."""
        x1, label = self.data.draw(keyed, self.recipe.batch)
        x0 = self._start(keyed)
        return x0.index_select(0, self.coupling(x0, x1, label)), x1, label

    def _coupled(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self._last or self._last[0][0] != step:
            self._last[:] = [(step, self.pairs(Keyed(self.recipe.seed, step, 0, self.recipe.batch)))]
        return self._last[0][1]

    def _start(self, keyed: Keyed) -> Tensor:
        if self.source is None:
            return keyed.normal("noise", *self.data.shape)
        other = Keyed(keyed.seed ^ APART, keyed.step, keyed.start, keyed.stop)  # not the same order as the data's
        return self.source.draw(other, self.recipe.batch)[0]


def assemble(recipe: Recipe, data: Source, source: Source | None = None, objective: Objective | None = None) -> Parts:
    """The parts of a recipe.

    Raises:
        FewstepError: a setting that contradicts another, or source and data of different shapes.
    """
    recipe.check()
    path = path_from_repr(recipe.path if recipe.path.endswith(")") else f"{recipe.path}()")
    if path is None:
        raise FewstepError(f'path must be CondOT(), Cosine(), VP(...), VE(...) or EDM(...), got "{recipe.path}"')
    if source is not None and source.shape != data.shape:
        raise FewstepError(f"source and data must have one shape, got {source.shape} and {data.shape}")
    if data.size is not None and data.size < 1:
        raise FewstepError("there are no data to train on")

    def model(network: nn.Module) -> Model:
        bare = adapt(
            network, path=path, predicts=recipe.predicts, shape=data.shape, raw=recipe.raw, sigma_data=recipe.sigma_data,
            classes=data.classes, null_label=data.classes, name=(Path(recipe.data).stem or "model")[:200],
            source=SourcePoints(recipe.source) if recipe.source else None,
        )  # fmt: skip
        return bare if source is None else with_source(bare, source)

    base = Regression(target=recipe.target or None, weight=recipe.weight, huber=recipe.huber)
    if objective is None:
        objective = base
    elif recipe.divergence:
        raise FewstepError("the recipe's divergence would do nothing beside an objective of your own; leave it out")
    if recipe.divergence:
        objective = FlowAndDivergence(
            base=base, weight=recipe.divergence, form=recipe.divergence_form, share=recipe.divergence_share,
            every=recipe.divergence_every, probes=recipe.probes,
        )  # fmt: skip
    if recipe.coupling not in COUPLINGS:
        raise FewstepError(f'coupling must be one of {", ".join(COUPLINGS)}, got "{recipe.coupling}"')
    coupling = COUPLINGS[recipe.coupling]()
    if recipe.divergence and (coupling.whole or source is not None):
        raise FewstepError("divergence matching needs normal noise that is independent of the data; use coupling = independent")
    law = LAWS[recipe.time](**({"mean": recipe.time_mean, "std": recipe.time_std} if "normal" in recipe.time else {}))
    return Parts(recipe, data, source, path, objective, base, coupling, law, model)


def first_network(parts: Parts, start: str = "") -> nn.Module:
    """The recipe's network with its first weights: those of the model `start`, or without one the seed's.

    Raises:
        FewstepError: a model to start from that is another one than the recipe's.
    """
    recipe, data = parts.recipe, parts.data
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator(recipe.seed, "weights").get_state())
        network = build(recipe.network, data.shape, data.classes or 0, recipe.network_options())
    if start:
        first = load(start)
        if differing := changed(_identity(first), _identity(parts.model(network))):
            each = "; ".join(f"{name} is {a} there and {b} here" for name, (a, b) in differing.items())
            raise FewstepError(f"cannot start from {start}: {each}; start from a model of the same settings")
        assert isinstance(first.network, nn.Module)  # of the same kind as ours
        network.load_state_dict(first.network.state_dict())
    return network


def check_network(network: nn.Module, data: Source) -> None:
    """Whether a caller's network can be trained on these data.

    Raises:
        FewstepError: it cannot be called as it will be, is TorchScript, or all its weights are frozen.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise FewstepError(
            "a traced or scripted network cannot be trained (PyTorch cannot copy it for the moving average); pass the module "
            "that it was made from"
        )
    labelled = data.classes is not None
    method = "forward" if type(network).__call__ is nn.Module.__call__ else "__call__"
    signature = _signature(getattr(network, method))
    try:
        if signature is not None:
            signature.bind(None, None, **({"label": None} if labelled else {}))
    except TypeError:
        said = "labels, so network(x, t, label)" if labelled else "no labels, so network(x, t)"
        raise FewstepError(
            f"the data have {said} is called, got {type(network).__name__}.{method}{signature}; change one of them"
        ) from None
    if not any(p.requires_grad for p in network.parameters()):
        raise FewstepError(
            f"{type(network).__name__} has no weights to train (requires_grad is off for all of them); turn it on"
        )


def _signature(function: Callable) -> inspect.Signature | None:
    """None where Python does not know it, as of a function written in C."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return None


def _identity(model: Model) -> dict[str, Any]:
    """What two models must share for the weights of one to mean the same in the other."""
    facts = {"path": model.path, "predicts": model.predicts, "raw": model.raw, "shape": model.shape, "classes": model.classes}
    if model.raw == "edm":
        facts["sigma_data"] = model.sigma_data
    kind = kind_of(model.network)
    options = getattr(model.network, "config", {}) if kind else {}
    return facts | {"network": kind} | {name: value for name, value in options.items() if name != "dropout"}


def optimizer_for(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW in one fused kernel."""
    settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "betas": (0.9, recipe.beta2)}
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], fused=True, **settings)
