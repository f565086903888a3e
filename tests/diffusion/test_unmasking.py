"""Samplers of discrete chains with exact conditionals draw the data's distribution, whole or given a part."""

import pytest
import torch

from pyro_hvae.diffusion import ancestral, inpaint, unmask
from pyro_hvae.models import discrete_diffusion
from tests.diffusion.categories import BITS, Linear, Masked, Replaced, model_evidence, states

SIZE = 20_000
X = states(2, 3)


def frequencies(draws):
    return torch.bincount((draws.long() * torch.tensor([4, 2, 1])).sum(-1), minlength=8) / len(draws)


def agrees(draws, probs):
    """Frequencies within 4 standard errors of the probabilities."""
    error = (probs * (1 - probs) / len(draws)).sqrt()
    return bool(((frequencies(draws) - probs).abs() <= 4 * error).all())


def bits(denoiser, num_layers, kind="absorbing"):
    return discrete_diffusion(denoiser, event_shape=3, num_categories=2, num_layers=num_layers, corruption=kind)


def given(first, last):
    keep = (X[:, 0] == first) & (X[:, 2] == last)
    probs = torch.where(keep, BITS, 0.0)
    x = torch.tensor([float(first), 7.0, float(last)]).expand(SIZE, 3)
    return x, torch.tensor([True, False, True]).expand(SIZE, 3), probs / probs.sum()


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "any_order"])
def test_the_program_draws_the_chain_s_distribution(kind):
    model, _ = bits(Linear(), 3, kind)
    assert agrees(model(size=SIZE), model_evidence(model, X).exp())


def test_one_entry_a_step_is_exact():
    for layers, kind in ((None, "absorbing"), (3, "any_order"), (7, "absorbing")):
        assert agrees(unmask(bits(Masked(), layers, kind)[0], SIZE), BITS)
    assert agrees(bits(Masked(), 3, "any_order")[0](size=SIZE), BITS)
    assert not agrees(unmask(bits(Masked(), None)[0], SIZE, num_steps=1), BITS)  # all at once, independently


@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_ancestral_steps_tend_to_the_data(kind):
    model, _ = bits(Masked() if kind == "absorbing" else Replaced(), None, kind)
    assert agrees(ancestral(model, SIZE, num_steps=60), BITS)
    assert not agrees(ancestral(model, SIZE, num_steps=1), BITS)


def test_any_subset_may_be_given():
    x, mask, probs = given(1, 0)
    model, _ = bits(Masked(), None)
    for draws in (unmask(model, x=x, mask=mask), ancestral(model, x=x, mask=mask, num_steps=20)):
        assert draws.dtype == x.dtype
        assert torch.equal(draws[mask], x[mask])
        assert agrees(draws, probs)
    two = torch.tensor([False, True, False]).expand(SIZE, 3)
    probs = torch.where(X[:, 1] == 1, BITS, 0.0)
    assert agrees(unmask(model, x=torch.ones(SIZE, 3), mask=two), probs / probs.sum())
    everything = unmask(model, x=X, mask=torch.ones(8, 3, dtype=torch.bool))
    assert torch.equal(everything, X)


@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_particles_infill_under_either_noise(kind):
    x, mask, probs = given(1, 0)
    model, guide = bits(Masked() if kind == "absorbing" else Replaced(), 40, kind)
    draws = inpaint(model, guide, x[:1500], mask[:1500], num_particles=20)
    assert torch.equal(draws[:, [0, 2]], x[:1500, [0, 2]])
    assert agrees(draws, probs)


def test_confident_draws_come_first():
    """Entry 1 is certain and the others are even, so that it is revealed in the first step."""
    probs = torch.where(X[:, 1] == 1, 0.25, 0.0)
    model, _ = bits(Masked(probs), None)
    seen = []
    model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    draws = unmask(model, 50, order="confident")
    assert len(seen) == 3
    assert (seen[0] == 2).all()
    assert torch.equal(seen[1], torch.tensor([2, 1, 2]).expand(50, 3))
    assert ((seen[2] == 2).sum(-1) == 1).all()
    assert (draws[:, 1] == 1).all()


@pytest.mark.parametrize(("num_steps", "masked"), [(2, [3, 1]), (1, [3]), (9, [3, 2, 1])])
def test_each_step_reveals_equally_many(num_steps, masked):
    model, _ = bits(Masked(), None)
    seen, levels = [], []

    def look(module, args):
        seen.append((args[0] == 2).sum(-1))
        levels.append(args[1])

    model.denoiser.register_forward_pre_hook(look)
    draws = unmask(model, 20, num_steps=num_steps)
    assert [count.unique().tolist() for count in seen] == [[count] for count in masked]
    share = torch.tensor(masked) / 3
    torch.testing.assert_close(
        torch.stack([level[0] for level in levels]), torch.logit(share).clamp(-15, 15), atol=1e-12, rtol=1e-12
    )
    assert (draws < 2).all()


def test_what_samplers_refuse():
    model, _ = bits(Masked(), 4)
    uniform, _ = bits(Replaced(), 4, "uniform")
    order, order_guide = bits(Masked(), 3, "any_order")
    x, mask = X, X > 0
    for sample in (ancestral, unmask):
        with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
            sample(model, 3, num_steps=0)
        with pytest.raises(ValueError, match="mask must be boolean of the shape of x"):
            sample(model, x=x, mask=mask[:, :2])
        with pytest.raises(ValueError, match="mask must be boolean"):
            sample(model, x=x)
        with pytest.raises(ValueError, match="give size, or x and mask"):
            sample(model)
        with pytest.raises(ValueError, match=r"integers in 0, ..., 1; x is 4 at index \(1, 2\)"):
            sample(model, x=4 * x, mask=mask)
        with pytest.raises(ValueError, match="use"):
            sample(uniform, x=x, mask=mask)
    with pytest.raises(ValueError, match="order must be one of 'random', 'confident'; got 'left'"):
        unmask(model, 3, order="left")
    with pytest.raises(ValueError, match=r"use unmask\(num_steps"):
        ancestral(order, 3)
    with pytest.raises(ValueError, match="not independent given the layer above"):
        inpaint(order, order_guide, x, mask)
    impossible, noise = bits(Masked(torch.where(X[:, 0] == 0, 0.25, 0.0)), 4)
    with pytest.raises(ValueError, match="datum 4 have probability zero"):
        inpaint(impossible, noise, x, torch.tensor([True, False, False]).expand(8, 3), num_particles=5)
