"""The training loop: one, flat, for every recipe.

Everything random in step s depends on (seed, s, place in the batch) and nothing else, so a resumed run ends with the weights of
an undisturbed one, on a CPU bit for bit, and several processes see the batches that one would see.
"""

import math
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .._types import FewstepError
from ..field import Model
from ..keyed import generator
from ..zoo import training_record
from .assemble import Parts, assemble, check_network, first_network, optimizer_for
from .batch import Ahead, Batch, Objective, check_objective, checked, pieces_of
from .data import Source, open_source
from .finish import finish, write_curve
from .ingredients import Own, made_of
from .losses import Losses
from .measure import held_out_loss, write_preview
from .recipe import Keeping, Recipe, plain
from .setup import accelerator_for, check_folder, data_of, same_as_given, shares_of
from .state import Run, newest
from .watch import interrupted, shown

LOOK = 25
"""Steps between two looks at the losses where a look makes the host wait for the device. A launcher that forwards a signal
waits half a minute before it kills."""


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    data: Source | None = None,
    network: nn.Module | None = None,
    objective: Objective | None = None,
    resume: bool = False,
    keeping: Keeping = Keeping(),  # noqa: B008  # frozen
    progress: bool = False,
    skip_unreadable: bool = False,
) -> Model:
    """Train a flow, and save the model with its card and loss curve in `out`.

    Under ``torchrun --nproc_per_node N`` the batch is shared among N processes; the curve stays that of one process.

    Args:
        recipe: what decides the weights, such as ``RECIPES["digits"]`` or ``replace(RECIPES["digits"], lr=3e-4)``.
        out: folder for checkpoints while training, and for the model, which `fewstep.load` and ``fewstep tune`` take.
        data: instead of the recipe's own data: anything like what `open_source` returns, such as a `FiniteSource`. What the
            recipe says of its data (hold_out, flip, dequantize, classes) must be true of them.
        network: instead of the recipe's own network: any module called ``network(x, t)``, or ``network(x, t, label)`` for data
            with labels, where label == classes stands for none. Such a model is returned; of it only the weights are saved.
        objective: instead of the recipe's: anything with the methods of `fewstep.training.batch.Objective`, most simply a
            subclass of `fewstep.training.objective.Regression`. The loss on samples kept aside stays the recipe's regression.
        resume: continue the unfinished run in `out`.
        keeping: checkpoints, previews, trackers and a limit of time.
        progress: show rate, losses and time left on stderr.
        skip_unreadable: leave out images that cannot be read (the card says how many), instead of stopping at the first.

    Returns:
        The trained model, with averaged weights.

    Raises:
        FewstepError: a recipe that cannot be, data that cannot be read, more processes than the batch can be shared among, a
            network that cannot be called so, has nothing to train or gives another shape, an objective that does not give
            one number for each sample, a loss that is NaN or infinite (the last good checkpoint stays), or `out`
            holds a run or a model and `resume` is off.
        KeyboardInterrupt: Ctrl-C or a termination signal, after the current step and a checkpoint.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = train(Recipe(data="checkerboard", steps=3, batch=8, width=8, blocks=1), folder)
        >>> model.shape
        (2,)
    """
    session = _begin(recipe, Path(out), data, network, resume, keeping, progress, skip_unreadable, objective)
    run, steps = session.run, recipe.steps
    show_it = progress and session.main
    with (
        torch.random.fork_rng(devices=[session.device] if session.device.type == "cuda" else []),
        interrupted() as asked,
        closing(session.ahead),
        shown(run, steps, recipe.batch, keeping, show_it) as show,
    ):
        late = session.agreed(run.seconds >= keeping.seconds)
        while run.step < steps and not late:  # all processes leave in the same step, or the others would wait for ever
            session.advance()
            pause = run.step % keeping.every == 0 or run.step == steps
            if pause or run.step % session.look == 0 or (asked() and not session.several):
                session.check_losses()
                stop, late = session.agreed(asked()), session.agreed(run.seconds >= keeping.seconds)
                if pause or stop or late:
                    session.save(point=pause or late)
                if stop and run.step < steps:
                    show()
                    raise KeyboardInterrupt
            if keeping.preview and run.step % keeping.preview == 0 and session.main:
                write_preview(session.parts.model(run.ema), session.out, run.step, recipe.seed)
            show()
    return session.finish()


@dataclass
class Session:
    """One process's part in a run.

    Attributes:
        parts: the recipe as objects.
        accelerator: devices, processes and mixed precision.
        run: weights, averages and counters.
        network: what is called and back-propagated through; `run.network` in accelerate's wrapping.
        optimizer: in accelerate's wrapping where gradients are scaled (fp16).
        shares: (start, stop) of this process's pieces of every batch.
        out: the run's folder.
        keeping: see `train`.
        own: what the caller passed instead of the recipe's.
        cpu_seconds: processor time of this process since the last checkpoint.
    """

    parts: Parts
    accelerator: Accelerator
    run: Run
    network: nn.Module
    optimizer: torch.optim.Optimizer
    shares: list[tuple[int, int]]
    out: Path
    keeping: Keeping
    own: Own
    cpu_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.main, self.several = self.accelerator.is_main_process, self.accelerator.num_processes > 1
        self.model = self.parts.model(self.network)
        self.weights = [p for p in self.run.network.parameters() if p.requires_grad]
        # Its number too: "cuda" alone is the current device, which is another one in the thread that makes batches.
        self.device = self.weights[0].device if self.weights else self.accelerator.device
        self.look = LOOK if self.device.type != "cpu" else 5 if self.several else 1
        self.losses = Losses(lambda values: self._reduced(values, "mean") if self.several else values)
        self.ahead = Ahead(partial(self.parts.batch, device=self.device), self.shares, self.parts.recipe.steps)

    def advance(self) -> None:
        """One optimiser step."""
        wall, cpu, run, recipe = time.perf_counter(), time.process_time(), self.run, self.parts.recipe
        seed = generator(recipe.seed, "dropout", run.step, self.shares[0][0]).initial_seed()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, run.step)
        means: dict[str, Tensor] = {}
        for k in range(len(self.shares)):
            for name, value in self._backward(self.ahead.take(run.step, k), last=k == len(self.shares) - 1):
                means[name] = means[name] + value if name in means else value
        if recipe.clip:
            self.accelerator.clip_grad_norm_(self.weights, recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        run.blend()
        run.step += 1
        run.passes += round(recipe.batch * self.parts.passes)
        run.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        self.losses.add(means)

    def _backward(self, batch: Batch, *, last: bool) -> list[tuple[str, Tensor]]:
        """Add the gradients of a share of the step's batch; its terms of the step's mean losses, by name."""
        left, found = len(batch.x1), []
        size = left * len(self.shares)
        pieces = pieces_of(self.parts.objective, self.model, batch)
        for j, piece in enumerate(pieces):
            waiting = self.several and not (last and j == len(pieces) - 1)  # gradients are exchanged with the last piece only
            with self.accelerator.no_sync(self.network) if waiting else nullcontext():
                loss = checked(piece(), left, last=j == len(pieces) - 1)
                left -= len(loss.each)
                mean = loss.each.sum() / size
                self.accelerator.backward(mean)
            found += [("loss", mean.detach()), *((name, value.sum() / size) for name, value in loss.parts.items())]
            del loss, mean  # or the next piece's graph would be made beside this one's
        return found

    def check_losses(self) -> None:
        """Bring the losses to the host, over all processes.

        Raises:
            FewstepError: one of them is NaN or infinite.
        """
        if bad := self.losses.look():
            raise self._diverged(bad[1], self.run.step - bad[0])

    def agreed(self, flag: bool) -> bool:
        """Whether any process says so; all of them must ask."""
        if not self.several:
            return flag
        return bool(self._reduced(torch.tensor(float(flag), device=self.device), "sum") > 0)

    def save(self, *, point: bool) -> None:
        """Write a checkpoint, with a new point on the curve if asked."""
        run = self.run
        if not run.finite():
            raise self._diverged(math.nan, run.step)
        spent = torch.tensor(self.cpu_seconds, device=self.device)
        run.cpu_seconds, self.cpu_seconds = run.cpu_seconds + float(self._reduced(spent, "sum")), 0.0
        if self.accelerator.scaler is not None:
            run.scaler = self.accelerator.scaler.state_dict()
        if point and (means := self.losses.point()):
            entry = {"step": run.step, **means, "lr": learning_rate(self.parts.recipe, run.step - 1)}
            entry |= held_out_loss(self.parts, run.ema)
            entry["samples_per_s"] = round(run.step * self.parts.recipe.batch / run.seconds, 1)
            run.curve.append(entry)
            self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=run.step)
        if self.main:
            run.save(self.out, self.keeping.keep)
            write_curve(run.curve, self.out)

    def finish(self) -> Model:
        """Save the model and clear the checkpoints away."""
        model = self.parts.model(self.run.ema)
        if self.main:
            finish(self.run, self.parts, model, self.out, self.keeping.stored, self.own)
        self.accelerator.wait_for_everyone()
        if self.keeping.tracker:
            self.accelerator.end_training()  # ends the process group, too
        return model

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        reduced = self.accelerator.reduce(values, how)
        assert isinstance(reduced, Tensor)
        return reduced

    def _diverged(self, value: float, step: int) -> FewstepError:
        saved, recipe = self.run.saved, self.parts.recipe
        kept = f"the last good checkpoint (step {saved}) is kept in {self.out}" if saved else "there is no checkpoint yet"
        return FewstepError(
            f"the loss is {value:g} at step {step}, learning rate {learning_rate(recipe, step - 1):.3g}: training "
            f"has diverged; {kept}; start afresh with a lower --lr{'' if recipe.clip else ' or --clip 1'}, in another --out"
        )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then constant or a cosine to zero."""
    rise = min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * step / recipe.steps)) if recipe.decay == "cosine" else 1.0
    return recipe.lr * rise * fall


def _begin(
    recipe: Recipe, out: Path, data: Source | None, network: nn.Module | None, resume: bool, keeping: Keeping, progress: bool,
    skip_unreadable: bool = False, objective: Objective | None = None,
) -> Session:  # fmt: skip
    recipe.check()
    keeping.check()
    check_folder(out, resume=resume)
    if objective is not None:
        check_objective(objective)
    accelerator = accelerator_for(recipe, keeping, out)
    shares = shares_of(recipe, accelerator.process_index, accelerator.num_processes)
    if network is not None and recipe.start:
        raise FewstepError(
            "the recipe's start would do nothing to a network of your own; load its weights before, or leave it out"
        )
    if data is not None:
        same_as_given(recipe, data)
    found = data if data is not None else data_of(recipe, skip_unreadable=skip_unreadable)
    parts = assemble(recipe, found, open_source(recipe.source) if recipe.source else None, objective)
    if network is not None:
        check_network(network, found)
    made = network if network is not None else first_network(parts, start="" if resume else recipe.start)
    made.to(accelerator.device).train()
    bare = optimizer_for(made, recipe)
    own = Own.of(network, data, objective)
    # Before the wrapping, whose autocast the average must not inherit.
    run = Run.begin(plain(recipe), made, bare, recipe.ema, made_of(network, objective, found, parts.source))
    wrapped, prepared = accelerator.prepare(made, bare)
    # The wrapping is for gradients that a scaler scales; without one it only looks for absent packages, at every step.
    optimizer = bare if accelerator.scaler is None else prepared
    if recipe.start and not resume:  # a checkpoint keeps it: the model may be gone by then
        record = training_record(recipe.start)
        run.before = None if record is None else record.model_dump()
    if resume:
        news = run.restore(newest(out))
        if news and progress:
            accelerator.print(f"note: {news}: the weights may differ from an undisturbed run's in their last bits")
        if run.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(run.scaler)
    if keeping.tracker:
        accelerator.init_trackers("fewstep", config={k: str(v) for k, v in plain(recipe).items()})
    return Session(parts, accelerator, run, wrapped, optimizer, shares, out, keeping, own)
