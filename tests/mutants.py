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
B, T, D, E, F = "tests/bounds", "tests/traces", "tests/diffusion", "tests/evidence", "tests/factorized"

# file in the package, line, broken line, tests
MUTANTS = [
    ("bounds/importance.py", "log_weights.logsumexp(0) - math.log(log_weights.shape[0])\n\n    def refusals",
     "log_weights.logsumexp(0)\n\n    def refusals", f"{B}/test_importance.py"),
    ("bounds/importance.py", "- math.log(log_weights.shape[0])) / power", "- math.log(log_weights.shape[0]))",
     f"{B}/test_importance.py"),
    ("bounds/importance.py", "return Estimate(value, value, inside.scale, shared=total), inside",
     "return Estimate(value, value, 1.0, shared=total), inside", f"{B}/test_subsampling.py"),
    ("bounds/importance.py", "if plate not in kept", "if False", f"{B}/test_subsampling.py"),
    ("bounds/upper.py", "- math.log(log_weights.shape[0])) / self.order", ") / self.order", f"{B}/test_upper.py"),
    ("bounds/upper.py", "(log_weights.softmax(0) * log_weights).sum(0)", "log_weights.mean(0)", f"{B}/test_upper.py"),
    ("bounds/gradients.py", "weights**2 * fold(through_draws", "weights * fold(through_draws",
     f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "+ weights * log_p)", "+ weights**2 * log_p)", f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "held = reading.replay(freeze=True, detach=False)\n    log_weights",
     "held = reading.replay(freeze=False, detach=False)\n    log_weights", f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "through_draws = reading.replay(freeze=True, detach=False)",
     "through_draws = reading.replay(freeze=True, detach=True)", f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "estimate.unsqueeze(0) - reduce(replaced)", "estimate.unsqueeze(0) + reduce(replaced)",
     f"{B}/test_gradients.py"),
    ("bounds/gradients.py", "others = (log_weights.sum(0, keepdim=True) - log_weights) / (count - 1)",
     "others = log_weights.mean(0, keepdim=True).expand_as(log_weights)", f"{B}/test_gradients.py"),
    ("bounds/elbo.py", "if name in found.broken or name not in reading.log_p:", "if name not in reading.log_p:",
     f"{B}/test_pyro_pitfalls.py {B}/test_elbo.py"),
    ("bounds/elbo.py", "divergences[name] = reading.weigh(p, divergence)",
     "divergences[name] = reading.reduce(divergence)", f"{B}/test_elbo.py {B}/test_programs.py"),
    ("bounds/wake.py", "weights = drawn.log_weights.softmax(0)", "weights = drawn.log_weights.softmax(-1)",
     f"{B}/test_wake.py"),
    ("bounds/wake.py", "return total(reading.log_p) + total(reading.log_q)", "return total(reading.log_p)",
     f"{B}/test_wake.py"),
    ("traces/reading.py", "        scale = user_scale(site, outside)", "        scale = 1.0",
     f"{B}/test_programs.py {B}/test_subsampling.py"),
    ("traces/reading.py", "value = scale_and_mask(value, scale, site[\"mask\"])",
     "value = scale_and_mask(value, scale, None)", f"{B}/test_programs.py {T}/test_reading.py"),
    ("traces/reading.py", "if site[\"is_observed\"] or site[\"fn\"].has_rsample:", "if site[\"is_observed\"]:",
     f"{B}/test_gradients.py"),
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
    ("reversal.py", "kept @ layer.covariance @ kept.mT + gain @ above.noise @ gain.mT",
     "kept @ layer.covariance @ kept.mT", "tests/test_reversal.py"),
    ("distributions.py", "return 0.5 * (square - p.event_shape[0]) + volume", "return 0.5 * square + volume",
     "tests/test_reversal.py"),
    ("evidence/annealed.py", "total = total + float(betas[t] - betas[t - 1]) * difference(state)",
     "total = total + float(betas[t]) * difference(state)", f"{E}"),
    ("evidence/annealed.py", "state = move(state, t - 1 if reverse else t)", "state = move(state, t)", f"{E}"),
    ("factorized/forward.py", "diagonal = matrix.diagonal(dim1=-2, dim2=-1)[..., index].log()",
     "diagonal = 0.9 * matrix.diagonal(dim1=-2, dim2=-1)[..., index].log()", f"{F}/test_exact.py"),
    ("factorized/forward.py", "centred = (flat - mean) * weights.sqrt()", "centred = (flat - mean) * weights",
     f"{F}/test_weighted.py"),
    ("factorized/forward.py", "index = index * len(support)", "index = index", f"{F}/test_exact.py"),
    ("factorized/families.py", "log_a = log_a - (log_a - a.digamma() - s) / (1 - a * torch.polygamma(1, a))",
     "log_a = log_a", f"{F}/test_weighted.py"),
    ("factorized/posterior.py", "log_q = torch.stack(at_all).logsumexp(0) - math.log(len(proposals))",
     "log_q = torch.stack(at_all).logsumexp(0)", f"{F}/test_weighted.py"),
    ("factorized/posterior.py", "0.5 * dims * math.log(2 * math.pi) - log_det", "0.5 * dims - log_det",
     f"{F}/test_exact.py"),
    ("factorized/posterior.py", "and bool(((there[0] - expected).abs() <= tolerance * height).all())", "",
     f"{F}/test_exact.py"),
    ("factorized/reverse.py", "index_add_(0, codes, others * log_joint)", "index_add_(0, codes, log_joint)",
     f"{F}/test_exact.py"),
    ("factorized/reverse.py", "better = elbo > best + 1e-12", "better = elbo < best - 1e-12", f"{F}/test_exact.py"),
    ("factorized/compare.py", "moves = moves - weights + 1 / len(weights)", "moves = moves - weights",
     f"{F}/test_weighted.py"),
    ("factorized/guide.py", "loc = loc + (self.gain @ torch.cat(known, -1)[..., None])[..., 0]", "loc = loc + 0.0",
     f"{F}/test_weighted.py"),
    ("psis.py", "gaps = np.diff(ordered[first])", "gaps = 0 * np.diff(ordered[first])", "tests/test_psis.py"),
    ("psis.py", "array_stats.psislw(-flat[row])", "array_stats.psislw(flat[row])", "tests/diagnostics"),
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
