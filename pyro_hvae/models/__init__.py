r"""Ready-made pairs: functions that return (model, guide), built from the kernels and chains of this package.

For events of shape ``event_shape`` and latents z_1, ..., z_T of widths d_1, ..., d_T, all networks perceptrons:

- :func:`vae`: p(z_1) p(x | z_1) and q(z_1 | x);
- :func:`hvae`: p(z_T) prod p(z_{t-1} | z_t) p(x | z_1), and bottom-up q(z_1 | x) prod q(z_t | z_{t-1});
- :func:`ladder_vae`: the same model, and a guide that runs top-down and merges evidence with the model's prior;
- :func:`vdm`: the same model again, all transitions sharing one denoiser, and a guide without parameters;
- :func:`discrete_diffusion`: the same with noise on categories;
- :func:`latent_diffusion`: a VAE whose prior is a diffusion;
- :func:`table_vae`: a VAE of the rows of a DataFrame with missing entries, one family a column;
- :func:`deep_markov`, :func:`variational_rnn`: chains in time.

All weights start by Xavier's rule and all biases at zero. ``vae`` is ``hvae`` with one layer, parameter for
parameter. Every pair records on its programs how it was made, as plain
data: ``model.factory == {"factory": "pyro_hvae.models.hvae", "args": {...}}``.
"""

from pyro_hvae.chains.sequence_models import deep_markov, variational_rnn
from pyro_hvae.diffusion.pairs import discrete_diffusion, latent_diffusion, vdm
from pyro_hvae.models.tables import table_vae
from pyro_hvae.models.vae import PairOptions, hvae, ladder_vae, vae

__all__ = [
    "PairOptions",
    "deep_markov",
    "discrete_diffusion",
    "hvae",
    "ladder_vae",
    "latent_diffusion",
    "table_vae",
    "vae",
    "variational_rnn",
    "vdm",
]
