import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fewstep

SOURCE = Path(fewstep.__file__).parent
ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"

# "Modules, lowest first" of docs/architecture.md; a package counts as one module.
LOWEST_FIRST = [
    "_errors",
    "_types",
    "keyed",
    "_precision",
    "_affine",
    "path",
    "calling",
    "_model",
    "field",
    "composite",
    "grid",
    "coordinates",
    "_disk",
    "_schema",
    "_export",
    "artifact",
    "_plan",
    "sampler",
    "_tabulate",
    "trajectory",
    "methods",
    "noise",
    "problem",
    "tuners",
    "evaluation",
    "_conventions",
    "_unit_vectors",
    "diffusers",
    "stock",
    "candidates",
    "journal",
    "progress",
    "result",
    "verdict",
    "ladder",
    "climb",
    "report",
    "outputs",
    "zoo",
    "training",
    "config",
    "naming",
    "doctor",
    "cli_tune",
    "cli_train",
    "cli",
]


def name_of(file):
    """The entry of the list that a file belongs to."""
    first = file.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def module_level(statements):
    """Statements that run when the module is imported; those for type checkers do not."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from module_level(statement.orelse)
            continue
        yield statement
        for part in ("body", "orelse", "finalbody"):
            yield from module_level(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from module_level(handler.body)


def imported(file, source):
    """The list's entries that a file of `SOURCE` imports when it is itself imported."""
    package = ["fewstep", *file.relative_to(SOURCE).parts[:-1]]
    for statement in module_level(ast.parse(source).body):
        if isinstance(statement, ast.Import):
            targets = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            base = package[: len(package) + 1 - statement.level] if statement.level else []
            base = ".".join([*base, *([statement.module] if statement.module else [])])
            targets = [f"{base}.{alias.name}" for alias in statement.names] if base == "fewstep" else [base]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] == "fewstep" and target != "fewstep.__version__":
                yield parts[1] if len(parts) > 1 else "__init__"


FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_module_imports_only_from_below_itself(file):
    own = name_of(file)
    assert own in LOWEST_FIRST, f"{own} has no place in the list of modules; add it here and to docs/architecture.md"
    place = LOWEST_FIRST.index(own)
    upward = [name for name in imported(file, file.read_text()) if name != own and name not in LOWEST_FIRST[:place]]
    assert not upward, f"{own} imports {upward}, which are above it"


def test_the_package_itself_imports_nothing_of_its_own():
    file = SOURCE / "__init__.py"
    assert list(imported(file, file.read_text())) == []


def test_every_place_in_the_list_is_taken():
    assert sorted(LOWEST_FIRST) == sorted({name_of(file) for file in FILES})


def test_the_list_is_that_of_the_architecture_page():
    page = ARCHITECTURE.read_text()
    table = page[page.index("## Modules, lowest first") : page.index("## The executor")]
    rows = [re.findall(r"`(\w+)/?`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    places = [[LOWEST_FIRST.index(name) for name in row] for row in rows]
    assert sorted(place for row in places for place in row) == list(range(len(LOWEST_FIRST)))
    assert all(max(low) < min(high) for low, high in itertools.pairwise(places))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from . import sampler", ["sampler"]),
        ("from .sampler import Sampler", ["sampler"]),
        ("import fewstep.tuners.boss", ["tuners"]),
        ("from fewstep.zoo import load", ["zoo"]),
        ("from fewstep import cli, grid", ["cli", "grid"]),
        ("import fewstep", ["__init__"]),
        ("try:\n    from .cli import main\nexcept ImportError:\n    from .naming import resolve", ["cli", "naming"]),
        ("class A:\n    from .cli import main", ["cli"]),
        ("def late():\n    from .cli import main", []),
        ("if TYPE_CHECKING:\n    from .cli import main\nelse:\n    from .grid import TimeGrid", ["grid"]),
        ("from . import __version__\nimport torch", []),
    ],
)
def test_the_walk_sees_every_import_that_runs_and_no_other(source, found):
    assert list(imported(SOURCE / "path.py", source)) == found


def test_the_walk_reads_relative_imports_inside_packages():
    inside = SOURCE / "tuners" / "boss.py"
    assert list(imported(inside, "from ..grid import TimeGrid\nfrom .least_squares import fit\nfrom .. import cli")) == [
        "grid",
        "tuners",
        "cli",
    ]


def loaded_by(code, *names):
    watch = f"import sys; {code}; print(*[name for name in {names!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True).stdout.split()


HEAVY = (
    "diffusers",
    "transformers",
    "accelerate",
    "scipy",
    "matplotlib",
    "pydantic",
    "sklearn",
    "jinja2",
    "rich",
    "torchdiffeq",
)


def test_importing_fewstep_loads_nothing_heavy():
    assert loaded_by("import fewstep", "torch", "numpy", "jaxtyping", "cyclopts", *HEAVY) == []


def test_the_core_names_load_torch_and_nothing_heavier():
    assert loaded_by("from fewstep import CondOT, tabulate, adapt", "torch", *HEAVY) == ["torch"]


def test_every_public_name_can_be_imported_and_no_other():
    for name in fewstep.__all__:
        assert getattr(fewstep, name) is not None
    assert set(dir(fewstep)) == set(fewstep.__all__)
    with pytest.raises(AttributeError, match="module 'fewstep' has no attribute 'tun'"):
        fewstep.tun  # noqa: B018
