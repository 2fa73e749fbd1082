"""Settings that no tuner can work with are refused when it is made, before any network call."""

import pytest

from fewstep import Bespoke, Boss, LearnedKnots, LeastSquares, NonStationary, methods


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bespoke("rk4"), 'base is one of euler, midpoint, got "rk4"'),
        (lambda: Bespoke(training="bounds"), 'training is one of end_to_end, bound, both, got "bounds"'),
        (lambda: Bespoke(lipschitz=-5.0), "lipschitz must be positive, got -5.0"),
        (lambda: Bespoke(rate=float("nan")), "rate must be positive, got nan"),
        (lambda: Bespoke(holdout=1.0), "holdout is a share of the noise between 0 and 1, such as 0.25, got 1.0"),
        (lambda: NonStationary(holdout=-1), "holdout is a share of the noise between 0 and 1, such as 0.25, got -1"),
        (lambda: NonStationary(tol=0.0), "tol must be positive, got 0.0"),
        (lambda: LearnedKnots(methods.euler, holdout=1.5), "holdout is a share of the noise"),
        (lambda: LeastSquares(ridges=(-1.0,)), "ridges must be numbers from 0 up"),
        (lambda: LeastSquares(ridges=()), "ridges must be numbers from 0 up"),
        (lambda: Boss(states="pupil"), 'states is one of teacher, student, got "pupil"'),
        (lambda: Boss(cost="cubed"), 'cost is one of squared, norm, deviation, got "cubed"'),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_setting_out_of_its_range_is_named(make, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        make()


@pytest.mark.usefixtures("unchecked")
def test_a_method_by_name_is_no_method():
    with pytest.raises(TypeError, match=r"method is a method such as methods\.euler or methods\.ddim\(path\), got 'euler'"):
        LearnedKnots("euler")
