import torch

from fewstep.journal import Journal, identity


def test_a_torn_line_costs_itself_only(tmp_path):
    journal = Journal(tmp_path, "of this run")
    for key in "ab":
        journal.get(key, lambda key=key: key * 2)
    (file,) = tmp_path.glob("*/journal.jsonl")
    file.write_bytes(file.read_bytes()[:-7])  # killed while "b" was written
    again = Journal(tmp_path, "of this run")
    made = [again.get(key, lambda key=key: key * 3) for key in "abc"]
    assert made == ["aa", "bbb", "ccc"]
    third = Journal(tmp_path, "of this run")
    assert [third.get(key, lambda: "lost") for key in "abc"] == made


def test_noise_of_any_precision_has_an_identity():
    noise = torch.randn(2, 3)
    found = {identity(lambda x, t: x, noise.to(dtype), "words") for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    assert len(found) == 3
