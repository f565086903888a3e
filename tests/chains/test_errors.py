"""What is wrong with a chain is said with the values, naming the kernel."""

import numpy as np
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

import pyro_hvae as ph
from pyro_hvae import models
from pyro_hvae.arguments import ContextError
from pyro_hvae.chains import BottomUp, TopDown
from pyro_hvae.diffusion import Diffusion, LinearSchedule
from pyro_hvae.kernels import Bernoulli, Gaussian, StandardNormal
from tests.chains.two_layers import data, pair


class TestErrors:
    """What is wrong, with the values, naming the kernel."""

    def test_a_kernel_that_does_not_fit_the_next(self):
        model = TopDown(z2=StandardNormal(2), x=Bernoulli(nn.Linear(3, 5)))
        with pytest.raises(ValueError, match=r"kernel 'x' of 'model' \(Bernoulli\).*\(7, 2\).*expects a last dim of 3"):
            model(data())

    def test_a_guide_that_does_not_fit_the_data(self):
        with pytest.raises(ValueError, match=r"kernel 'z1' of 'guide' \(Gaussian\).*\(7, 5\).*expects a last dim of 4"):
            BottomUp(z1=Gaussian(nn.Linear(4, 6)))(data())

    def test_a_likelihood_that_does_not_fit_the_data(self):
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(3, 4)))
        with pytest.raises(ValueError, match=r"kernel 'x'.*events of shape \(4,\).*a datum has shape \(5,\)"):
            model(data())
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(3, 5), event_dim=0))
        with pytest.raises(ValueError, match=r"kernel 'x'.*events of shape \(\).*a datum has shape \(5,\)"):
            model(data())

    def test_a_guide_of_another_width(self):
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(3, 5)))
        guide = BottomUp(z=Gaussian(nn.Linear(5, 2)))
        trace = poutine.trace(guide).get_trace(data())
        with pytest.raises(ValueError, match=r"site 'z' holds a value of shape \(7, 1\).*shape \(3,\)"):
            poutine.replay(model, trace=trace)(data())

    def test_context_of_another_width(self):
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(5, 5)))
        with pytest.raises(ValueError, match=r"expects a last dim of 5 \(3 \+ 4 of the context\)"):
            model(data(), context=torch.zeros(7, 4))

    @pytest.mark.parametrize("build", [models.vae, models.hvae, models.ladder_vae])
    def test_no_context_where_one_is_needed(self, build):
        """Every verb says so in the same sentence, which names the argument and has none of Pyro's shapes."""
        dims = {"latent_dim": 2} if build is models.vae else {"latent_dims": (3, 2)}
        model, guide = build(event_shape=5, hidden=(4,), context_dim=3, **dims)
        verbs = {
            "model": (lambda: model(size=7), lambda: model(data()), lambda: ph.decode(model, {}, size=7)),
            "guide": (
                lambda: guide(data()),
                lambda: ph.encode(guide, data()),
                lambda: ph.reconstruct(model, guide, data()),
                lambda: ph.interpolate(model, guide, data(), data()),
                lambda: ph.impute(model, guide, data(), data() > 0),
                lambda: ph.to_datatree(model, guide, data()),
                lambda: ph.TraceELBO().loss(model, guide, data()),
            ),
        }
        for name, calls in verbs.items():
            for call in calls:
                with pytest.raises(ContextError) as refused:
                    call()
                assert str(refused.value) == (
                    f"'{name}' was built for a context of width 3, and got none: pass context=, a tensor (N, 3) with "
                    "one row for each datum."
                )
        with pytest.raises(ContextError, match=r"width 3, and got one of shape \(7, 2\): pass context="):
            model(data(), context=torch.zeros(7, 2))
        with pytest.raises(ContextError, match="'model' takes no context, and got one"):
            build(event_shape=5, hidden=(4,), **dims)[0](data(), context=torch.zeros(7, 2))

    def test_a_hand_written_chain_that_may_lack_its_context(self):
        model = TopDown(z=StandardNormal(3), x=Bernoulli(nn.Linear(5, 5)))
        with pytest.raises(ValueError, match=r"expects a last dim of 5 \(with a context= of width 2"):
            model(data())

    def test_dtype(self):
        with pytest.raises(ValueError, match=r"kernel 'z' of 'guide'.*torch.float32"):
            BottomUp(z=Gaussian(nn.Linear(5, 2)))(data().float())

    def test_sizes(self):
        model, guide = pair()
        with pytest.raises(ValueError, match="can't tell how many data"):
            model()
        with pytest.raises(ValueError, match="x has 7 rows where 3 are expected"):
            model(data(), size=3)
        with pytest.raises(ValueError, match="context has 2 rows where 7"):
            guide(data(), context=torch.zeros(2, 1))
        with pytest.raises(ValueError, match="at least one datum, got 0"):
            model(size=0)
        with pytest.raises(ValueError, match="size of the whole data set, got 3 for a batch of 7"):
            guide(data(), data_size=3)
        for program in (model, guide, Diffusion(LinearSchedule(), 2)):
            with pytest.raises(ValueError, match="size of the whole data set, got nan for a batch of 7"):
                program(data(), data_size=float("nan"))
        for size in (2.5, True, "3"):
            with pytest.raises(TypeError, match=f"size is a number of data, an integer; got {size!r}"):
                model(size=size)
        assert model(size=np.int64(3)).shape == (3, 5)
        with pytest.raises(TypeError, match=r"torch.Tensor, got ndarray"):
            model(data().numpy())

    def test_masks(self):
        model, guide = pair()
        with pytest.raises(ValueError, match=r"mask must be boolean.*torch.float64"):
            model(data(), mask=torch.ones(7, 5))
        with pytest.raises(ValueError, match=r"mask must have the shape of x \(7, 5\) or \(7,\), got \(7, 4\)"):
            guide(data(), mask=torch.ones(7, 4, dtype=torch.bool))

    def test_names(self):
        with pytest.raises(ValueError, match="'forward': that is the name of an attribute of TopDown"):
            TopDown(forward=StandardNormal(2))
        with pytest.raises(ValueError, match="'data': that is the name of the plate"):
            TopDown(data=StandardNormal(2))
        with pytest.raises(ValueError, match="needs at least one kernel"):
            BottomUp()
        with pytest.raises(TypeError, match=r"kernel 'z' must be a torch.nn.Module.*got Normal"):
            TopDown(z=dist.Normal(0.0, 1.0))

    def test_a_kernel_that_gives_no_pyro_distribution(self):
        class Torch(nn.Module):
            def forward(self, parent, context=None):
                return torch.distributions.Normal(parent, 1.0)

        with pytest.raises(TypeError, match=r"kernel 'z' of 'guide' must return a Pyro distribution.*Flow"):
            BottomUp(z=Torch())(data())

    def test_an_error_that_is_not_about_shapes_passes(self):
        class Broken(nn.Module):
            def forward(self, parent, context=None):
                raise RuntimeError("out of luck")

        with pytest.raises(RuntimeError, match=r"^out of luck$"):
            BottomUp(z=Broken())(data())
