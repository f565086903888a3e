"""Results in notebooks: the numbers of the plain text, every text escaped."""

import html
import re
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hvae as ph
from pyro_hvae.conjugate import guide, model
from pyro_hvae.diagnostics import Finding, Report
from pyro_hvae.evidence import posterior_gap
from pyro_hvae.notebook import html_of_lines, html_table
from pyro_hvae.training import History

X = torch.tensor([0.0, 2.0, -1.0])
FORBIDDEN = "<script>alert('a & b')</script>"


def numbers(text):
    """The numbers of a text, without the markup of a page."""
    plain = html.unescape(re.sub(r"<[^>]*>", " ", text))
    return sorted(re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", plain))


def report():
    groups = X.repeat(20)
    return ph.diagnose(model, guide(scale=0.5), groups, num_draws=200)


def result():
    pair = ph.vae(4, 2, hidden=(3,))
    return ph.fit(*pair, torch.ones(8, 4), bound=ph.TraceELBO(), steps=4, log_every=2, progress=False, seed=0)


RESULTS = {
    "evidence": lambda: ph.log_evidence(model, guide(scale=0.7), X, num_samples=200),
    "bracket": lambda: ph.evidence_sandwich(model, guide(scale=0.7), X, num_chains=4, betas=5),
    "interval": lambda: ph.evidence_interval(model, guide(scale=0.7), X, budget=500),
    "explanation": lambda: ph.explain(ph.LayerwiseELBO(), model, guide(), X),
    "diagnosis": report,
    "fit": result,
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_page_has_the_numbers_of_the_text(name):
    torch.manual_seed(0)
    found = RESULTS[name]()
    page = found._repr_html_()
    assert page.startswith("<table><caption>")
    assert page.count("<table>") == page.count("</table>")
    assert numbers(page) == numbers(str(found))
    assert numbers(page)


def test_a_history_shows_its_last_records():
    history = History(records=[{"step": i, "loss": 1 / i, "kl_z": None} for i in range(1, 31)])
    page = history._repr_html_()
    assert "30 records, the last 10" in page
    assert set(numbers(repr(history))) <= set(numbers(page))
    assert page.count("<tr>") == 11
    assert "0.0333333<" in page
    assert "0.05<" not in page  # step 20
    assert "<caption>History: 0 records</caption>" in History()._repr_html_()


def test_a_fit_prints_without_its_networks():
    found = result()
    assert "Linear" not in repr(found)
    assert str(found) == repr(found)
    loss = found.history["loss"][-1]
    assert f"last loss: {loss:.6g} nats a datum, at step 4" in str(found)
    assert "held-out" not in str(found)


def pages_with(text):
    """Pages of results in which a user's text stands."""
    finding = Finding("note", text, text, text, text)
    explanation = ph.explain(ph.LayerwiseELBO(), model, guide(), X)
    row = replace(explanation.rows[0], site=text, why=text)
    yield Report((finding,))._repr_html_()
    yield replace(explanation, bound=text, rows=(row,), data_plates=(text,), refusals=(text,))._repr_html_()
    yield History(records=[{"step": 1, text: 2.0, "note": text}])._repr_html_()
    yield replace(result(), stopped=text, run_dir=text)._repr_html_()
    yield replace(ph.log_evidence(model, guide(), X, num_samples=50), method=text)._repr_html_()
    interval = ph.evidence_interval(model, guide(), X, budget=500)
    yield replace(interval, notes=(text,), assumptions={text: text})._repr_html_()
    yield html_table(text, {text: text}, header=[text], notes=[text])
    yield html_of_lines(text, f"{text}: {text}\n{text}")


def shared(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def of_shared(x):
    pyro.sample("mean", dist.Normal(x.sum() / (len(x) + 1), 1.1 * (len(x) + 1) ** -0.5))


OF_ALL = {
    "evidence": lambda: ph.log_evidence(shared, of_shared, X, num_samples=200),
    "bracket": lambda: ph.evidence_sandwich(shared, of_shared, X, num_chains=4, betas=5),
    "interval": lambda: ph.evidence_interval(shared, of_shared, X, budget=500),
    "diagnosis": lambda: ph.diagnose(shared, of_shared, X, num_draws=200, error={"budget": 500}),
    "error": lambda: ph.posterior_error(shared, of_shared, X, num_draws=200, budget=500),
    "gap": lambda: posterior_gap(shared, of_shared, X, num_samples=100, num_steps=2),
}


@pytest.mark.parametrize("name", OF_ALL)
def test_a_latent_that_all_data_share_is_not_called_one_datum(name):
    torch.manual_seed(0)
    found = OF_ALL[name]()
    assert not re.search(r"\b1 data\b|mean over", str(found)), str(found)
    if hasattr(found, "_repr_html_"):
        assert numbers(found._repr_html_()) == numbers(str(found))


def test_texts_of_users_are_escaped():
    for page in pages_with(FORBIDDEN):
        assert "<script" not in page
        assert "&lt;script&gt;" in page
        assert "a & b" not in page
