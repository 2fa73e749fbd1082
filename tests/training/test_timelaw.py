import math

import pytest
import torch
from scipy import stats

from fewstep import EDM, VE, VP, CondOT, Cosine, DiscreteVP, FewstepError
from fewstep.keyed import Keyed
from fewstep.training.timelaw import LAWS, LogitNormal, LogSNR, NormalLogSNR, Uniform, draw_times

PATHS = [CondOT(), Cosine(), VP(), VE(), EDM(), DiscreteVP(torch.linspace(0.99, 0.01, 50))]


def uniform_numbers(n=4000):
    return torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def agrees(sample, law):
    return stats.kstest(sample.numpy(), law).pvalue > 1e-3


def test_uniform_and_logit_normal_times_have_their_law():
    assert agrees(Uniform()(uniform_numbers(), CondOT()), "uniform")
    t = LogitNormal(mean=-0.4, std=0.7)(uniform_numbers(), CondOT())
    assert agrees(torch.logit(t), stats.norm(-0.4, 0.7).cdf)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_log_snr_times_are_uniform_between_the_ends(path):
    ends = [float(path.log_snr(t)) for t in (0.0, 1.0)]
    low = ends[0] if math.isfinite(ends[0]) else float(path.log_snr(path.margin))
    high = ends[1] if math.isfinite(ends[1]) else float(path.log_snr(1.0 - path.margin))
    assert agrees(path.log_snr(LogSNR()(uniform_numbers(), path)), stats.uniform(low, high - low).cdf)


def test_edm_draws_its_log_normal_sigma():
    sigma = EDM().coefficients(NormalLogSNR()(uniform_numbers(), EDM())).sigma
    assert agrees(sigma.log(), stats.norm(-1.2, 1.2).cdf)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_extreme_numbers_give_times_on_the_path_in_order(law, path):
    u = torch.tensor([0.0, 1e-300, 0.3, 0.9, 1.0 - 2.0**-53], dtype=torch.float64)
    t = law()(u, path)
    assert t.dtype == torch.float64
    assert bool(((t >= 0) & (t <= 1)).all())
    assert bool((t.diff() >= 0).all())


def draw(keyed, total=96, law=None, span=(0.0, 1.0), stratified=True):
    return draw_times(law or Uniform(), keyed, total, CondOT(), span, stratified)


def test_stratified_times_take_each_share_once_and_shuffle_at_every_step():
    strata = [(draw(Keyed(3, step, 0, 96)) * 96).long() for step in range(40)]
    for one in strata:
        assert one.sort().values.tolist() == list(range(96))
    first = torch.stack(strata)[:, 0]
    assert len(first.unique()) > 20  # sample 0 goes around


def test_stratified_times_keep_the_law():
    t = torch.cat([draw(Keyed(0, step, 0, 96), law=LogitNormal()) for step in range(40)])
    assert agrees(torch.logit(t), stats.norm(0, 1).cdf)


@pytest.mark.parametrize("stratified", [True, False])
def test_times_do_not_depend_on_how_the_batch_is_divided(stratified):
    whole = draw(Keyed(1, 5, 0, 96), stratified=stratified)
    parts = [draw(Keyed(1, 5, start, start + 32), stratified=stratified) for start in (0, 32, 64)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(draw(Keyed(2, 5, 0, 96), stratified=stratified), whole)


def test_times_stay_inside_the_span():
    t = draw(Keyed(0, 0, 0, 96), span=(0.25, 0.5))
    assert t.min() == 0.25
    assert t.max() == 0.5


def test_bad_input_is_refused():
    with pytest.raises(FewstepError, match=r"samples up to 97 were asked of a batch of 96; give the size of the whole batch"):
        draw(Keyed(0, 0, 0, 97))
    for law in (LogitNormal, NormalLogSNR):
        with pytest.raises(FewstepError, match=f"std of {law.__name__} must be positive, got 0"):
            law(std=0.0)
