import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewstep import Sampler, TableScheduler, load

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("unchecked")


class LabelledNetwork(nn.Module):
    """What the pages call `network`: a small smooth network of images that knows their shape and takes a label."""

    shape = (1, 8, 8)

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, 64, generator=generator) / 8)
        self.shift = nn.Parameter(torch.randn(10, 64, generator=generator))

    def forward(self, x, t, label=None):
        shift = 0.0 if label is None else self.shift[label]
        return torch.tanh(x.flatten(1) @ self.weight + shift + t[:, None]).view(x.shape) - x


def code_blocks(page, language="python"):
    """The fenced blocks of a language, each with the number of its first line."""
    text = (ROOT / page).read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n") + 1, match[1]


def run_page(page, folder, monkeypatch, **names):
    """Run the Python blocks of a page in order in an empty folder; the names that they leave behind."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    blocks = list(code_blocks(page))
    assert blocks
    for line, block in blocks:
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + block, str(ROOT / page), "exec"), names)
    return names


def test_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    pipe = SimpleNamespace(scheduler=None)
    names = run_page("README.md", tmp_path, monkeypatch, network=LabelledNetwork(), pipe=pipe)
    assert names["free"].nfe == names["fast"].nfe == 8
    assert names["image"].shape == (16, 1, 8, 8)
    assert isinstance(pipe.scheduler, TableScheduler)
    assert torch.equal(Sampler.load(tmp_path / "fast-8").b, names["fast"].b)
    table = capsys.readouterr().out
    errors = {line.split("|")[2].strip(): float(line.split("|")[4].split()[0]) for line in table.splitlines()[2:]}
    assert len(errors) == 2
    assert errors[names["fast"].provenance.method] < errors[names["free"].provenance.method]


def test_the_page_on_use_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    names = run_page("docs/using.md", tmp_path, monkeypatch, network=LabelledNetwork())
    printed = capsys.readouterr().out
    for name in names["tables"]:
        assert f"| {name} |" in printed
    assert "guidance=2" in printed
    assert names["digits"].fingerprint() == load("digits").fingerprint()


def test_the_page_on_training_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    names = run_page("docs/training.md", tmp_path, monkeypatch)
    assert load(tmp_path / "runs" / "moons").fingerprint() == names["model"].fingerprint()
    assert torch.isfinite(names["drawn"].log_density.value).all()
    assert "[" in capsys.readouterr().out


def test_the_page_on_metrics_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    report = run_page("docs/metrics.md", tmp_path, monkeypatch)["report"]
    floor, few, many = (row.metrics["FD (pixels, 200)"].value for row in report.rows)
    assert floor < many < few
    assert "FD (pixels, 200) | KID (pixels, 200) | precision (pixels, 200)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model", "flow", "unet", "denoiser", "edm"])
def test_the_models_of_the_page_on_use_can_be_asked(name, tmp_path, monkeypatch):
    _, first = next(code_blocks("docs/using.md"))
    names = {"network": lambda x, t, **labels: 0.1 * x}
    exec(first, names)
    model = names[name]
    velocity = model.given()(torch.ones(2, *model.shape), 0.5)
    assert velocity.shape == (2, 1, 8, 8)
    assert bool(torch.isfinite(velocity).all())


def test_the_page_of_methods_is_the_registry():
    spec = importlib.util.spec_from_file_location("make_methods", ROOT / "docs" / "make_methods.py")
    make_methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_methods)
    assert (ROOT / "docs" / "methods.md").read_text() == make_methods.page(), "run: python docs/make_methods.py"


COMMANDS = [
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/fewstep demo",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_has_each_command_in_exactly_one_code_line(command):
    lines = [line for _, block in code_blocks("README.md", r"\w*") for line in block.splitlines()]
    assert [line for line in lines if command.split("&&")[-1].strip() in line] == [command]
    assert (ROOT / "README.md").read_text().count(command) == 1


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} points to {target}"
