"""The stock schedulers that claims are made against: complete, finite, and mended where they are broken."""

import math

import diffusers.schedulers as schedulers
import pytest
import torch

from fewstep import EDM, VE, VP, CondOT, Cosine, DiscreteVP, TimeGrid, from_diffusers, methods, reference, tabulate
from fewstep.stock import Stock, stock_samplers
from fewstep.zoo.mixtures import mixture

LEVELS = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
PATHS = {"flow": CondOT(), "vp": DiscreteVP(LEVELS), "edm": EDM()}


def ring(x, t):
    """Velocity of the CondOT flow from noise to eight Gaussians of deviation 0.1 on a circle of radius 1.4."""
    t = float(t)
    angle = torch.arange(8, dtype=x.dtype) * (2 * math.pi / 8)
    centre = 1.4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    variance = (0.1 * t) ** 2 + (1 - t) ** 2
    away = x[:, None] - t * centre
    weight = (-away.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
    data = (weight * (centre + 0.01 * t / variance * away)).sum(1)
    noise = (weight * (1 - t) / variance * away).sum(1)
    return data - noise


def solved(x, steps=300):
    h = 1 / steps
    for i in range(steps):
        t = i * h
        k1 = ring(x, t)
        k2 = ring(x + h / 2 * k1, t + h / 2)
        k3 = ring(x + h / 2 * k2, t + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + ring(x + h * k3, t + h))
    return x


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("nfe", [1, 4, 13])
def test_all_fit_their_path_and_budget(kind, nfe):
    path = PATHS[kind]
    found = stock_samplers(path, nfe)
    assert len(found) >= {"flow": 20, "vp": 24, "edm": 5}[kind]
    for name, stock in found.items():
        assert isinstance(stock, Stock)
        assert stock.sampler.nfe == nfe
        assert stock.sampler.provenance.method == name
        assert stock.sampler.provenance.path == repr(path)
        assert stock.sampler.predicts == {"flow": "velocity", "vp": "noise", "edm": "data"}[kind]
        assert stock.group == ("corrected" if "even" in name or "finished" in name else "stock")


def test_the_list_covers_the_deterministic_schedulers_of_diffusers():
    flow, vp, edm = ({name.split("-")[0] for name in stock_samplers(path, 13)} for path in PATHS.values())
    dpm = {f"DPMSolver{kind}{order}" for kind in ("Multistep", "Singlestep") for order in (2, 3)}
    multistep = dpm | {"UniPC2", "UniPC3", "DEIS2", "DEIS3", "SASolver"}
    assert flow == multistep | {"FlowMatchEuler", "FlowMatchHeun"}
    assert vp == multistep | {"DDIM", "Euler", "Heun", "KDPM2", "LMS", "PNDM", "PLMS"}
    assert edm == {"EDMEuler", "EDMDPMSolverMultistep2", "EDMDPMSolverMultistep3"}


def test_a_scheduler_that_cannot_spend_the_budget_is_left_out():
    assert "FlowMatchHeun" in stock_samplers(CondOT(), 5)
    assert "FlowMatchHeun" not in stock_samplers(CondOT(), 4)


def test_a_continuous_vp_path_has_the_schedulers_of_its_thousand_levels():
    """DDIM's own formula on the path's alpha and sigma, and convergence to the path's solution."""
    found = stock_samplers(VP(), 5)
    assert len(found) >= 24
    table = found["DDIM-trailing"].sampler
    torch.testing.assert_close(table.times, torch.arange(5, dtype=torch.float64) / 5)
    assert table.provenance.path == repr(VP())
    field, noise = mixture(torch.tensor([[1.0, 0.5], [-1.0, 0.0]]), torch.tensor(0.04), VP()).given(), torch.randn(256, 2)
    own = tabulate(methods.ddim(VP()), TimeGrid.uniform(5))
    torch.testing.assert_close(table(field, noise), own(field, noise), rtol=0, atol=2e-3)  # betas and levels are float32 there
    end = reference(field, noise).end
    for name in ("DPMSolverMultistep2-karras", "UniPC2-karras", "LMS"):
        rough, fine = (
            float((stock_samplers(VP(), n)[name].sampler(field, noise) - end).square().mean().sqrt()) for n in (7, 35)
        )
        assert fine < 0.1 * rough < 0.03


@pytest.mark.parametrize("path", [Cosine(), VE()])
def test_no_stock_scheduler_is_for_another_path(path):
    assert stock_samplers(path, 4) == {}


def test_as_shipped_is_as_shipped():
    found = stock_samplers(CondOT(), 4)
    euler = from_diffusers(schedulers.FlowMatchEulerDiscreteScheduler(), 4)
    assert torch.equal(found["FlowMatchEuler"].sampler.b, euler.b)
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    assert torch.equal(found["DEIS2"].sampler.b, from_diffusers(schedulers.DEISMultistepScheduler(**settings), 4).b)


def test_corrected_schedules_end_in_data_and_waste_no_call():
    for nfe in (4, 5):
        for name, stock in stock_samplers(CondOT(), nfe).items():
            reached = float(stock.sampler.b[-1].sum())
            if stock.group == "corrected":
                assert reached == pytest.approx(1.0, abs=1.2e-3), name  # DEIS and SASolver start at 0.999 and end at 0.0001
                gaps = stock.sampler.times.unique().diff()
                assert len(gaps) == 0 or float(gaps.max()) < (0.61 if "shift3" in name else 0.51), name
    found = stock_samplers(CondOT(), 4)
    torch.testing.assert_close(found["FlowMatchEuler-even"].sampler.times, torch.arange(4).double() / 4, rtol=0, atol=1e-7)
    once = 3 * (1 - torch.arange(4).double() / 4)
    expected = 1 - once / (1 + 2 / 3 * once)
    torch.testing.assert_close(found["FlowMatchEuler-even-shift3"].sampler.times, expected, rtol=0, atol=1e-6)
    heun = stock_samplers(CondOT(), 5)["FlowMatchHeun-even"].sampler.times
    torch.testing.assert_close(heun, torch.tensor([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3]).double(), rtol=0, atol=1e-6)


def test_corrections_help():
    """The defects that reference C2 measured, on its two-dimensional problem."""
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = solved(noise)

    def error(name, nfe):
        return float((stock_samplers(CondOT(), nfe)[name].sampler(ring, noise) - exact).square().mean().sqrt())

    assert error("FlowMatchEuler-even", 4) < 0.7 * error("FlowMatchEuler", 4)
    assert error("FlowMatchEuler-even-shift3", 4) < 0.8 * error("FlowMatchEuler-shift3", 4)
    assert error("FlowMatchHeun-even", 5) < 0.7 * error("FlowMatchHeun", 5)
    assert error("DEIS2-finished", 4) < 0.4 * error("DEIS2", 4)
    assert error("SASolver-ode-finished", 4) < 0.5 * error("SASolver-ode", 4)


def test_asked_again_it_answers_from_memory():
    first, second = stock_samplers(CondOT(), 4), stock_samplers(CondOT(), 4)
    assert first["UniPC2"] is second["UniPC2"]
    first.clear()
    assert stock_samplers(CondOT(), 4)


def test_other_levels_give_other_tables():
    other = DiscreteVP((1 - torch.linspace(1e-4, 0.02, 100)).cumprod(0))
    table = stock_samplers(other, 4)["DDIM-trailing"].sampler
    assert table.clock.tolist() == [99, 74, 49, 24]
    torch.testing.assert_close(table.times, other.time(table.clock))
    alpha = other.coefficients(table.times[0]).alpha
    torch.testing.assert_close(table.a[-1], 1 / alpha, rtol=1e-5, atol=0)
