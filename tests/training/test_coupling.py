import itertools

import pytest
import torch

from fewstep import FewstepError
from fewstep.training.coupling import COUPLINGS, Independent, MinibatchOT
from problems import randn


def cost(x0, x1):
    return float((x1.double() - x0.double()).square().sum())


def test_registered_couplings_are_permutations_of_the_right_kind():
    x0, x1, labels = randn(20, 3), randn(20, 3, seed=1), torch.arange(20) % 3
    assert set(COUPLINGS) == {"independent", "minibatch_ot"}
    for name, coupling in COUPLINGS.items():
        rows = coupling()(x0, x1, labels)
        assert coupling.name == name
        assert rows.dtype == torch.int64
        assert rows.sort().values.tolist() == list(range(20))
        if not coupling.whole:
            assert torch.equal(rows, torch.arange(20))


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_assignment_has_the_least_cost_of_all(offset):
    for seed in range(5):
        x0, x1 = randn(5, 2, 2, seed=seed), randn(5, 2, 2, seed=seed + 50) + offset
        least = min(cost(x0[list(order)], x1) for order in itertools.permutations(range(5)))
        assert cost(x0[MinibatchOT()(x0, x1, None)], x1) == pytest.approx(least, rel=1e-12)


def test_equal_points_are_still_used_once_each():
    rows = MinibatchOT()(torch.zeros(8, 2), torch.zeros(8, 2), None)
    assert sorted(rows.tolist()) == list(range(8))


def test_each_class_is_assigned_within_the_source_dealt_to_it():
    x0, x1, labels = randn(30, 2), randn(30, 2, seed=1), torch.arange(30) % 4
    rows = MinibatchOT()(x0, x1, labels)
    assert torch.equal(labels[rows], labels)
    for label in range(4):
        mine = labels == label
        assert torch.equal(x0[rows[mine]], x0[mine][MinibatchOT()(x0[mine], x1[mine], None)])
    assert torch.equal(MinibatchOT(across_classes=True)(x0, x1, labels), MinibatchOT()(x0, x1, None))


def test_classes_far_apart_still_start_from_the_whole_source():
    labels = torch.arange(400) % 2
    x1 = (2.0 * labels - 1)[:, None] * 5 + 0.1 * randn(400, 1, seed=1)
    x0 = randn(400, 1)
    apart = x0[MinibatchOT(across_classes=True)(x0, x1, labels)][labels == 1].mean()
    kept = x0[MinibatchOT()(x0, x1, labels)][labels == 1].mean()
    assert apart > 0.7  # half a normal: sampling from all of it would leave the training distribution
    assert abs(kept) < 4 / 200**0.5


def test_bad_input_is_refused(unchecked):
    with pytest.raises(FewstepError, match=r"equally many source and data samples and labels, got 3, 4; give the whole batch"):
        MinibatchOT()(torch.zeros(3, 2), torch.zeros(4, 2), None)
    with pytest.raises(FewstepError, match="got 4, 4 and 3"):
        MinibatchOT()(torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(FewstepError, match="needs finite source and data samples"):
        MinibatchOT()(torch.zeros(2, 1), torch.tensor([[1.0], [float("nan")]]), None)


def test_independent_pairs_lie_on_the_device_of_the_data():
    assert Independent()(torch.zeros(2, 1), torch.zeros(2, 1, device="meta"), None).device.type == "meta"
