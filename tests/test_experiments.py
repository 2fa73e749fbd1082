"""The experiments: their systems against an independent solver, their measures, and one cell of each from end to end."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from fewstep import VE, CondOT, adapt

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def experiment(monkeypatch):
    """Imports a file of the folder, which is no package."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def lorenz(_, z):
    x, y, w = z
    return [10 * (y - x), x * (28 - 20 * w) - y, 20 * x * y - 8 / 3 * w]


def fitzhugh(_, z):
    x1, x2, y1, y2 = z / 5
    a, k = -0.025794, 0.128
    return [
        5 * (x1 * (a - x1) * (x1 - 1) - y1 + k * (x2 - x1)), 5 * (x2 * (a - x2) * (x2 - 1) - y2 + k * (x1 - x2)),
        5 * (0.0065 * x1 - 0.02 * y1), 5 * (0.0135 * x2 - 0.02 * y2),
    ]  # fmt: skip


def pendulum(_, z):
    """Lagrange's equations for angles and velocities; the experiment solves Hamilton's."""
    q1, q2, v1, v2 = z
    c, s = np.cos(q1 - q2), np.sin(q1 - q2)
    force = [-(v2**2) * s - 2 * np.sin(q1), v1**2 * s - np.sin(q2)]
    return [v1, v2, *np.linalg.solve([[2, c], [c, 1]], force)]


@pytest.mark.parametrize("rate", [lorenz, fitzhugh, pendulum], ids=lambda rate: rate.__name__)
def test_systems_agree_with_scipy(experiment, rate):
    systems = experiment("systems")
    system = systems.SYSTEMS[rate.__name__]
    first = np.random.default_rng(0).normal(size=(3, system.dim))
    ours = systems.continued(system, first, 4)
    for mine, z in zip(ours, first, strict=True):
        times = system.dt * np.arange(5)
        theirs = solve_ivp(rate, (0, times[-1]), z, t_eval=times, rtol=1e-9, atol=1e-9).y.T
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3)


def test_trajectories_begin_after_the_transient_and_go_on_as_the_system_does(experiment):
    systems = experiment("systems")
    for system in systems.SYSTEMS.values():
        system = replace(system, drop=min(system.drop, 2))
        x = systems.trajectories(system, 2, seed=1)
        assert x.shape == (2, systems.STEPS, system.dim)
        np.testing.assert_allclose(systems.continued(system, x[:, 2], 3), x[:, 2:6], rtol=1e-9, atol=1e-9)


def test_lorenz_event_is_as_frequent_as_in_the_paper(experiment):
    systems = experiment("systems")
    x = torch.from_numpy(systems.trajectories(systems.SYSTEMS["lorenz"], 3000, seed=0))
    assert float((systems.SYSTEMS["lorenz"].event(x) > 0).double().mean()) == pytest.approx(0.194, abs=0.03)


def test_fitzhugh_event_asks_both_neurons(experiment):
    event = experiment("systems").SYSTEMS["fitzhugh"].event
    x = torch.zeros(2, 60, 4)
    x[0, 30, :2], x[1, 30, 0] = 3.0, 4.0
    assert event(x).tolist() == [0.5, -0.5]


def test_total_variation_counts_what_lies_outside(experiment):
    cells = experiment("cells")
    x, edges = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)), [np.linspace(-3, 3, 9)] * 2
    assert cells.total_variation(x, x, edges) == 0
    assert cells.total_variation(x.clamp(-2, -1), x.clamp(1, 2), edges) == 1
    assert cells.total_variation(x.clamp(-2, 2), x.clamp(-2, 2) + 100, edges) == 1
    assert cells.total_variation(x - 100, x + 100, edges) == 1


def test_noise_floor_falls_as_the_square_root_of_the_samples(experiment):
    cells, rng = experiment("cells"), torch.Generator().manual_seed(0)
    truth, edges = torch.rand(200_000, 1, generator=rng), [np.linspace(0, 1, 33)]
    floors = [cells.total_variation(torch.rand(n, 1, generator=rng), truth, edges) for n in (1000, 16_000)]
    assert floors[0] == pytest.approx((32 / (2 * np.pi * 1000)) ** 0.5, rel=0.35)
    assert floors[0] / floors[1] == pytest.approx(4, rel=0.5)


def test_relative_error_is_zero_for_the_truth_and_not_for_noise(experiment):
    systems, measures = experiment("systems"), experiment("trajectory_measures")
    system = systems.SYSTEMS["pendulum"]
    x = torch.from_numpy(systems.trajectories(system, 4, seed=0))
    assert measures.relative_error(system, x) < 1e-5
    assert measures.relative_error(system, torch.randn_like(x)) > 0.3


def test_densities_cell_from_end_to_end(experiment, tmp_path, monkeypatch, capsys):
    densities = experiment("densities")
    monkeypatch.setattr(densities, "METHODS", {"FDM, VP": densities.METHODS["FDM, VP"]})
    config = densities.Config(
        ("8gaussians",), seeds=1, steps=3, batch=16, width=8, blocks=1, held_out=8, tol=1e-2, samples=64, reference=500, calls=8
    )
    out = tmp_path / "densities.json"
    densities.main(config, out=out, runs=tmp_path / "runs")
    (row,) = json.loads(out.read_text())["cells"].values()
    assert 0 < row["tv_floor"] < row["tv"] <= 1
    assert row["nats"] < row["ceiling"]
    assert "| 8gaussians | FDM, VP | 1 |" in out.with_suffix(".md").read_text()
    capsys.readouterr()
    densities.main(config, out=out, runs=tmp_path / "runs")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match=r"results of other settings.*steps"):
        densities.main(replace(config, steps=4), out=out, runs=tmp_path / "runs")


def test_dynamics_cell_from_end_to_end(experiment, tmp_path, monkeypatch):
    dynamics = experiment("dynamics")
    monkeypatch.setattr(dynamics, "PATHS", {"VE": dynamics.PATHS["VE"]})
    monkeypatch.setattr(dynamics, "OBJECTIVES", {"FDM": dynamics.OBJECTIVES["FDM"]})
    config = dynamics.Config(
        ("lorenz",), seeds=1, steps=2, batch=8, width=8, blocks=1, rates=(1e-3,), trial_steps=2, train=64, reference=200,
        fresh=100, samples=32, guided=8, calls=8, likelihoods=2, tol=1e-2, bins=8,
    )  # fmt: skip
    out = tmp_path / "dynamics.json"
    dynamics.main(config, out=out, runs=tmp_path / "runs")
    row = json.loads(out.read_text())["cells"]["lorenz/VE/FDM/0"]
    assert row["lr"] == 1e-3
    assert np.isfinite(row["nats_per_dim"])
    assert all(0 <= row[key] <= 1 for key in ("tv", "tv_floor", "outside", "relative_error", "event", "guided_event"))
    assert "| lorenz | VE | FDM | 0.001 | 1 |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("path", [CondOT(), VE(sigma_min=0.01, sigma_max=20.0)], ids=["OT", "VE"])
def test_guidance_leads_to_the_event(experiment, path):
    """Of a flow that is known: of the standard normal law."""
    systems, measures, cells = experiment("systems"), experiment("trajectory_measures"), experiment("cells")
    system = replace(systems.SYSTEMS["lorenz"], event=lambda x: x[:, 0, 0] - 1)

    def expected_data(x, t):
        alpha, sigma, _, _ = (c.to(x)[:, None, None] for c in path.coefficients(t))
        return alpha * x / (alpha**2 + sigma**2)

    model = adapt(expected_data, path, "data", (60, 3))
    truth = measures.Truth(system, torch.zeros(1), torch.zeros(1), torch.zeros(3), torch.ones(3))
    noise = torch.randn(200, 60, 3, generator=torch.Generator().manual_seed(0))
    free, guided = (cells.solved(field, noise, 40) for field in (model.given(), measures.given_event(model, truth)))
    assert float((system.event(free) > 0).double().mean()) == pytest.approx(0.159, abs=0.07)
    assert float((system.event(guided) > 0).double().mean()) > 0.8
    assert float(guided.std()) == pytest.approx(1.0, abs=0.05)  # only one number is concerned
