"""Pictures hold what they are given, and say their units."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae import plots
from pyro_hvae.diagnostics import calibrate, khats, layers
from pyro_hvae.diffusion import CosineSchedule, LinearSchedule
from tests.linear_gaussian import linear_gaussian


def labelled(figure):
    return all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)


def test_notebooks_show_a_picture():
    for figure in (plots.samples(torch.rand(4, 64), (8, 8)), plots.latent_map(torch.randn(20, 2))):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_training_curves_and_layers():
    records = [{"step": i, "loss": 9.0 / i, "kl_z2": 1.0, "rate_z1": 2.0, "validation_loss": 9.5 / i} for i in (1, 2)]
    figure = plots.training_curves(records)
    assert labelled(figure)
    assert [line.get_label() for line in figure.axes[0].lines] == ["loss", "held-out loss"]
    bars = plots.layer_kl({"kl_z2": torch.tensor([1.0, 3.0]), "rate_z1": -1.0}, units={"z2": 4}).axes[0]
    assert [bar.get_height() for bar in bars.patches] == [2.0, -1.0]
    assert "4 active" in "".join(text.get_text() for text in bars.texts)
    with pytest.raises(ValueError, match="no layer terms"):
        plots.layer_kl({"reconstruction": 1.0})


def test_khats_of_each_datum_and_layer():
    case = linear_gaussian(2)
    figure = plots.khat_scatter(khats(case.model, case.other, case.x, num_draws=100))
    assert labelled(figure)
    assert [axis.get_title() for axis in figure.axes] == ["all layers", "z1 and after", "z2 and after"]
    exact = plots.khat_scatter(khats(case.model, case.exact, case.x, num_draws=100))
    assert np.isfinite(exact.axes[0].lines[0].get_ydata()).all()


def test_ranks_lie_within_their_bands_for_the_exact_posterior():
    case = linear_gaussian(1)
    found = calibrate(case.model, case.exact, torch.zeros(300, case.x.shape[1]), num_draws=49)
    figure = plots.calibration_ecdf(found, names=["z1", "log_q"], level=0.999)
    assert labelled(figure)
    for axis in figure.axes:
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert all(band.min() <= min(line.get_ydata()) for line in axis.lines)
        assert all(max(line.get_ydata()) <= band.max() for line in axis.lines)


def test_bracket():
    case = linear_gaussian(1)
    bracket = ph.evidence_sandwich(case.model, case.exact, case.x, num_chains=4, betas=5)
    figure = plots.evidence_bracket(bracket, elbo=ph.TraceELBO().per_datum(case.model, case.exact, case.x))
    assert labelled(figure)
    assert "above: estimate" in figure.axes[0].get_legend().texts[0].get_text()


def test_latents():
    z = torch.randn(50, 2)
    assert plots.latent_map(z, [0, 1] * 25).axes[0].get_xlabel() == "unit 0"
    wide = torch.randn(50, 4) * torch.tensor([9.0, 1.0, 0.1, 0.1])
    assert plots.latent_map(wide).axes[0].get_xlabel().startswith("first component (9")
    with pytest.raises(ValueError, match="d >= 2"):
        plots.latent_map(torch.randn(50, 1))
    model, guide = ph.hvae(12, (4, 2), hidden=(8,))
    latents = ph.encode(guide, torch.zeros(1, 12), mean=True)
    figure = plots.traversal(model, latents, (3, 4), units={"z1": [0], "z2": [1]}, at=(-2, -1, 0, 1, 2))
    assert [axis.get_ylabel() for axis in figure.axes[::5]] == ["z1[0]", "z2[1]"]
    middle = model.kernels["x"](latents["z1"]).mean.detach().reshape(3, 4)  # of z1 alone, whatever z2 is
    np.testing.assert_allclose(figure.axes[7].images[0].get_array(), middle, rtol=1e-6)
    with pytest.raises(ValueError, match=r"units of 'z1' are 0 to 3, got \[4\]"):
        plots.traversal(model, latents, (3, 4), units={"z1": [4]})
    with pytest.raises(ValueError, match="no site 'z3'"):
        plots.traversal(model, latents, (3, 4), units={"z3": [0]})
    with pytest.raises(ValueError, match="units is empty"):
        plots.traversal(model, latents, (3, 4), units={"z1": []})
    with pytest.raises(ValueError, match=r"latents are of one datum.*'z1': \(2, 4\)"):
        plots.traversal(model, ph.encode(guide, torch.zeros(2, 12)), (3, 4), units={"z1": [0]})


def test_a_traversal_of_a_conditional_model_has_its_context():
    torch.manual_seed(0)
    model, guide = ph.vae(6, 2, hidden=(4,), context_dim=3)
    one = torch.tensor([0.0, 1.0, 0.0])
    latents = ph.encode(guide, torch.zeros(1, 6), context=one[None], mean=True)
    for context in (one, one[None]):
        figure = plots.traversal(model, latents, (2, 3), units={"z1": [1]}, at=(-1.0, 2.0), context=context)
        moved = latents["z1"].clone()
        moved[:, 1] = 2.0
        expected = ph.decode(model, {"z1": moved}, context=one[None]).mean.reshape(2, 3)
        np.testing.assert_allclose(figure.axes[1].images[0].get_array(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="context is of one datum"):
        plots.traversal(model, latents, (2, 3), units={"z1": [1]}, context=torch.eye(3))
    with pytest.raises(ValueError, match=r"'model' was built for a context of width 3, and got none: pass context="):
        plots.traversal(model, latents, (2, 3), units={"z1": [1]})


def test_maps_are_coloured_by_label():
    z = torch.randn(30, 2)
    words = np.array(["low", "high", None] * 10, dtype=object)
    axis = plots.latent_map(z, words).axes[0]
    assert [text.get_text() for text in axis.get_legend().texts] == ["no label", "high", "low"]
    assert len({line.get_color() for line in axis.lines}) == 3
    numbers = torch.linspace(0, 1, 30)
    map_, bar = plots.latent_map(z, numbers).axes
    np.testing.assert_array_equal(map_.collections[0].get_array(), numbers)
    assert bar.get_ylim() == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"one for each of 30 data, got shape \(3,\)"):
        plots.latent_map(z, [0, 1, 2])


def test_schedules():
    figure = plots.schedule(LinearSchedule(-8.0, 4.0), CosineSchedule(-8.0, 4.0))
    assert labelled(figure)
    assert [text.get_text() for text in figure.axes[1].get_legend().texts] == ["LinearSchedule", "CosineSchedule"]


def test_images_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit 2 x 3 = 6 pixels"):
        plots.samples(torch.zeros(4, 7), (2, 3))


def test_layers_as_they_are_measured():
    case = linear_gaussian(2)
    found = layers(case.model, case.other, case.x.repeat(4, 1))
    axis = plots.layer_kl(found).axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axis.patches], found["term"].values)
    assert "2 active" in axis.texts[0].get_text()


def test_a_bracket_that_is_open_below():
    """A chain without weight leaves no lower bound but -inf, which is drawn down to the frame and marked."""
    bracket = SimpleNamespace(lower=np.array([-np.inf, -2.0]), upper=np.array([-1.0, -1.5]), upper_is_bound=False)
    others = {f"bound {i}": np.array([-3.0, -2.5]) for i in range(6)}
    axis = plots.evidence_bracket(bracket, others=others).axes[0]
    legend = [text.get_text() for text in axis.get_legend().texts]
    assert legend == ["log p(x), above: estimate", "nothing below", *others]
    segments = axis.collections[0].get_segments()
    assert np.isfinite(segments).all()
    assert segments[0][:, 1].min() < -3.0
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), [0])


def pictures():
    """Every kind of picture, as it is by default."""
    torch.manual_seed(0)
    case, names = linear_gaussian(2), ["z1", "log_q"]
    model, guide = ph.hvae(6, (3, 2), hidden=(4,))
    latents = ph.encode(guide, torch.zeros(1, 6), mean=True)
    records = [
        {"step": i, "loss": 9.0 / i, "kl_z2": 1.0, "rate_z1": 2.0, "divergence_weight": min(i / 3, 1.0)}
        for i in range(1, 6)
    ]
    bracket = SimpleNamespace(lower=np.array([-2.0, -1.0]), upper=np.array([-1.9, -0.8]), upper_is_bound=True)
    ranks = calibrate(case.model, case.exact, torch.zeros(100, case.x.shape[1]), num_draws=19)
    return {
        "training_curves": lambda **o: plots.training_curves(records, **o),
        "layer_kl": lambda **o: plots.layer_kl({"kl_z2": 1.0, "rate_z1": 2.0}, units={"z1": 3}, **o),
        "samples": lambda **o: plots.samples(torch.rand(13, 6), (2, 3), columns=5, data=torch.rand(20, 6), **o),
        "reconstructions": lambda **o: plots.reconstructions(torch.rand(4, 6), torch.rand(4, 6), (2, 3), **o),
        "traversal": lambda **o: plots.traversal(model, latents, (2, 3), units={"z1": [0, 2]}, at=(-2, 0, 2), **o),
        "latent_map": lambda **o: plots.latent_map(torch.randn(40, 2), torch.arange(40) % 4, **o),
        "schedule": lambda **o: plots.schedule(LinearSchedule(), CosineSchedule(), **o),
        "khat_scatter": lambda **o: plots.khat_scatter(khats(case.model, case.other, case.x, num_draws=100), **o),
        "calibration_ecdf": lambda **o: plots.calibration_ecdf(ranks, names=names, **o),
        "evidence_bracket": lambda **o: plots.evidence_bracket(bracket, elbo=torch.tensor([-2.5, -1.5]), **o),
    }


@pytest.mark.parametrize("kind", plots.__all__)
def test_a_picture_has_a_title_and_a_legend_that_covers_nothing(kind):
    draw = pictures()[kind]
    if kind != "traversal":  # which names the model
        assert draw(title="VAE of digits").get_suptitle() == "VAE of digits"
    figure = draw()
    assert len(figure.get_suptitle()) > 5
    assert all(axis.has_data() for axis in figure.axes)  # no panel is empty
    figure.draw_without_rendering()
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend() is not None] + figure.legends
    assert bool(legends) == (kind not in ("samples", "reconstructions", "traversal"))
    whole = figure.get_window_extent()
    for drawn in legends:
        box = drawn.get_window_extent()
        assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1


def test_the_warm_up_is_shaded():
    def spans(weights):
        records = [{"step": 10 * i, "loss": 1.0, "kl_z": 1.0} for i in range(1, len(weights) + 1)]
        for record, weight in zip(records, weights, strict=True):
            record |= {} if weight is None else {"divergence_weight": weight}
        figure = plots.training_curves(records)
        drawn = [[(p.get_x(), p.get_x() + p.get_width()) for p in axis.patches] for axis in figure.axes]
        assert drawn[0] == drawn[1]  # both panels
        return drawn[0], [text.get_text() for text in figure.axes[0].get_legend().texts]

    assert spans([0.2, 0.6, 1.0, 1.0]) == ([(0, 30)], ["loss", "KL weight below 1"])
    assert spans([0.5, None, 4.0, 4.0]) == ([(0, 30)], ["loss", "KL weight below 4"])
    assert spans([0.5, 1.0, 0.5, 1.0])[0] == [(0, 20), (30, 40)]  # a weight that falls again
    for constant in ([1.0, 1.0], [4.0, 4.0], [None, None]):
        assert spans(constant) == ([], ["loss"])


def test_a_fit_records_what_is_shaded():
    torch.manual_seed(0)
    model, guide = ph.vae(4, 2, hidden=(3,))
    bound = ph.Regularised(ph.LayerwiseELBO(), kl_weight=ph.bounds.warm_up(6))
    x = torch.ones(8, 4)
    result = ph.fit(model, guide, x, bound=bound, steps=8, log_every=2, validation=x, progress=False)
    assert result.history["divergence_weight"] == pytest.approx([2 / 6, 4 / 6, 1.0, 1.0])
    (span,) = plots.training_curves(result.history).axes[0].patches
    assert (span.get_x(), span.get_width()) == (0, 6)
    plain = ph.fit(model, guide, x, bound=ph.LayerwiseELBO(), steps=2, log_every=2, progress=False)
    assert "divergence_weight" not in plain.history.names()


def test_samples_stand_beside_data():
    images, data = torch.rand(7, 6), torch.rand(30, 6)
    figure = plots.samples(images, (2, 3), columns=4, data=data)
    assert [part.get_suptitle() for part in figure.subfigs] == ["data", "samples"]
    left, right = ([axis.images[0].get_array() for axis in part.axes] for part in figure.subfigs)
    np.testing.assert_allclose(np.stack(left), data[:7].reshape(7, 2, 3))
    np.testing.assert_allclose(np.stack(right), images.reshape(7, 2, 3))


def test_columns_of_a_traversal_have_their_values():
    figure = pictures()["traversal"]()
    assert [axis.get_title() for axis in figure.axes] == ["-2", "0", "2", "", "", ""]
    assert figure.get_supxlabel().startswith("value of the unit")
    assert figure.get_suptitle() == "model: one unit moved at a time"


def test_the_labels_of_a_map_have_a_name():
    z = torch.randn(30, 2)
    assert plots.latent_map(z, torch.rand(30), label_name="nats").axes[1].get_ylabel() == "nats"
    legend = plots.latent_map(z, torch.arange(30) % 3, label_name="digit").axes[0].get_legend()
    assert legend.get_title().get_text() == "digit"
    assert plots.latent_map(torch.zeros(5, 3)).axes[0].get_xlabel() == "first component (0% of the variance)"
