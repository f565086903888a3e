"""Break the estimators one line at a time, and see that a test fails.

    python -m tests.mutants [WORD ...]

A copy of the package is broken, never the package itself.  With words, only mutants whose file or line holds one are
tried.  Ends with a count, and with an error if one survives.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from tests.broken_lines import OBJECTIVES, PROBLEM, PROCESSES

IGNORED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # plugins that are imported before the tests
ROOT = Path(__file__).parent.parent
B, P, D, E, F = "tests/bounds", "tests/problem", "tests/diffusion", "tests/evidence", "tests/factorized"
C, W = "tests/training/compile", "tests/test_weights.py"

# file in the package, line, broken line, tests
MUTANTS = [
    ("problem/run.py", "_SiteTerms(self._twin(), self.model_trace)", "_SiteTerms(self, self.model_trace)",
     f"{P}/test_freed.py"),
    ("problem/run.py", "_SiteTerms(self._twin(), self.guide_trace)", "_SiteTerms(self, self.guide_trace)",
     f"{P}/test_freed.py"),
    ("training/compile/elementary.py", "-0.333333286, 0.133", "-0.33333, 0.133", f"{C}/test_elementary.py"),
    ("training/compile/elementary.py", "value.dtype != torch.float32 or ", "", f"{C}/test_elementary.py"),
    ("training/compile/elementary.py", " if beta == 1 and threshold >= 17 else None", "", f"{C}/test_elementary.py"),
    ("training/compile/program.py", "    replace_elementary(graph)\n", "", f"{C}/test_elementary.py"),
    ("diagnostics/information.py", "max(2, min(_DRAWS, _COMPONENTS // data))", "_DRAWS",
     "tests/diagnostics/test_information.py"),
    ("diagnostics/diagnose.py", ", totals_only=many", "", "tests/diagnostics/test_diagnose.py"),
    ("diagnostics/diagnose.py", "[*([\"sample_stats\"] if many else densities), *kept]",
     "[\"sample_stats\"] if many else [*densities, *kept]", "tests/diagnostics/test_diagnose.py"),
    ("diagnostics/diagnose.py", "word.finite_findings(few) or findings", "findings",
     "tests/diagnostics/test_diagnose.py"),
    ("evidence/roughness.py", "2.0 * length * slope", "length * slope", f"{E}/test_roughness.py"),
    ("evidence/roughness.py", "if missed > _LIMIT:", "if False:", f"{E}/test_roughness.py"),
    ("evidence/roughness.py", "with torch.random.fork_rng():\n        missed", "if True:\n        missed",
     f"{E}/test_roughness.py"),
    ("evidence/learned.py", "warn_if_rough(path)", "pass", f"{E}/test_roughness.py"),
    ("diagnostics/calibration.py", "self.ties += (draws == self.true).sum(0)", "pass",
     "tests/diagnostics/test_calibration.py"),
    ("diagnostics/calibration.py", "self.draws[name][start : start + len(part)] = part",
     "self.draws[name][: len(part)] = part", "tests/diagnostics/test_calibration.py"),
    ("diagnostics/layers.py", "self.squares + squares + shift**2 * (self.count * len(part) / total)",
     "self.squares + squares", "tests/diagnostics/test_layers.py"),
    ("diagnostics/information.py", "run.num_particles * self.points.numel()))", "run.num_particles * points.numel()))",
     "tests/diagnostics/test_information.py"),
    ("training/compile/program.py", "if library is None or library in removed:", "if True:", f"{C}/test_passes.py"),
    ("training/compile/program.py", 'library.suffix == ".so" and library.is_relative_to(cache_dir())', "True",
     f"{C}/test_passes.py"),
    ("evidence/path.py", "if devices.has_values(lost) and bool(lost.any()):", "if bool(lost.any()):",
     "tests/test_meta.py"),
    ("bounds/particles.py", "torch.where(chosen, log_weights.new_zeros(()), log_weights)",
     "torch.where(chosen, torch.zeros(()).to(log_weights), log_weights)", "tests/test_meta.py"),
    ("training/compile/program.py", "return _compiled(module, tensors, noise, instructions=None)", "raise",
     f"{C}/test_passes.py"),
    ("problem/isolation.py", "RUNNING = threading.RLock()", "import contextlib\n\nRUNNING = contextlib.nullcontext()",
     "tests/training/test_threads.py"),
    ("weights/means.py", "if devices.has_values(log_weights) and bool(invalid.any()):", "if False:", W),
    ("plots/canvas.py", "if size is not None and values.size != size:", "if False:", "tests/test_bad_inputs.py"),
    ("evidence/kernels.py", 'momentum, fresh, held=("forward",))', "momentum, fresh)", f"{E}/test_learned.py"),
    ("evidence/kernels.py", "log_w = log_w - share_of_others(log_w.detach()) * (undone - undone.detach())", "pass",
     f"{E}/test_learned.py"),
    ("evidence/kernels.py", "fixed(momentum), None if fresh is None else fixed(fresh), held=(\"shared\",)",
     "momentum, fresh, held=(\"shared\",)", f"{E}/test_learned.py"),
    ("evidence/networks.py", "return self.net(inputs)\n        parameters = {name: p.detach()",
     "return self.net(inputs)\n        parameters = {name: p", f"{E}/test_learned.py"),
    ("evidence/networks.py", "which[step] = 1.0", "which[0] = 1.0", f"{E}/test_learned.py"),
    ("evidence/kernels.py", "log_sd[name] = sd.log() + change[name]", "log_sd[name] = sd.log()",
     f"{E}/test_learned.py"),
    ("evidence/path.py", "if self.problem.separable:", "if True:", f"{E} -k bracket"),
    ("problem/problem.py", "not any(self.dependencies.guide.values())", "True", f"{P}/test_rerun.py"),
    ("problem/problem.py", "torch.no_grad(), disable_proxy_modes_tracing():", "torch.no_grad():", f"{C}/test_step.py"),
    ("training/compile/step.py", "kept_buffers(self.objective), kept_values(flat.tensors), full_precision():",
     "kept_buffers(self.objective), kept_values(flat.tensors):", f"{C}/test_step.py"),
    ("weights/means.py", ".split(max(1, _BLOCK // len(draws_first)), 1)", ".split(1, 1)[:1]", W),
    ("weights/chunks.py", "start += len(part)", "start += 1", W),
    ("training/feed.py", "return iter([((), {})][start:])", "return iter([((), {})])", "tests/training/test_fit.py"),
    ("evidence/kernels.py", "others = relative.sum(0) - relative", "others = relative.sum(0)", f"{E}/test_learned.py"),
    ("nn/denoisers.py", "torch.exp(0.5 * F.logsigmoid(-level) - F.logsigmoid(level))",
     "torch.exp(0.5 * F.logsigmoid(-level) - 0.5 * F.logsigmoid(level))", "tests/test_nn.py"),
    ("nn/denoisers.py", "if gamma.dim() > max(0, z.dim() - self.event_dim):", "if False:", "tests/test_nn.py"),
    ("diffusion/process.py", "    with like.device:\n        return", "    if True:\n        return",
     "tests/test_meta.py"),
    ("bounds/diffusion.py", "self.magnitudes = self.magnitudes.to(uniform.device)", "pass", "tests/test_meta.py"),
    ("chains/exact.py", "total = total + 0.5 * math.log(2 * math.pi) * (~at).sum(-1)", "pass",
     "tests/chains/test_exact.py"),
    ("chains/exact.py", "covariance = rest @ covariance @ rest.mT + weights @ own @ weights.mT",
     "covariance = rest @ covariance @ rest.mT", "tests/chains/test_exact.py"),
    ("chains/exact.py", "(log_p.unsqueeze(1) + moves).logsumexp(0)", "(log_p.unsqueeze(0) + moves).logsumexp(0)",
     "tests/chains/test_exact.py"),
    ("diagnostics/diagnose.py", "poor = hats is not None and bool(", "poor = hats is None and bool(",
     "tests/diagnostics/test_diagnose.py"),
    ("diagnostics/report.py", "round(one[\"ratio\"], 2)", "round(1 / one[\"ratio\"], 2)",
     "tests/diagnostics/test_diagnose.py"),
    ("plots/images.py", "size=len(values), context=context", "size=len(values)", "tests/test_plots.py"),
    ("plots/training.py", "if before < largest and step > start:", "if False:", "tests/test_plots.py"),
    ("plots/canvas.py", 'bbox_to_anchor=(1.02, 1.0)', 'bbox_to_anchor=(0.6, 1.0)', "tests/test_plots.py"),
    ("chains/base.py", "self._check_context(context)", "pass", "tests/chains/test_errors.py"),
    ("arguments.py", 'super().__init__(message.split("\\n", 1)[0])', "super().__init__(message)",
     "tests/chains/test_errors.py"),
    ("notebook.py", "return html.escape(str(value))", "return str(value)", "tests/test_notebook.py"),
    ("training/history.py", "self._records[-_SHOWN:]", "self._records[:_SHOWN]", "tests/test_notebook.py"),
    ("diagnostics/moments.py", "abs(shifts) > most + shift_error", "abs(shifts) > 2.5 * most + shift_error",
     "tests/diagnostics/test_diagnose.py"),
    ("problem/particles.py", 'or type(leaf_distribution(site["fn"])).__name__ == "Delta"', "",
     "tests/diagnostics/test_diagnose.py"),
    ("bounds/importance.py", "log_weights.logsumexp(0) - math.log(log_weights.shape[0])\n\n    def leave_one_out",
     "log_weights.logsumexp(0)\n\n    def leave_one_out", f"{B}/test_importance.py"),
    ("bounds/importance.py", "- math.log(log_weights.shape[0])) / power", "- math.log(log_weights.shape[0]))",
     f"{B}/test_importance.py"),
    ("bounds/importance.py", "return Estimate(value, value, inside.scale, shared=shared, run=run), weights",
     "return Estimate(value, value, 1.0, shared=shared, run=run), weights", f"{B}/test_subsampling.py"),
    ("bounds/importance.py", "if plate not in kept", "if False", f"{B}/test_subsampling.py"),
    ("bounds/upper.py", "- math.log(log_weights.shape[0])) / self.order", ") / self.order", f"{B}/test_upper.py"),
    ("bounds/upper.py", "weighted_mean(softmax_of(log_weights), log_weights)", "log_weights.mean(0)",
     f"{B}/test_upper.py"),
    ("bounds/elbo.py", "and not dependencies.broken_by(name)", "", f"{B}/test_pyro_pitfalls.py {B}/test_elbo.py"),
    ("bounds/elbo.py", "divergences[name] = run.weigh(p, value)",
     "divergences[name] = run.layout.reduce(value, run.plates)",
     f"{B}/test_elbo.py {B}/test_programs.py"),
    ("bounds/wake.py", "weights = drawn.log_weights.softmax(0)", "weights = drawn.log_weights.softmax(-1)",
     f"{B}/test_wake.py"),
    ("bounds/wake.py", "return total(run.log_p) + total(run.log_q)", "return total(run.log_p)",
     f"{B}/test_wake.py"),
    ("problem/execute.py", "poutine.replay(guide, trace=_with_own_options(draws))",
     "poutine.replay(guide, trace=draws)", f"{P}/test_run.py"),
    ("bounds/diffusion.py", "return (term / density).mean(0)", "return term.mean(0)", f"{D}/test_bound.py"),
    ("bounds/diffusion.py", "term = count * _layer(", "term = (count + 1) * _layer(", f"{D}/test_bound.py"),
    ("bounds/diffusion.py", "return torch.rand(shape, dtype=like.dtype, device=like.device)\n        count",
     "return torch.rand(shape, dtype=like.dtype, device=like.device) ** 2\n        count", f"{D}/test_bound.py"),
    ("diffusion/denoising.py", "torch.expm1(upper - self._wide(schedule(s), z_t))",
     "(upper - self._wide(schedule(s), z_t))", f"{D}/test_bound.py"),
    ("diffusion/denoising.py", "+ torch.log1p(excess) - excess / (1 + excess)).sum(dims)",
     "+ torch.log1p(excess)).sum(dims)",
     f"{D}/test_reverse.py"),
    ("diffusion/process.py", "of_x = other.alpha * variance_step", "of_x = self.alpha * variance_step",
     f"{D}/test_process.py"),
    ("diffusion/multivariate.py", "2 * a * d) / 3", "a * d) / 3", f"{D}/test_multivariate.py"),
    ("diffusion/multivariate.py", "** 2 + _LEAST_SLOPE) / whole", "** 2 + _LEAST_SLOPE)",
     f"{D}/test_multivariate_training.py"),
    ("diffusion/multivariate.py", "coefficients.reshape(shape) + moved", "coefficients.reshape(shape) + 0.0 * moved",
     f"{D}/test_multivariate.py"),
    ("diffusion/multivariate.py", "gamma.mean(tuple(range(-self.event_dim, 0)))",
     "gamma.sum(tuple(range(-self.event_dim, 0)))", f"{D}/test_multivariate.py"),
    ("diffusion/schedules.py", "torch.autograd.grad(pulled.sum(), weights, create_graph=keep)",
     "torch.autograd.grad(pulled.sum(), weights)", f"{D}/test_multivariate.py"),
    ("diffusion/schedules.py", "gamma.diff(dim=0) <= 0", "gamma.diff(dim=0) <= -0.5",
     f"{D}/test_multivariate_training.py"),
    ("diffusion/process.py", "enumerate(self.given(context).conditionals(value), start=1)",
     "enumerate(self.given(None).conditionals(value), start=1)", f"{D}/test_multivariate.py"),
    ("bounds/diffusion.py", "self._layers(p, given_context(q, context), z",
     "self._layers(p, given_context(q, None), z", f"{D}/test_multivariate.py"),
    ("diffusion/denoising.py", "(0.5 * self._wide(schedule.derivative(t), z_t) * square).sum(dims)",
     "0.5 * self._wide(schedule.derivative(t), z_t).mean(-1) * square.sum(dims)", f"{D}/test_multivariate.py"),
    ("diffusion/denoising.py", "gammas = schedule.given(context).layers(grid_like(schedule, num_layers, parent))",
     "gammas = schedule.given(context).layers(grid.to(parent) ** 1.1)", f"{D}/test_multivariate.py"),
    ("diffusion/samplers.py", "gammas = chain.schedule.given(context).layers(times)",
     "gammas = chain.schedule.layers(times)", f"{D}/test_multivariate_training.py"),
    ("diffusion/ordinal.py", "torch.arange(count, device=z.device), count)\n    if",
     "torch.arange(count, device=z.device), count + 1)\n    if", f"{D}/test_ordinal.py"),
    ("diffusion/ordinal.py", "torch.where((place == 0) | (place == count), 0.5, 1.0)",
     "torch.where(place == 0, 0.5, 1.0)", f"{D}/test_ordinal.py"),
    ("diffusion/ordinal.py", "torch.where(sums > _RESOLVED, sums.log(), tail)", "sums.clamp(min=1e-300).log()",
     f"{D}/test_ordinal.py"),
    ("diffusion/ordinal.py", "least = torch.maximum(staying, top + _rows(moves, first.squeeze(-1), count))",
     "least = staying", f"{D}/test_ordinal.py"),
    ("diffusion/ordinal.py", "torch.where(lost < 0.5, torch.log1p(-lost), kept.log())", "torch.log1p(-lost.float())",
     f"{D}/test_ordinal.py"),
    ("diffusion/ordinal.py", "log_v.exp() * (less * less.exp() - torch.expm1(less))",
     "log_v.exp() * (less.exp() - torch.expm1(less) - 1)", f"{D}/test_ordinal.py"),
    ("diffusion/ordinal.py", "beside.clamp(0, self.num_states - 1)", "beside % self.num_states",
     f"{D}/test_ordinal.py"),
    ("diffusion/ordinal.py", "clamp(_LATEST, _EARLIEST)", "clamp(max=_EARLIEST)", f"{D}/test_ordinal.py"),
    ("diffusion/ordinal.py", "_slowest(self.num_states) * log_kept.exp()", "_slowest(self.num_states)",
     f"{D}/test_ordinal.py"),
    ("diffusion/inpainting.py", "chosen = _resampled(torch.where(mask, layer.log_prob(path), 0.0).sum(dims))",
     "chosen = _resampled(torch.zeros_like(z.sum(dims)))", f"{D}/test_reverse.py"),
    ("diffusion/twists.py", "tweedie = level.sigma**2 / level.alpha * product", "tweedie = -level.sigma * product",
     f"{D}/test_conditioned.py"),
    ("diffusion/twists.py", "return floor + torch.where(valid, tweedie, torch.zeros_like(tweedie))", "return tweedie",
     f"{D}/test_conditioned.py"),
    ("diffusion/twists.py", "return Twisted(log_psi, xhat.detach(), xhat.detach() + shift)",
     "return Twisted(log_psi, xhat.detach() + shift, xhat.detach() + shift)", f"{D}/test_conditioned.py"),
    ("diffusion/twists.py", "bend = direction - _hessian_product(gradient, leaf, along)", "bend = direction",
     f"{D}/test_conditioned.py"),
    ("diffusion/twists.py", "better = reached > best", "better = share == 1.0", f"{D}/test_conditioned.py"),
    ("diffusion/twists.py", "posterior[..., : self.chain.corruption.num_categories].softmax(-1)", "logp.exp()",
     f"{D}/test_conditioned.py"),
    ("diffusion/twists.py", "(logp + dual).log_softmax(-1))", "(logp - dual).log_softmax(-1))",
     f"{D}/test_conditioned.py"),
    ("evidence/twisted.py", "return log_likelihood(twist.argument(x)) - psi", "return 0.0 * psi",
     f"{D}/test_conditioned.py"),
    ("evidence/twisted.py", "(own.log_psi, above.log_psi), torch.sub)", "(own.log_psi, above.log_psi), torch.mul)",
     f"{D}/test_conditioned.py"),
    ("evidence/twisted.py", "[*_values(twist, s, own), layer, enters]", "[*_values(twist, s, own), enters]",
     f"{D}/test_conditioned.py"),
    ("evidence/conditioned.py", "filters, within + filters)", "filters, within)",
     f"{D}/test_conditioned.py"),
    ("evidence/conditioned.py", "evaluation_mode(model, likelihood), torch.no_grad()", "torch.no_grad()",
     f"{D}/test_conditioned_arguments.py"),
    ("diagnostics/conditioned.py", "return found.stderr * found.num_filters**0.5", "return found.stderr",
     f"{D}/test_conditioned.py"),
    ("diffusion/samplers.py", "blend = xhat + (xhat - before) / (2 * ratio)", "blend = xhat + (xhat - before) * ratio",
     f"{D}/test_samplers.py"),
    ("chains/reversal.py", "remainder @ layer.covariance @ remainder.mT + gain @ above.noise @ gain.mT",
     "remainder @ layer.covariance @ remainder.mT", "tests/chains/test_reversal.py"),
    ("distributions/divergences.py", "return 0.5 * (square - p.event_shape[0]) + volume",
     "return 0.5 * square + volume", "tests/chains/test_reversal.py"),
    ("distributions/counts.py", "argument.to(torch.float64) for", "argument for", "tests/distributions/test_counts.py"),
    ("distributions/levels.py", "_ROUNDINGS * eps *", "1e6 * eps *", "tests/distributions/test_levels.py"),
    ("evidence/annealed.py", "total = total + float(betas[t] - betas[t - 1]) * difference(state)",
     "total = total + float(betas[t]) * difference(state)", f"{E}"),
    ("evidence/annealed.py", "state = move(state, t - 1 if reverse else t)", "state = move(state, t)", f"{E}"),
    ("evidence/bases.py", ".prior() if _mixed(prior) else prior", ".prior() if False else prior",
     f"{E}/test_summed_out.py"),
    ("evidence/bases.py", "    if mixed:", "    if False:", f"{E}/test_summed_out.py"),
    ("evidence/temperatures.py", "torch.where(enough, middle, low), torch.where(enough, high, middle)",
     "torch.where(enough, low, middle), torch.where(enough, middle, high)", f"{E}/test_temperatures.py"),
    ("evidence/path.py", "keep = alive | ~alive.any(0)", "keep = alive | alive.any(0)", f"{E}/test_annealed.py"),
    ("evidence/gibbs.py", "log_f = tempered(log_q, log_p, beta)", "log_f = tempered(log_q, log_p, 1.0)",
     f"{E}/test_discrete_annealing.py"),
    ("evidence/gibbs.py", "if not all(_same(", "if False and not all(_same(", f"{E}/test_discrete_annealing.py"),
    ("evidence/gibbs.py", "chosen = block.mask(position) & ~stuck", "chosen = ~stuck",
     f"{E}/test_discrete_annealing.py"),
    ("evidence/gibbs.py", "_check_covered(block, log_q, log_p)", "pass", f"{E}/test_discrete_supports.py"),
    ("evidence/gibbs.py", "elif plate in path.plates:", "elif False:", f"{E}/test_discrete_supports.py"),
    ("evidence/moves.py", "            state = self.gibbs(state, beta)\n        self", "        self",
     f"{E}/test_discrete_annealing.py"),
    ("evidence/singular.py", "return torch.where(failed, torch.nan, result)", "return result", f"{E}/test_singular.py"),
    ("problem/execute.py", "stack.enter_context(kept_buffers(programs.model, programs.guide))", "pass",
     f"{E}/test_one_evaluation.py"),
    ("problem/verbs.py", "with evaluating():\n            problem", "if True:\n            problem",
     f"{E}/test_one_evaluation.py"),
    ("factorized/match.py", "diagonal = matrix.diagonal(dim1=-2, dim2=-1)[..., index].log()",
     "diagonal = 0.9 * matrix.diagonal(dim1=-2, dim2=-1)[..., index].log()", f"{F}/test_exact.py"),
    ("factorized/match.py", "(flat - mean) * weights.sqrt()", "(flat - mean) * weights",
     f"{F}/test_weighted.py"),
    ("factorized/match.py", "index = index * len(support)", "index = index", f"{F}/test_exact.py"),
    ("factorized/families.py", "log_a = log_a - (log_a - a.digamma() - s) / (1 - a * torch.polygamma(1, a))",
     "log_a = log_a", f"{F}/test_weighted.py"),
    ("factorized/posterior.py", "log_q = torch.stack(at_all).logsumexp(0) - math.log(len(problems))",
     "log_q = torch.stack(at_all).logsumexp(0)", f"{F}/test_weighted.py"),
    ("factorized/gaussian.py", "0.5 * dims * math.log(2 * math.pi) - log_det", "0.5 * dims - log_det",
     f"{F}/test_exact.py"),
    ("factorized/affine.py", "return sum(self.marks.of(args[place]) > 0 for place in PRODUCTS[name]) <= 1",
     "return True", f"{F}/test_recognition.py"),
    ("factorized/affine.py", "return marks.of(fn.loc) <= _Level.AFFINE and marks.of(rest) == _Level.CONSTANT",
     "return marks.of(fn.loc) <= _Level.AFFINE", f"{F}/test_recognition.py"),
    ("factorized/affine.py", "self.marks.put(leaf, level if leaf.is_floating_point() else _Level.UNKNOWN)",
     "self.marks.put(leaf, level)", f"{F}/test_recognition.py"),
    ("factorized/gaussian.py", "((there.value - expected).abs() <= tolerance * height).all()", "True",
     f"{F}/test_recognition.py"),
    ("factorized/draws.py", "not same_support(site.prior.support, fn.support)", "False",
     f"{F}/test_bound_problem.py"),
    ("factorized/ascent.py", "index_add_(0, codes, others * log_joint)", "index_add_(0, codes, log_joint)",
     f"{F}/test_exact.py"),
    ("factorized/ascent.py", "better = elbo > best + 1e-12", "better = elbo < best - 1e-12", f"{F}/test_exact.py"),
    ("factorized/compare.py", "influence = influence - weights + 1 / len(weights)",
     "influence = influence - weights",
     f"{F}/test_weighted.py"),
    ("factorized/guide.py", "loc = loc + (self.gain @ torch.cat(free, -1)[..., None])[..., 0]", "loc = loc + 0.0",
     f"{F}/test_weighted.py"),
    ("diagnostics/calibration.py", "scale = together.std(0)", "scale = together[1:].std(0)",
     "tests/diagnostics/test_calibration.py"),
    ("diagnostics/moments.py", "0.5 * np.log(variance / weighted_variance)", "0.5 * np.log(variance / variance)",
     "tests/diagnostics/test_diagnose.py"),
    ("diagnostics/moments.py", "_ERRORS / math.sqrt(count) * flat(one)", "0.0 * flat(one)",
     "tests/diagnostics/test_diagnose.py"),
    ("diagnostics/layers.py", "variance.sum(-1) if name in categorical", "variance.mean(-1) if name in categorical",
     "tests/diagnostics/test_layers.py"),
    ("diagnostics/loo.py", "masked = (likelihood == 0).all", "masked = (likelihood == 1).all",
     "tests/kinds/test_j_reports.py"),
    ("problem/states.py", "if symbol not in factor._pyro_dims)", "if False)", "tests/problem/test_states.py"),
    ("problem/simulate.py", "    _refuse_reads(sorted(bad))", "    pass", "tests/kinds/test_j_diagnostics.py"),
    ("weights/lattice.py", "gap = value - ordered.gather(-1, below)", "gap = 0 * value", W),
    ("weights/lattice.py", "gap = torch.where(start == 0, above - ordered[:, :1], gap)", "", W),
    ("weights/lattice.py", "ordered[rows, -count:]", "ordered[rows]", W),
    ("weights/lattice.py", ".masked_fill(bounded, -torch.inf)", "", W),
    ("weights/tail.py", "_PRIOR_DRAWS * _PRIOR_SHAPE) / (count", "_PRIOR_SHAPE) / (count", W),
    ("weights/tail.py", "return int(count / 4 + 0.5) - 1", "return int(count / 4)", W),
    ("weights/tail.py", "return 30 + int(count**0.5)", "return 30", W),
    ("weights/tail.py", "(index - 0.5) / count)", "index / (count + 1))", W),
    ("weights/tail.py", "above.exp() * -torch.expm1(cutoff - above)", "above.exp() - cutoff.exp()", W),
    ("weights/tail.py", "if not bool(tied.any())", "if True", W),
    ("weights/pareto.py", "rows.double() - top", "-rows.double() - (-rows).amax(-1, keepdim=True).double()",
     f"{W} tests/diagnostics"),
    ("weights/pareto.py", "values = rows.double() - top", "values = (rows - rows.amax(-1, keepdim=True)).double()", W),
    ("weights/pareto.py", "(_LEAST_ROUND_OFF, _MOST_ROUND_OFF)", "(_LEAST_ROUND_OFF)", W),
    ("weights/pareto.py", ".abs().clamp(min=1.0)", ".abs()", W),
    ("weights/pareto.py", "| (tail[:, 1:] == tail[:, :1])", "", W),
    ("weights/pareto.py", "khat[constant] = -torch.inf", "pass", W),
    ("weights/pareto.py", ".clamp(max=1.0)", "", W),
    ("weights/means.py", "+ math.log(count)", "", W),
    ("weights/means.py", "(count * (count - 1))", "count**2", W),
    ("weights/means.py", "-(2 * weights.log_softmax(dim))", "2 * weights.logsumexp(dim) - (2 * weights)",
     W),
    ("weights/means.py", "top.isnan() | (top == torch.inf)", "top == torch.inf", W),
    ("weights/chunks.py", "+ [rest] * (rest > 0)", "+ [rest]", W),
    ("training/compile/watch.py", "list(map(_requires_grad, self._tensors)),", "[],", f"{C}/test_watch.py"),
    ("training/compile/watch.py", "[values[name] for values, name in self._places],", "[],", f"{C}/test_watch.py"),
    ("training/compile/watch.py", "list(map(Tensor.data_ptr, self._tensors)),", "[],", f"{C}/test_watch.py"),
    ("training/compile/watch.py", "or not all(map(is_, objects, self._objects)):", "or False:", f"{C}/test_watch.py"),
    ("training/compile/update.py", "(max_norm / (", "(1.0 / (", f"{C}/test_update.py"),
    ("training/compile/update.py", "weight_decay=group[\"weight_decay\"],", "weight_decay=0.0,", f"{C}/test_update.py"),
    ("training/compile/update.py", "state.get(\"step\") is view", "True", f"{C}/test_update.py"),
    ("training/compile/update.py", "if moment.stride() == parameter.stride() and", "if", f"{C}/test_update.py"),
    ("training/compile/update.py", "part.counts.add_(part.one)", "pass", f"{C}/test_step.py"),
    ("training/compile/reads.py", "if func in _READS:", "if False:", f"{C}/test_reads.py"),
    ("training/compile/reads.py", "            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(containers)):",
     "            if False:", f"{C}/test_reads.py"),
    ("training/compile/graph.py", "        _refuse_changes(before, attributes(objective))\n", "", f"{C}/test_watch.py"),
    ("training/compile/graph.py", "if gradient is None or gradient.stride() == parameter.stride():", "if True:",
     f"{C}/test_update.py {C}/test_step.py"),
    ("training/compile/step.py", "if self._made > MAX_GRAPHS:", "if False:", f"{C}/test_watch.py"),
]  # fmt: skip


def _copied(place: Path) -> None:
    for part in ("pyro_hvae", "tests", "conftest.py", "pyproject.toml"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, place / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place)


def _first_failure(copy: Path, tests: str) -> str:
    """Run tests of a copy of the project in a child of this process, and name the one that fails first, if any.

    The child has torch, Pyro and ArviZ imported already, which takes longer than most of the tests.
    """
    output = copy / "output.txt"
    child = os.fork()
    if child == 0:
        code = 3
        try:
            with output.open("w") as file:
                for descriptor in (1, 2):
                    os.dup2(file.fileno(), descriptor)
            os.chdir(copy)
            for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "pyro_hvae")]:
                del sys.modules[name]
            sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *IGNORED, "-m", "not slow", *tests.split()])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    failed = [line.split(" - ")[0] for line in output.read_text().splitlines() if line.startswith("FAILED")]
    if code not in (0, 1):
        print(output.read_text()[-3000:], flush=True)
    return failed[0] if code == 1 and failed else ""


def main() -> None:
    words = sys.argv[1:]
    listed = [*MUTANTS, *PROBLEM, *OBJECTIVES, *PROCESSES]
    chosen = [m for m in listed if not words or any(word in m[0] or word in m[1] for word in words)]
    alive = []
    sys.dont_write_bytecode = True  # a broken file may have the size and the time of the sound one
    for name in ("pyro", "arviz_base", "arviz_stats", "scipy.stats"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        _copied(copy)
        for name, line, broken, tests in chosen:
            path = copy / "pyro_hvae" / name
            sound = path.read_text()
            shown = f"{name}: {line.splitlines()[0].strip()}"
            if sound.count(line) != 1:
                alive.append(shown)
                print(f"{sound.count(line)} SUCH LINES  {shown}", flush=True)
                continue
            path.write_text(sound.replace(line, broken))
            failure = _first_failure(copy, tests)
            path.write_text(sound)
            if not failure:
                alive.append(shown)
            print(f"{'seen' if failure else 'SURVIVED'}  {shown}  {failure}", flush=True)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants were seen")
    if alive:
        sys.exit(1)


if __name__ == "__main__":
    main()
