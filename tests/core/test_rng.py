"""Keyed randomness: draws that depend on their key only."""

import torch

from dml_accel.core.rng import generator, key, stratified


def test_different_keys_give_different_draws() -> None:
    draws = [torch.rand(1, generator=generator(*k)).item() for k in (("a", 1), ("a", 2), ("a1",))]
    assert len(set(draws)) == 3


def test_a_key_gives_the_same_draws_in_every_process_and_version_of_python() -> None:
    assert key("initial weights", 0, "resnet8-0") == 6130063191790825023
    assert 0 <= key() < 2**63


def test_draws_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = torch.rand(3, generator=generator("a"))
    stratified(torch.arange(10) % 2, 4, "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3, generator=generator("a")), first)


def test_stratified_choice_keeps_every_classs_share() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    for count in (1, 10, 37, 50, 100):
        chosen = stratified(labels, count, "test")
        assert len(chosen) == count == len(chosen.unique())
        shares = torch.bincount(labels[chosen], minlength=3) / count
        expected = torch.tensor([0.5, 0.3, 0.2])
        assert ((shares - expected) * count).abs().max() <= 1
    assert not torch.equal(stratified(labels, 20, "a"), stratified(labels, 20, "b"))
