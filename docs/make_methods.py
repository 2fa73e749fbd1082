"""Write docs/methods.md from the registry: ``python docs/make_methods.py``."""

from pathlib import Path

from fewstep.cli import price
from fewstep.methods import registry

HEAD = """# Methods

Every registered training-free method, from `fewstep.methods.registry()`; `fewstep methods` prints the same. The order is the
global one on a fixed smooth grid, start-up included: a multistep method that starts with one call per step stays at order 2,
whatever the order of its interior steps. "Uses the path" means that the numbers depend on alpha(t), sigma(t).

Any method runs on any grid: `euler@uniform`, `pfdiff2_1-noise@boss`, ... with `uniform`, `quadratic`, `power0.8`, `power1.2`,
`shift0.5`, `shift2`, `shift3`, `log-snr`, `karras`, `angle` and `boss` on the command line, and `TimeGrid(knots)` in Python.

| method | order | network calls | uses the path | source |
|---|---|---|---|---|
"""


def page() -> str:
    """The page as it should be."""
    rows = [
        f"| `{m.name}` | {m.order} | {price(m.calls)} | {'yes' if m.path else ''} | {m.paper} |" for m in registry().values()
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "methods.md").write_text(page())
