"""Break the estimators one line at a time, and see that a test fails.

    python -m tests.mutants [WORD ...]

A copy of the package is broken, never the package itself.  With words, only mutants whose file or line holds one are
tried.  Ends with a count, and with an error if one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
B, P, D, E, F = "tests/bounds", "tests/problem", "tests/diffusion", "tests/evidence", "tests/factorized"
W = "tests/test_weights.py"

# file in the package, line, broken line, tests
MUTANTS = [
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
    ("bounds/gradients.py", "weights**2 * fold(through_draws", "weights * fold(through_draws",
     f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "+ weights * log_p)", "+ weights**2 * log_p)", f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "held = run.replay(freeze=True, detach=False)\n    return averaged",
     "held = run.replay(freeze=False, detach=False)\n    return averaged", f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "through_draws = run.replay(freeze=True, detach=False)",
     "through_draws = run.replay(freeze=True, detach=True)", f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "return estimate.unsqueeze(0) - baselines", "return estimate.unsqueeze(0) + baselines",
     f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "means = (finite.sum(0, keepdim=True) - finite) / (count - 1)",
     "means = finite.mean(0, keepdim=True).expand_as(finite)", f"{B}/test_gradients.py"),
    ("bounds/elbo.py", "and not dependencies.broken_by(name)", "", f"{B}/test_pyro_pitfalls.py {B}/test_elbo.py"),
    ("bounds/elbo.py", "divergences[name] = run.weigh(p, value)",
     "divergences[name] = run.layout.reduce(value, run.plates)",
     f"{B}/test_elbo.py {B}/test_programs.py"),
    ("bounds/wake.py", "weights = drawn.log_weights.softmax(0)", "weights = drawn.log_weights.softmax(-1)",
     f"{B}/test_wake.py"),
    ("bounds/wake.py", "return total(run.log_p) + total(run.log_q)", "return total(run.log_p)",
     f"{B}/test_wake.py"),
    ("problem/run.py", "scale, mask = user_scale(site, outside), self.mask_of(site)",
     "scale, mask = 1.0, self.mask_of(site)", f"{B}/test_programs.py {B}/test_subsampling.py"),
    ("problem/run.py", "value = scale_and_mask(value, scale, mask)", "value = scale_and_mask(value, scale, None)",
     f"{B}/test_programs.py"),
    ("problem/run.py", "if site[\"is_observed\"] or site[\"fn\"].has_rsample or", "if site[\"is_observed\"] or",
     f"{B}/test_gradients.py"),
    ("problem/execute.py", "poutine.replay(guide, trace=_with_own_options(draws))",
     "poutine.replay(guide, trace=draws)", f"{P}/test_run.py"),
    ("bounds/diffusion.py", "return (term / density).mean(0)", "return term.mean(0)", f"{D}/test_bound.py"),
    ("bounds/diffusion.py", "term = count * _layer(", "term = (count + 1) * _layer(", f"{D}/test_bound.py"),
    ("bounds/diffusion.py", "return torch.rand(shape, dtype=x.dtype, device=x.device)\n        count",
     "return torch.rand(shape, dtype=x.dtype, device=x.device) ** 2\n        count", f"{D}/test_bound.py"),
    ("diffusion/denoising.py", "torch.expm1(gamma - self.schedule(s))", "gamma - self.schedule(s)",
     f"{D}/test_bound.py"),
    ("diffusion/denoising.py", "(torch.log1p(excess) - excess / (1 + excess))", "torch.log1p(excess)",
     f"{D}/test_reverse.py"),
    ("diffusion/process.py", "of_x = other.alpha * variance_step", "of_x = self.alpha * variance_step",
     f"{D}/test_process.py"),
    ("diffusion/inpainting.py", "chosen = _resampled(torch.where(mask, layer.log_prob(path), 0.0).sum(dims))",
     "chosen = _resampled(torch.zeros_like(z.sum(dims)))", f"{D}/test_reverse.py"),
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
    ("problem/execute.py", "stack.enter_context(kept_buffers(programs.model, programs.guide))", "pass",
     f"{E}/test_one_evaluation.py"),
    ("problem/verbs.py", "with evaluating():", "if True:", f"{E}/test_one_evaluation.py"),
    ("problem/problem.py", "other = self._with(guide=guide)\n        other._indices = self._indices",
     "other = self._with(guide=guide)", f"{E}/test_one_evaluation.py"),
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
    ("factorized/compare.py", "moves = moves - weights + 1 / len(weights)", "moves = moves - weights",
     f"{F}/test_weighted.py"),
    ("factorized/guide.py", "loc = loc + (self.gain @ torch.cat(free, -1)[..., None])[..., 0]", "loc = loc + 0.0",
     f"{F}/test_weighted.py"),
    ("diagnostics/calibration.py", "scale = together.std(0)", "scale = together[1:].std(0)",
     "tests/diagnostics/test_calibration.py"),
    ("diagnostics/moments.py", "np.log((sd / weighted_sd).values", "np.log((sd / sd).values",
     "tests/diagnostics/test_diagnose.py"),
    ("diagnostics/moments.py", "0.5 * np.sqrt(spread / count) / variance", "0.0 * variance",
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
    ("weights/means.py", "-(2 * log_weights.log_softmax(dim))", "2 * log_weights.logsumexp(dim) - (2 * log_weights)",
     W),
    ("weights/means.py", "top.isnan() | (top == torch.inf)", "top == torch.inf", W),
    ("weights/chunks.py", "+ [rest] * (rest > 0)", "+ [rest]", W),
]  # fmt: skip


def main() -> None:
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(word in m[0] or word in m[1] for word in words)]
    alive = []
    with tempfile.TemporaryDirectory() as copy:
        for part in ("pyro_hvae", "tests", "conftest.py", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, Path(copy) / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        for name, line, broken, tests in chosen:
            path = Path(copy) / "pyro_hvae" / name
            sound = path.read_text()
            shown = f"{name}: {line.splitlines()[0].strip()}"
            if line not in sound:
                alive.append(shown)
                print(f"NO SUCH LINE  {shown}", flush=True)
                continue
            path.write_text(sound.replace(line, broken, 1))
            run = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-x",
                    "-q",
                    "-p",
                    "no:cacheprovider",
                    "-m",
                    "not slow",
                    *tests.split(),
                ],
                cwd=copy,
                env={**os.environ, "PYTHONPATH": copy, "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            path.write_text(sound)
            failed = [word.split(" - ")[0] for word in run.stdout.splitlines() if word.startswith("FAILED")]
            if run.returncode != 1 or not failed:
                alive.append(shown)
            print(f"{'SURVIVED' if not failed else 'seen'}  {shown}  {failed[0] if failed else ''}", flush=True)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants were seen")
    if alive:
        sys.exit(1)


if __name__ == "__main__":
    main()
