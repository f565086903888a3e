"""Objectives that are no bounds: what they weigh, what they leave alone, and the bound that is reported beside them."""

import pyro
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.bounds import warm_up
from tests.linear_gaussian import linear_gaussian
from tests.programs import build


@pytest.fixture
def case():
    return linear_gaussian(2)


def seeded(evaluate, *args, seed=3):
    pyro.set_rng_seed(seed)
    return evaluate(*args)


@pytest.mark.parametrize("bound", [ph.LayerwiseELBO(3), ph.TraceELBO(3), ph.IWELBO(3), ph.VRBound(0.5, 3)], ids=repr)
def test_weight_one_changes_nothing(case, bound):
    plain = seeded(bound.loss, case.model, case.other, case.x)
    weighted = seeded(ph.Regularised(bound).loss, case.model, case.other, case.x)
    torch.testing.assert_close(plain, weighted)


def test_weight_of_the_layers(case):
    terms = seeded(ph.LayerwiseELBO(3).terms, case.model, case.other, case.x)
    expected = terms.pop("reconstruction") - 0.25 * sum(terms.values())
    objective = ph.Regularised(ph.LayerwiseELBO(3), kl_weight=0.25)
    torch.testing.assert_close(seeded(objective.loss, case.model, case.other, case.x), -expected.sum())


def test_weight_in_every_log_weight(case):
    """log p(x|z) + lambda (log p(z) - log q(z|x)) in place of log w, before the logarithm of the mean."""
    objective = ph.Regularised(ph.IWELBO(4), kl_weight=0.5)
    value = seeded(objective.loss, case.model, case.other, case.x)
    pyro.set_rng_seed(3)
    with torch.no_grad():
        reading = ph.Problem(case.model, case.other)(case.x).run(4)
    prior = reading.log_p["z1"] + reading.log_p["z2"] - reading.log_q["z1"] - reading.log_q["z2"]
    expected = (reading.log_p["x"] + 0.5 * prior).logsumexp(0) - torch.tensor(4.0).log()
    torch.testing.assert_close(value, -expected.sum())


def test_the_unweighted_bound_is_reported(case):
    bound = ph.LayerwiseELBO(3)
    objective = ph.Regularised(bound, kl_weight=0.1)
    assert not objective.is_bound
    assert not isinstance(objective, ph.bounds.Bound)
    for ours, plain in ((objective.per_datum, bound.per_datum), (objective.terms, bound.terms)):
        first, second = (seeded(f, case.model, case.other, case.x) for f in (ours, plain))
        torch.testing.assert_close(first, second)


def test_warm_up_counts_steps_with_a_gradient(case):
    objective = ph.Regularised(ph.LayerwiseELBO(), kl_weight=warm_up(4))
    terms = seeded(ph.LayerwiseELBO().terms, case.model, case.other, case.x)
    reconstruction = terms.pop("reconstruction").sum()
    divergence = sum(term.sum() for term in terms.values())
    for step in range(6):
        assert objective.step == step
        seeded(objective.loss, case.model, case.other, case.x)
        objective.per_datum(case.model, case.other, case.x)
        assert objective.step == step
        value = seeded(objective.loss_and_grads, case.model, case.other, case.x)
        torch.testing.assert_close(value, min(step / 4, 1.0) * divergence - reconstruction)
    objective.step.fill_(2)
    assert objective.weights_at(objective.step) == (0.5, 0.0)
    assert objective.state_dict()["step"] == 2


def test_warm_up():
    assert [warm_up(4, 0.2)(step) for step in (0, 2, 4, 9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    with pytest.raises(ValueError, match="0"):
        warm_up(0)
    with pytest.raises(ValueError, match=r"1\.5"):
        warm_up(3, 1.5)


@pytest.fixture
def top_down():
    return linear_gaussian(2)


def test_free_bits_are_a_floor_on_the_mean_over_the_minibatch(top_down):
    case = top_down
    terms = seeded(ph.LayerwiseELBO(2).terms, case.model, case.other_top_down, case.x)
    floor = 0.5 * (terms["kl_z1"].mean() + terms["kl_z2"].mean()).item()
    assert min(terms["kl_z1"].mean(), terms["kl_z2"].mean()) < floor
    objective = ph.Regularised(ph.LayerwiseELBO(2), free_bits=floor)
    value = seeded(objective.loss, case.model, case.other_top_down, case.x)
    size = len(case.x)
    kept = sum(max(terms[name].mean().item(), floor) for name in ("kl_z1", "kl_z2"))
    torch.testing.assert_close(value, size * kept - terms["reconstruction"].sum())


def test_free_bits_stop_the_gradient_below_the_floor(top_down):
    case = top_down
    found = {}
    for floor in (0.0, 1e3):
        loss = seeded(ph.Regularised(ph.LayerwiseELBO(2), free_bits=floor).differentiable_loss, *programs(case))
        found[floor] = torch.autograd.grad(loss, list(case.model.z1.parameters()), allow_unused=True)
    assert all(g.abs().max() > 0 for g in found[0.0])
    assert all(g is None or (g == 0).all() for g in found[1e3])


def programs(case):
    return case.model, case.other_top_down, case.x


def test_free_bits_scale_with_the_minibatch(top_down):
    case = top_down
    objective = ph.Regularised(ph.LayerwiseELBO(2), free_bits=1e3)
    few = seeded(lambda: objective.loss(case.model, case.other_top_down, case.x))
    pyro.set_rng_seed(3)
    many = objective.loss(lambda x: case.model(x, data_size=50), lambda x: case.other_top_down(x, data_size=50), case.x)
    torch.testing.assert_close(many, 10 * few)


def test_free_bits_need_a_divergence(case):
    objective = ph.Regularised(ph.LayerwiseELBO(), free_bits=0.5)
    with pytest.raises(ValueError, match="rate_z1"):
        objective.differentiable_loss(case.model, case.other, case.x)
    with pytest.raises((ValueError, TypeError), match=r"free|Layerwise"):
        ph.Regularised(ph.IWELBO(4), free_bits=0.5).differentiable_loss(case.model, case.other, case.x)


@pytest.mark.parametrize("program", [ph.CUBO(2, 4), ph.EUBO(4), ph.WakePhase(4), "ELBO"], ids=repr)
def test_only_bounds_from_below_are_regularised(program):
    with pytest.raises(TypeError, match=r"CUBO|EUBO|WakePhase|'ELBO'"):
        ph.Regularised(program)


def test_negative_weights(case):
    for arguments in ({"kl_weight": -0.1}, {"free_bits": -1.0}):
        with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
            ph.Regularised(ph.LayerwiseELBO(), **arguments)
    with pytest.raises(ValueError, match=r"-9\.0 at step 10"):
        ph.Regularised(ph.LayerwiseELBO(), kl_weight=lambda step: 1.0 - step)


def test_minibatches_and_discrete_draws():
    for name in ("minibatch", "discrete_chain"):
        pair = build(name)
        objective = ph.Regularised(ph.TraceELBO(2, "score"), kl_weight=0.3)
        loss = objective.loss_and_grads(pair.model, pair.guide, *pair.args)
        assert loss.isfinite()


def test_a_weight_that_is_not_a_number():
    with pytest.raises(ValueError, match="at least 0, got nan at step 0"):
        ph.Regularised(ph.LayerwiseELBO(), kl_weight=lambda step: torch.nan * step)


def test_restart_begins_the_warm_up_again():
    objective = ph.Regularised(ph.LayerwiseELBO(), kl_weight=warm_up(4))
    objective.step.fill_(3)
    objective.restart()
    assert objective.step == 0
    assert objective.weights_at(objective.step) == (0.0, 0.0)


def test_weight_one_keeps_the_gradient_of_discrete_draws():
    pair = build("discrete_chain")
    bound = ph.TraceELBO(3, "score")
    gradients = []
    for objective in (bound(pair.model, pair.guide), ph.Regularised(bound, kl_weight=1.0)(pair.model, pair.guide)):
        loss = seeded(objective, *pair.args)
        gradients.append(torch.autograd.grad(loss, list(pair.guide.parameters())))
    for first, second in zip(*gradients, strict=True):
        assert first.abs().max() > 0
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_gradients_that_are_not_derived_for_weighted_log_weights(case, gradient):
    objective = ph.Regularised(ph.IWELBO(3, gradient), kl_weight=0.5)
    with pytest.raises(ValueError, match=f"gradient '{gradient}' is not derived"):
        objective.loss_and_grads(case.model, case.other, case.x)
