"""Kill -9 at random steps, and resume: do the final weights equal those of an undisturbed run?

    python benchmarks/kill_resume.py

A run of the digits recipe is killed and resumed until `--kills` kills have struck, each in a process of its own and at a
moment drawn beforehand: when a random step of the run is reached for the first time, plus up to 50 ms. Every fourth kill is
aimed: it waits for the next checkpoint and strikes as soon as the file that is being written appears. A life begins at the
newest whole checkpoint, so the steps since then are repeated. The worker says over a pipe which step draws its data and hears
nothing; it is `fewstep.training.loop` as it is. The exit status is 1 unless both runs end with the same `model.safetensors`,
byte for byte, and the same loss curve.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewstep.training.recipe import RECIPES, Keeping, Recipe
from fewstep.training.state import checkpoints
from fewstep.zoo.checkpoint import WEIGHTS


def recipe(steps: int) -> Recipe:
    """Small digits: labels, dropout, warm-up, decay and clipping, all of which a resumed run must go on with."""
    return replace(RECIPES["digits"], width=64, batch=128, steps=steps, warmup=steps // 5, clip=1.0)


class Telling:
    """A source that writes the step it is asked for to a file descriptor."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def draw(self, keyed: Any, total: int) -> Any:
        """As the source itself."""
        os.write(sys.stdout.fileno(), b"%d\n" % keyed.step)
        return self._source.draw(keyed, total)


def worker(out: Path, steps: int, every: int, resume: bool) -> None:
    from fewstep.training.data import open_source
    from fewstep.training.loop import train

    this = recipe(steps)
    source = Telling(open_source(this.data, hold_out=this.hold_out))
    train(this, out, data=source, resume=resume, keeping=Keeping(every=every))  # type: ignore[arg-type]  # passes on what it wraps


@dataclass
class Count:
    """What happened."""

    kills: int = 0
    starts: int = 0
    resumes: int = 0
    repeated: int = 0
    aimed: int = 0
    killed_at: list[int] = field(default_factory=list)
    left: int = 0
    """Temporary files that kills left behind."""


@dataclass(frozen=True)
class Kill:
    """When to strike: as step `step` begins and `delay` seconds later, or, aimed, when the next file is being written."""

    step: int
    delay: float
    aimed: bool

    def wait(self, out: Path, before: set[str]) -> None:
        """Until it is time."""
        end = time.perf_counter() + 5.0
        if not self.aimed:
            time.sleep(self.delay)
        while self.aimed and temporary(out) <= before and time.perf_counter() < end:
            pass


def live(out: Path, steps: int, every: int, count: Count, kill: Kill | None) -> int:
    """One process's life: the last step that it began."""
    resume = bool(checkpoints(out))
    words = ["--worker", str(out), "--steps", str(steps), "--every", str(every), *(["--again"] if resume else [])]
    count.starts, count.resumes = count.starts + 1, count.resumes + resume
    before, last, struck = temporary(out), -1, False
    with subprocess.Popen(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, env={"OMP_NUM_THREADS": "1"} | os.environ
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:  # after the kill, what was said before it: `last` is the step that the process died in
            last = int(line)
            if kill is not None and last >= kill.step and not struck:
                struck = True
                kill.wait(out, before)
                os.kill(process.pid, signal.SIGKILL)
    if process.returncode == -signal.SIGKILL:
        count.kills += 1
        count.killed_at.append(last)
        count.left += len(temporary(out) - before)
    elif process.returncode:
        sys.exit(f"the worker ended with status {process.returncode} in step {last}")
    return last


def temporary(out: Path) -> set[str]:
    """Names of files that are being written, or were when a process died."""
    return {file.name for file in out.glob(".*.tmp")}


def disturbed(out: Path, steps: int, every: int, kills: int, seed: int) -> Count:
    """Train to the end through `kills` kills."""
    rng, count = random.Random(seed), Count()
    for i, step in enumerate(sorted(rng.sample(range(1, steps - every), kills))):
        aimed = i % 4 == 3
        last = live(out, steps, every, count, Kill(step, rng.uniform(0.0, 0.05), aimed))
        if (out / WEIGHTS).exists():
            sys.exit(f"the run ended before its kill at step {step}: use more --steps or another --seed")
        found = checkpoints(out)
        count.aimed += aimed
        count.repeated += last + 1 - (step_of(found[-1]) if found else 0)
    live(out, steps, every, count, None)
    return count


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.rpartition("-")[2])


def digest(out: Path) -> str:
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


def losses(out: Path) -> list[tuple[int, float, float]]:
    """The loss curve without its rate, which no two runs share."""
    points = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    return [(p["step"], p["loss"], p["held_out"]) for p in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill_resume.json")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.steps, args.every, args.again)
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        calm, rough = Path(folder) / "calm", Path(folder) / "rough"
        live(calm, args.steps, args.every, Count(), None)
        count = disturbed(rough, args.steps, args.every, args.kills, args.seed)
        row = {
            "steps": args.steps, "every": args.every, "kills": count.kills, "aimed": count.aimed,
            "starts": count.starts, "resumes": count.resumes, "steps repeated": count.repeated,
            "killed in step": count.killed_at,
            "temporary files left by kills": count.left, "of them still there at the end": len(temporary(rough)),
            "undisturbed": digest(calm), "killed and resumed": digest(rough),
            "same weights": digest(calm) == digest(rough), "same loss curve": losses(calm) == losses(rough),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
    print("| kills | at a checkpoint | resumes | steps | repeated | unfinished files left | same weights | same loss curve |")
    print("|---|---|---|---|---|---|---|---|")
    shown = (
        "kills",
        "aimed",
        "resumes",
        "steps",
        "steps repeated",
        "temporary files left by kills",
        "same weights",
        "same loss curve",
    )
    print(f"| {' | '.join(str(row[name]) for name in shown)} |")
    print(f"SHA-256 of the weights: {row['undisturbed']} undisturbed, {row['killed and resumed']} killed and resumed")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    sys.exit(0 if row["same weights"] and row["same loss curve"] else 1)


if __name__ == "__main__":
    main()
