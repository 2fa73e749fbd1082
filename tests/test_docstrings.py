"""Every example in a docstring runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import fewstep

MODULES = [
    "fewstep",
    *sorted(m.name for m in pkgutil.walk_packages(fewstep.__path__, "fewstep.") if not m.name.endswith("__main__")),
]


def examples():
    """The docstrings with examples, of modules and of everything that they define."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = importlib.import_module(name)
        found = {name: module, **{f"{name}.{key}": value for key, value in vars(module).items()}}
        for key, value in found.items():
            value = getattr(value, "run", value) if isinstance(value, fewstep.methods.Method) else value
            value = value if inspect.ismodule(value) else inspect.unwrap(value) if callable(value) else None
            if value is module or getattr(value, "__module__", None) == name:
                # With module=False the finder also looks at functions that the shape checks have wrapped.
                tests = finder.find(value, key, module=False, globs={**vars(torch), "torch": torch, **vars(module)})
                yield from (test for test in tests if test.examples and (value is not module or test.name == name))


EXAMPLES = {test.name: test for test in examples()}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    output: list[str] = []
    runner.run(EXAMPLES[name], out=output.append)
    assert runner.failures == 0, "".join(output)


def test_examples_are_found():
    """Else there would be nothing to fail."""
    assert {"fewstep._tabulate.tabulate", "fewstep.sampler.Sampler", "fewstep._affine.AffinePath.convert"} <= set(EXAMPLES)
