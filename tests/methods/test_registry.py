import sys

import pytest
import torch

from fewstep import VP, FewstepError, TimeGrid, methods, tabulate

DROPPED_IN = '''
from fewstep.methods import method

@method(order=1, paper="a notebook", name="{name}")
def fresh(u, grid, x):
    """Euler again."""
    for t0, t1 in grid.pairs():
        x = x + (t1 - t0) * u(x, t0)
    return x

def variants(path):
    return [fresh]
'''


@pytest.fixture
def drop_in(tmp_path, monkeypatch):
    """Adds a file to `fewstep.methods` for one test."""

    def add(name):
        (tmp_path / "a_dropped_in_file.py").write_text(DROPPED_IN.format(name=name))
        monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])

    yield add
    sys.modules.pop("fewstep.methods.a_dropped_in_file", None)


def test_a_file_that_is_dropped_in_is_registered(drop_in):
    before = methods.registry()
    drop_in("fresh")
    assert set(methods.registry()) - set(before) == {"fresh"}
    found = methods.registry()["fresh"]
    assert (found.order, found.paper, found.stages) == (1, "a notebook", 1)
    assert tabulate(found, TimeGrid.uniform(3)).provenance.method == "fresh"


def test_two_methods_of_one_name_are_refused(drop_in):
    drop_in("euler")
    with pytest.raises(FewstepError, match='two registered methods are called "euler"; names must differ'):
        methods.registry()


def test_methods_are_plain_functions_with_a_price():
    @methods.method(order=1, paper="none", calls=lambda n: 3 * n if n % 2 else None)
    def odd(u, grid, x):
        return x + u(x, 0.0)

    assert odd.name == "odd"
    assert odd.intervals(9) == 3
    with pytest.raises(FewstepError, match="odd cannot spend exactly 10 calls; the nearest budgets are 9 and 15"):
        odd.intervals(10)
    assert torch.equal(odd(lambda x, t: x, TimeGrid.uniform(1), torch.ones(1, 1)), torch.full((1, 1), 2.0))


def test_every_registered_method_says_where_it_comes_from():
    for name, entry in methods.registry(VP()).items():
        assert entry.name == name
        assert entry.paper
        assert entry.order in (1, 2, 3, 4)
