"""The contract of every objective: Pyro's entry points, the module form, shapes, one run of the guide, no host sync."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_hvae as ph
from tests.linear_gaussian import linear_gaussian
from tests.programs import PAIRS, build

OBJECTIVES = [
    ph.TraceELBO(4),
    ph.TraceELBO(4, "stl"),
    ph.TraceELBO(4, "score"),
    ph.LayerwiseELBO(4),
    ph.IWELBO(4),
    ph.IWELBO(4, "stl"),
    ph.IWELBO(4, "dreg"),
    ph.IWELBO(4, "vimco", num_repeats=2),
    ph.VRBound(0.5, 4),
    ph.VRBound(0.5, 4, "score"),
    ph.ThermodynamicBound(4, 3),
    ph.CUBO(2, 4),
    ph.EUBO(4),
    ph.WakePhase(4),
    ph.ReweightedWakeSleep(4),
    ph.SleepPhase(4),
    ph.Regularised(ph.LayerwiseELBO(4), kl_weight=0.5),
    ph.Regularised(ph.IWELBO(4), kl_weight=0.5),
]
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)


@every_objective
@pytest.mark.parametrize("name", ["chain_2", "ladder", "by_hand", "minibatch", "masked"])
def test_entry_points_agree_under_one_seed(name, objective):
    """From the very first call on: what is probed before it leaves the generators as they were."""
    pair = build(name)
    values = []
    for evaluate in (objective.loss, objective.differentiable_loss, objective.loss_and_grads, objective.loss):
        pyro.set_rng_seed(3)
        values.append(evaluate(pair.model, pair.guide, *pair.args, **pair.kwargs))
    for value in values:
        assert isinstance(value, torch.Tensor)
        assert value.shape == ()
        torch.testing.assert_close(value.detach(), values[0])
    assert [value.requires_grad for value in values] == [False, True, False, False]


@every_objective
def test_module_form(objective):
    pair = build("chain_2")
    module = objective(pair.model, pair.guide)
    assert isinstance(module, torch.nn.Module)
    owned = {id(p) for program in (pair.model, pair.guide) for p in program.parameters()}
    assert {id(p) for p in module.parameters()} == owned
    pyro.set_rng_seed(3)
    value = module(*pair.args)
    pyro.set_rng_seed(3)
    torch.testing.assert_close(value, objective.differentiable_loss(pair.model, pair.guide, *pair.args))
    value.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    pyro.set_rng_seed(3)
    objective.loss_and_grads(pair.model, pair.guide, *pair.args)
    for before, p in zip(grads, module.parameters(), strict=True):
        torch.testing.assert_close(before, p.grad)


@every_objective
def test_module_form_needs_modules(objective):
    pair = build("by_hand")
    with pytest.raises(TypeError, match=r"model.*no nn.Module.*SVI"):
        objective(pair.model, pair.guide)


@every_objective
def test_svi_takes_it(objective):
    pair = build("chain_2")
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    before = [p.detach().clone() for p in pair.guide.parameters()]
    losses = [svi.step(*pair.args) for _ in range(3)]
    assert all(isinstance(loss, float) for loss in losses)
    assert all((a != b).any() for a, b in zip(before, pair.guide.parameters(), strict=True))
    assert svi.evaluate_loss(*pair.args) == pytest.approx(losses[-1], rel=2.0)


class Refuse(TorchDispatchMode):
    """Raise where a tensor's value is asked for on the host, and note the largest tensor that is made."""

    def __init__(self, forbid=True):
        super().__init__()
        self.forbid, self.largest = forbid, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.forbid and func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read on the host")
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not _is_view(leaf):
                self.largest = max(self.largest, leaf.numel())
        return out


def _is_view(tensor):
    """Expanded tensors hold no memory of their own."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


@every_objective
@pytest.mark.parametrize("name", ["chain_2", "ladder", "minibatch"])
def test_nothing_waits_for_the_device(name, objective):
    pair = build(name)
    objective.loss_and_grads(pair.model, pair.guide, *pair.args)
    objective.loss(pair.model, pair.guide, *pair.args)
    problem = ph.Problem(pair.model, pair.guide)(*pair.args)
    objective.loss(problem)  # an evaluation looks at its observations once
    with Refuse():
        objective.loss_and_grads(pair.model, pair.guide, *pair.args)
        if not isinstance(objective, ph.SleepPhase):  # its data, and so its problem, are others each time
            objective.loss(problem)
        if isinstance(objective, ph.bounds.Bound):
            objective.per_datum(problem)
            objective.terms(problem)
    with Refuse(), pytest.raises(AssertionError, match="read on the host"):
        torch.zeros(()).item()


@pytest.mark.parametrize("name", ["chain_5", "hvae", "nested_all", "discrete_chain", "enumerated", "auto_normal"])
def test_values_do_not_wait_for_the_device(name):
    pair = build(name)
    bound, problem = ph.IWELBO(4), ph.Problem(pair.model, pair.guide)(*pair.args)
    bound.per_datum(problem)  # looks at the observations
    with Refuse():
        bound.per_datum(problem)


@every_objective
def test_programs_run_as_often_for_many_particles_as_for_few(objective):
    counts = []
    for num_particles in (2, 50):
        pyro.clear_param_store()
        case = linear_gaussian(2)
        calls = {"model": 0, "guide": 0}

        def counting(which, program, calls=calls):
            def run(*args, **kwargs):
                calls[which] += 1
                return program(*args, **kwargs)

            return run

        model, guide = counting("model", case.model), counting("guide", case.other)
        made = with_particles(objective, num_particles)
        made.differentiable_loss(model, guide, case.x)
        made.differentiable_loss(model, guide, case.x)
        calls.update(model=0, guide=0)
        made.differentiable_loss(model, guide, case.x)
        counts.append(dict(calls))
    assert counts[0] == counts[1]
    if objective in OBJECTIVES[:6] and getattr(objective, "gradient", "") == "pathwise":
        assert counts[0] == {"model": 1, "guide": 1}


def with_particles(objective, num_particles):
    if isinstance(objective, ph.Regularised):
        return ph.Regularised(with_particles(objective.bound, num_particles), kl_weight=0.5)
    kind = type(objective)
    if kind in (ph.TraceELBO, ph.IWELBO, ph.LayerwiseELBO):
        return kind(num_particles, objective.gradient)
    if kind is ph.VRBound:
        return ph.VRBound(0.5, num_particles, objective.gradient)
    if kind is ph.ThermodynamicBound:
        return ph.ThermodynamicBound(num_particles, 3)
    return ph.CUBO(2, num_particles) if kind is ph.CUBO else kind(num_particles)


SHAPES = {
    "chain_2": (4,),
    "global_latent": (),
    "nested_plates": (4,),
    "nested_all": (3, 4),
    "minibatch": (5,),
    "ragged": (3,),
    "several_plates": (4,),
    "auto_normal": (),
    "discrete_chain": (5,),
}


@pytest.mark.parametrize(
    "bound", [b for b in OBJECTIVES if isinstance(b, ph.bounds.Bound) or hasattr(b, "per_datum")], ids=repr
)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_per_datum(name, bound):
    pair = build(name)
    value = bound.per_datum(pair.model, pair.guide, *pair.args)
    assert value.shape == SHAPES[name]
    assert not value.requires_grad
    for term in bound.terms(pair.model, pair.guide, *pair.args).values():
        assert term.shape == SHAPES[name]
        assert not term.requires_grad


@pytest.mark.parametrize("evaluate", ["per_datum", "terms", "loss"])
@pytest.mark.parametrize(
    "make",
    [
        ph.IWELBO,
        lambda k, chunk_size: ph.VRBound(0.5, k, chunk_size=chunk_size),
        lambda k, chunk_size: ph.CUBO(2, k, chunk_size=chunk_size),
    ],
    ids=["IWELBO", "VRBound", "CUBO"],
)
def test_memory_is_bounded_by_the_chunk(make, evaluate):
    """5000 particles of 20 data, latents of 3 dims: no tensor above a chunk's draws, or the weights themselves."""
    case = linear_gaussian(2, size=20)
    sizes = {}
    for chunk in (50, 5000):
        bound = make(5000, chunk_size=chunk)
        run = getattr(bound, evaluate)
        make(2, chunk_size=chunk).loss(case.model, case.other, case.x)
        with torch.no_grad(), Refuse(forbid=False) as seen:
            run(case.model, case.other, case.x)
        sizes[chunk] = seen.largest
    weights, matrices = 5000 * 20, 3 * 3  # one log-weight a particle and datum; a chunk may hold a matrix a draw
    assert sizes[50] <= max(weights, 50 * 20 * matrices)
    assert sizes[5000] >= 5000 * 20 * 3


def test_one_bound_serves_many_pairs():
    bound = ph.IWELBO(3)
    for name in ("nested_all", "chain_2", "global_latent", "minibatch", "chain_2"):
        pair = build(name)
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        value = bound.per_datum(pair.model, pair.guide, *pair.args)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(value, ph.IWELBO(3).per_datum(pair.model, pair.guide, *pair.args))


def test_arguments_of_another_shape_are_read_anew():
    pair = build("by_hand")
    bound = ph.LayerwiseELBO(2)
    for size in (5, 3, 5, 1):
        assert bound.per_datum(pair.model, pair.guide, torch.randn(size)).shape == (size,)


def test_control_flow_may_change_the_sites():
    """A model that draws another site for another argument of the same shape is no stale structure."""

    def program(deep):
        def run(flag, x=None):
            with pyro.plate("data", 3):
                z = pyro.sample("a" if deep[0] else "b", dist.Normal(torch.zeros(3), 1.0))
                if x is not None:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return run

    deep = [True]
    model, guide = program(deep), program(deep)
    bound = ph.TraceELBO()
    x = torch.randn(3)
    assert set(bound.terms(model, lambda flag, x: guide(flag), 1, x)) == {"reconstruction", "rate_a"}
    deep[0] = False
    assert set(bound.terms(model, lambda flag, x: guide(flag), 1, x)) == {"reconstruction", "rate_b"}


# explain


@pytest.mark.parametrize(
    "bound",
    [
        ph.TraceELBO(2),
        ph.TraceELBO(2, "score"),
        ph.LayerwiseELBO(),
        ph.IWELBO(4, "dreg"),
        ph.IWELBO(4, "vimco"),
        ph.IWELBO(4, share_globals=True),
        ph.VRBound(0.5, 4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", PAIRS)
def test_explain_and_training_give_the_same_refusals(name, bound):
    pair = build(name)
    told = ph.explain(bound, pair.model, pair.guide, *pair.args, **pair.kwargs)
    assert str(told)
    if pair.moved and bound.gradient == "dreg":
        return  # found while running, not from the structure
    if told.refusals:
        with pytest.raises(ValueError, match=re.escape(told.refusals[0])):
            bound.loss_and_grads(pair.model, pair.guide, *pair.args, **pair.kwargs)
    else:
        bound.loss_and_grads(pair.model, pair.guide, *pair.args, **pair.kwargs)


def test_explain_says_what_is_analytic_and_what_trains():
    case = linear_gaussian(2)
    told = ph.explain(ph.LayerwiseELBO(), case.model, case.other, case.x)
    rows = {row.site: row for row in told.rows}
    assert rows["z2"].treatment == "analytic"
    assert rows["z1"].treatment == "Monte Carlo"
    terms = ph.LayerwiseELBO().terms(case.model, case.other, case.x)
    assert {"kl_z2", "rate_z1"} < set(terms)
    assert len(told.trained_by_module) == len(list(case.model.parameters())) + len(list(case.other.parameters()))
    assert len(told.trained_by_svi) == len(told.trained_by_module)
    assert not told.untrained_by_svi
