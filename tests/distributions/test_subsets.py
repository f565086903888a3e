"""Random masks: probabilities against enumeration, draws against probabilities."""

import itertools

import pytest
import torch

from pyro_hvae.distributions import Categorical, MaskedSubset, OneRevealed

MASK = 3
EVERY = torch.tensor(list(itertools.product(range(MASK + 1), repeat=4)))
ARRAYS = [[0, 1, 2, 1], [3, 1, 3, 0], [2, 2, 2, 3]]


def agree(fn):
    """Probabilities add up to one, and draws have them."""
    probs = fn.log_prob(EVERY).exp()
    assert abs(probs.sum() - 1) < 1e-12
    draws = fn.sample((20_000,))
    index = (draws * torch.tensor([64, 16, 4, 1])).sum(-1)
    found = torch.bincount(index, minlength=256) / 20_000
    assert ((found - probs).abs() <= 4 * (probs * (1 - probs) / 20_000).sqrt()).all()
    assert fn.support.check(draws).all()
    return probs


@pytest.mark.parametrize("array", ARRAYS)
def test_further_masks(array):
    z = torch.tensor(array)
    free = int((z != MASK).sum())
    for count in range(free + 1):
        probs = agree(MaskedSubset(z, count, MASK, 1))
        hidden = (EVERY == MASK).sum(-1)
        assert (hidden[probs > 0] == 4 - free + count).all()
        kept = (z == EVERY) | (EVERY == MASK)
        assert kept.all(-1)[probs > 0].all()


@pytest.mark.parametrize("array", ARRAYS[1:])
def test_one_revealed(array):
    z = torch.tensor(array)
    logp = torch.randn(4, MASK).log_softmax(-1)
    probs = agree(OneRevealed(z, logp, 1))
    masked = z == MASK
    for place in masked.nonzero().flatten().tolist():
        for value in range(MASK):
            other = z.clone()
            other[place] = value
            row = (other == EVERY).all(-1)
            torch.testing.assert_close(probs[row], (logp[place, value].exp() / masked.sum()).reshape(1))


def test_batches_and_images():
    z = torch.tensor([[[0, 1], [2, 1]], [[3, 1], [3, 0]]])
    masked = MaskedSubset(z, torch.tensor([2, 1]), MASK, 2)
    assert masked.batch_shape == (2,)
    draws = masked.expand((5, 2)).sample()
    assert ((draws == MASK).sum((-2, -1)) == torch.tensor([2, 3])).all()
    torch.testing.assert_close(masked.log_prob(draws), -torch.tensor([6.0, 2.0]).log().expand(5, 2))
    revealed = OneRevealed(z, torch.zeros(2, 2, 2, 3).log_softmax(-1), 2).expand((5, 2))
    draws = revealed.sample()[:, 1]
    assert ((draws == MASK).sum((-2, -1)) == 1).all()
    assert revealed.log_prob(z).max() == -torch.inf
    with pytest.raises(ValueError, match="event_dim >= 1"):
        MaskedSubset(torch.tensor(1), 1, MASK, 0)


def test_divergence_of_categories_is_torch_s():
    p, q = torch.rand(5, 3).add(0.1), torch.rand(5, 3).add(0.1)
    q[0, 1] = q[1, 2] = p[1, 2] = p[2, 0] = 0.0
    ours, theirs = (
        torch.distributions.kl_divergence(kind(logits=q.log()), kind(logits=p.log()))
        for kind in (Categorical, torch.distributions.Categorical)
    )
    torch.testing.assert_close(ours, theirs)
    assert ours[2] == torch.inf
    logits = p.log().requires_grad_()
    torch.distributions.kl_divergence(Categorical(logits=q[:2].log()), Categorical(logits=logits[:2])).sum().backward()
    assert logits.grad.isfinite().all()
