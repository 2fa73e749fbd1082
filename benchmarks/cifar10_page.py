"""docs/benchmarks.md and its plots, from the results of cifar10.py (digits.json and all cifar10*.json) and of transfer.py.

python benchmarks/cifar10_page.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("Agg")

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
Cells = Mapping[str, Any]
TITLES = {
    "digits": "Digits (bundled, 8 x 8)",
    "digits-vp": "Digits, VP with v-prediction (trained by the benchmark)",
    "digits-edm": "Digits, EDM-preconditioned (trained by the benchmark)",
    "cifar10-flow": "CIFAR-10, flow (CondOT)",
    "cifar10-vp": "CIFAR-10, VP with v-prediction",
}
EFFORTS = ("fit", "learn")
NOTES = {
    "pfdiff": (
        "(k, l) and grid (uniform in t, log-SNR or EDM's) of each row are the best by RMSE on other noise, that which the "
        "solvers above learn from. PFDiff and its halves have the six published (k, l) to choose from (the halves "
        "on CIFAR-10 VP: three, l = 1).",
    ),
    "others": (
        "The best error need not be the best distance. Less the distance of the learned table (where none was learnt, of the "
        "fit) on the same noise: above zero with its whole interval, the stock scheduler is worse.",
    ),
    "guidance": ("32 noises for each value, for one table as for three.",),
    "moved": (
        "Tables tuned on the flow that was in `models/` before, the same network after a tenth of the images "
        "(`benchmarks/results/first-flow-tables.json`), beside those tuned on this one.",
    ),
}
SETTINGS = (
    "{noises} test noises; `tune` fits to its default number of noises, which the table of costs says, and chooses by as many."
)


def number(estimate: Mapping[str, float], digits: int = 4) -> str:
    """A value with its interval."""
    return f"{estimate['value']:.{digits}g} [{estimate['low']:.{digits}g}, {estimate['high']:.{digits}g}]"


def drawn(row: Mapping[str, Any]) -> str:
    """How many images the distances of a cell are of, as its metrics say."""
    labels = [key for values in row.values() if isinstance(values, dict) for key in values if key.startswith("FD (")]
    return labels[0].rpartition(", ")[2].rstrip(")")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in lines)]
    )


def budgets(cells: Cells, model: str, part: str) -> list[int]:
    """The NFE for which this part was measured."""
    found = [key.split("/") for key in cells if key.startswith(f"{model}/{part}/")]
    return sorted({int(key[2]) for key in found})


def errors(cells: Cells, model: str) -> str:
    """RMSE against NFE."""
    lines = []
    for n in budgets(cells, model, "stock"):
        row = cells[f"{model}/stock/{n}"]
        values = {k: v["rmse"]["value"] for k, v in row.items() if isinstance(v, dict) and "rmse" in v}
        stock = row["best stock"]
        shipped = min((k for k, v in row.items() if isinstance(v, dict) and v.get("group") == "stock"), key=lambda k: values[k])
        grids = [k for k in values if "@" in k]
        plain = min((k for k in grids if not k.endswith("@boss")), key=lambda k: values[k])
        boss = min((k for k in grids if k.endswith("@boss")), key=lambda k: values[k], default="")
        line = [
            str(n),
            f"{values[shipped]:.4f} ({shipped})",
            f"{number(row[stock]['rmse'])} ({stock})",
            f"{values[plain]:.4f} ({plain})",
        ]
        line.append(f"{values[boss]:.4f} ({boss})" if boss else "-")
        for effort in EFFORTS:
            mine = cells.get(f"{model}/{effort}", {}).get(str(n))
            if mine:
                line += [number(mine["rmse"]), f"**{mine['rmse']['value'] / values[stock]:.2f}**"]
                line.append(f"{mine['median']['value'] / row[stock]['median']['value']:.2f}")
            else:
                line += ["-", "-", "-"]
        lines.append(line)
    head = ["NFE", "best stock, as shipped", "best stock, any grid", "best Euler, DDIM or Heun on uniform, log-SNR, EDM grids"]
    head += ["the same on BOSS's grid", "`--effort fit`", "ratio", "of medians", "`--effort learn`", "ratio", "of medians"]
    solved = [v for k, v in cells.get(f"{model}/dopri5", {}).items() if k.startswith("dopri5")]
    adaptive = ", ".join(f"{v['rmse']:.4f} at {v['nfe']} calls" for v in solved)
    note = "Ratios are to the best stock scheduler at this NFE." + (f" dopri5: {adaptive}." if solved else "")
    tuned = [v for effort in EFFORTS for v in cells.get(f"{model}/{effort}", {}).values() if isinstance(v, dict)]
    lowest = min(v["rmse"]["value"] for v in tuned)
    exact = cells[f"{model}/stock/{budgets(cells, model, 'stock')[0]}"]["reference error"]
    note += f" Their reference solution errs by {exact:.2g}; the lowest error here is {lowest / exact:.3g} times that."
    return f"{markdown(head, lines)}\n\n{note}\n"


def cost(cells: Cells, model: str) -> str:
    """What tuning took, each effort from nothing."""
    lines = []
    for effort in EFFORTS:
        row = cells.get(f"{model}/{effort}")
        if row:
            solved, noises = [n for n in row if n.isdecimal()], str(row["fitting noises"])
            share = row["tuning passes"] / row["training passes"]
            spent = [f"{row['tuning passes']:,}", f"{share:.2%}", f"{share / len(solved):.3%}", f"{row['measuring passes']:,}"]
            lines.append([effort, noises, ", ".join(solved), *spent])
    head = (
        "effort",
        "fitting noises",
        "NFE",
        "tuning, network passes",
        "of the model's training",
        "per budget",
        "measuring, network passes",
    )
    return markdown(head, lines) + "\n"


def distances(cells: Cells, model: str) -> str:
    """Images against NFE."""
    lines, columns = [], ("FD", "FD - best stock", "spatial FD", "spatial FD - best stock", "KID", "precision", "recall")
    for n in budgets(cells, model, "images"):
        row = cells[f"{model}/images/{n}"]
        for name, values in row.items():
            if not isinstance(values, dict) or (name == "real data" and n != budgets(cells, model, "images")[0]):
                continue
            metrics = {k.split(" (")[0]: v for k, v in values.items() if isinstance(v, dict)}
            shown = [number(metrics[k], 3) if k in metrics else "-" for k in columns]
            lines.append(["-" if name == "real data" else str(n), drawn(row), name, *shown])
    return markdown(("NFE", "images", "sampler", *columns), lines) + "\n\nImages are per sampler and seed, of three seeds.\n"


def others(cells: Cells, model: str) -> str:
    """Images of further stock schedulers."""
    lines = []
    for n in budgets(cells, model, "others"):
        row = cells[f"{model}/others/{n}"]
        for name, values in row.items():
            if isinstance(values, dict) and name not in ("real data", "tune"):
                metrics = {k.split(" (")[0]: v for k, v in values.items() if isinstance(v, dict)}
                error = f"{cells[f'{model}/stock/{n}'][name]['rmse']['value']:.4f}"
                lines.append([str(n), drawn(row), name, error, *(number(metrics[k], 3) for k in ("FD", "FD - tune"))])
    return markdown(("NFE", "images", "sampler", "RMSE", "FD", "FD - tune"), lines) + "\n"


def learned(cells: Cells, model: str) -> str:
    """The learned solvers one by one: errors, distances of their images, and what they cost."""
    lines, steps = [], budgets(cells, model, "learned")
    for n in steps:
        held = cells[f"{model}/learned/{n}"]
        images = cells.get(f"{model}/learned-images/{n}", {})
        for name, row in held.items():
            if not isinstance(row, dict):
                continue
            found = {k.split(" (")[0]: v for k, v in images.get(name, {}).items() if isinstance(v, dict)}
            shown = [number(found[k], 3) if k in found else "-" for k in ("FD", "FD - best stock")]
            spent = ["-"] * 4
            if "network passes" in row:
                passes = row["network passes"]
                spent = [
                    str(row["parameters"]),
                    f"{passes:,}",
                    f"{passes / held['training passes']:.2%}",
                    f"{row['seconds']:.0f}",
                ]
            lines.append([str(n), name, number(row["rmse"]), f"{row['median']['value']:.4f}", *shown, *spent])
    row = cells[f"{model}/learned/{steps[0]}"]
    identity = '; "identity start" as the paper does' if "Bespoke RK2, identity start" in row else ""
    note = (
        f"Each from {row['noises']} noises, of which a quarter chooses among the iterates; errors on {row['tested']:,} noises, "
        f"measured against solutions that err by {row['reference error']:.2g}. "
        f"Bespoke starts from the best of five widths of the path's noise{identity}. Seconds are of one thread on a machine "
        "that was busy with other work. The passes include each solver's own reference solution.\n\n"
    )
    head = (
        "NFE",
        "solver",
        "RMSE",
        "median",
        "FD",
        "FD - best stock",
        "numbers",
        "network passes",
        "of the training",
        "seconds",
    )
    return note + markdown(head, lines) + "\n"


def pfdiff(cells: Cells, model: str) -> str:
    """PFDiff and its halves."""
    lines = []
    for key in (k for k in cells if k.startswith(f"{model}/pfdiff/")):
        row = cells[key]
        for family, name in row["best"].items():
            images = {k.split(" (")[0]: v for k, v in row["images"][name].items() if isinstance(v, dict)}
            shown = [number(images[k], 3) if k in images else "-" for k in ("FD", "spatial FD", "precision", "recall")]
            shown.append(f"{row['seconds per 1,000 samples'][name]:.3f}")
            lines.append([key.split("/")[2], key.rpartition(" ")[2], family, name, number(row["errors"][name]["rmse"]), *shown])
    head = ("NFE", "guidance", "family", "chosen", "RMSE", "FD", "spatial FD", "precision", "recall", "s per 1,000 samples")
    return markdown(head, lines) + "\n"


def guidance(cells: Cells, model: str) -> str:
    """One table for a range of guidance values."""
    lines = []
    for n in budgets(cells, model, "guidance"):
        for w, row in cells[f"{model}/guidance/{n}"].items():
            if isinstance(row, dict):
                lines.append(
                    [str(n), w, *(number(row[k]["rmse"]) for k in ("one table for all", "its own table", "best stock"))]
                )
    return markdown(("NFE", "guidance", "one table for 1, 2 and 4", "its own table", "best stock of that value"), lines) + "\n"


def moved(cells: Cells, model: str) -> str:
    """Tables of another training."""
    lines = []
    for n in budgets(cells, model, "moved"):
        row = cells[f"{model}/moved/{n}"]
        for effort in EFFORTS:
            if f"{effort}, own" in row:
                found = (row[k]["rmse"] for k in (f"{effort}, own", f"{effort}, transferred", "euler@uniform"))
                lines.append([str(n), effort, *map(number, found)])
    return markdown(("NFE", "effort", "own", "transferred", "uniform Euler"), lines) + "\n"


def transfer(results: Mapping[str, Any]) -> str:
    """Tables of one model on others."""
    lines = []
    for model, row in results["rmse"].items():
        for tuner in dict.fromkeys(k.rpartition(", ")[0] for k in row if ", " in k):
            own, other = ("{:.4g} [{:.4g}, {:.4g}]".format(*row[f"{tuner}, {k}"]) for k in ("own", "transferred"))
            lines.append([model, tuner, own, "-" if model == "first" else other, f"{row['uniform'][0]:.4f}"])
    return markdown(("model", "table", "own", "transferred from the first", "uniform Euler"), lines) + "\n"


def plot(cells: Cells, models: Sequence[str], out: Path) -> None:
    """RMSE above, Frechet distance below, against NFE."""
    figure, axes = plt.subplots(2, len(models), figsize=(4.2 * len(models), 6.4), squeeze=False)
    for column, model in enumerate(models):
        top, bottom = axes[0][column], axes[1][column]
        steps = [n for n in budgets(cells, model, "stock") if f"{model}/fit" in cells and str(n) in cells[f"{model}/fit"]]
        stock = [cells[f"{model}/stock/{n}"] for n in steps]
        top.plot(
            steps, [row[row["best stock"]]["rmse"]["value"] for row in stock], "o-", color="0.45", label="best stock scheduler"
        )
        for effort, color in zip(EFFORTS, ("tab:blue", "tab:red"), strict=True):
            held = cells.get(f"{model}/{effort}", {})
            known = [n for n in steps if str(n) in held]
            rows = [held[str(n)]["rmse"] for n in known]
            if rows:
                top.plot(known, [r["value"] for r in rows], "o-", color=color, label=f"tune --effort {effort}")
                top.fill_between(known, [r["low"] for r in rows], [r["high"] for r in rows], color=color, alpha=0.15)
        top.set(yscale="log", title=TITLES[model].partition(" (")[0], xticks=steps)
        top.set(ylabel="" if column else "RMSE to the converged solution")
        shown = budgets(cells, model, "images")
        names = {"best stock": "0.45", "tune --effort fit": "tab:blue", "tune --effort learn": "tab:red"}
        for name, color in names.items():
            known = [n for n in shown if name in cells[f"{model}/images/{n}"]]
            found = [next(v for k, v in cells[f"{model}/images/{n}"][name].items() if k.startswith("FD")) for n in known]
            spread = [[v["value"] - v["low"] for v in found], [v["high"] - v["value"] for v in found]]
            bottom.errorbar(known, [v["value"] for v in found], spread, fmt="o-", color=color, capsize=2)
        bottom.set_visible(bool(shown))
        if shown:
            floor = next(v for k, v in cells[f"{model}/images/{shown[0]}"]["real data"].items() if k.startswith("FD"))
            bottom.axhline(floor["value"], color="k", lw=0.8, ls=":")
            bottom.set(xticks=shown)
        bottom.set(xlabel="NFE", ylabel="Frechet distance (dotted: real images)" if column == 0 else "")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    """Write the page."""
    found = [*(HERE / "results").glob("digits.json"), *sorted((HERE / "results").glob("cifar10*.json"))]
    files = [json.loads(file.read_text()) for file in found]
    cells = {name: cell for held in files for name, cell in held["cells"].items()}
    settings = {name: held["config"] for held in files for name in held["cells"]}
    models = [m for m in TITLES if f"{m}/fit" in cells]
    plot(cells, models, DOCS / "img" / "benchmarks.png")
    words = [(HERE / "cifar10_page_head.md").read_text().format(machine=files[0]["machine"])]
    for model in models:
        of = settings[f"{model}/fit"]
        words += [
            f"## {TITLES[model]}",
            SETTINGS.format(**of),
            "### End-point error",
            errors(cells, model),
            "### Cost of tuning, all budgets at once",
            cost(cells, model),
        ]
        parts = {"images": ("Images", distances), "others": ("Images of the stock schedulers that come next by error", others),
                 "learned": ("The learned solvers one by one", learned),
                 "pfdiff": ("PFDiff and its halves", pfdiff), "guidance": ("A range of guidance", guidance),
                 "moved": ("Transfer from another training", moved)}  # fmt: skip
        for part, (title, write) in parts.items():
            if budgets(cells, model, part):
                words += [f"### {title}", *NOTES.get(part, ()), write(cells, model)]
    file = HERE / "results" / "transfer.json"
    if file.exists():
        tables = json.loads(file.read_text())
        words += [
            "## Transfer between digits models",
            f"`python benchmarks/transfer.py`: RMSE at NFE {tables['nfe']} on {tables['noises']} test noises, models trained "
            f"for {tables['steps']:,} steps.",
            transfer(tables),
        ]
    (DOCS / "benchmarks.md").write_text("\n\n".join(word.strip("\n") for word in words) + "\n")


if __name__ == "__main__":
    main()
