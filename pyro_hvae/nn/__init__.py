r"""Networks for kernels and denoisers; each takes any number of leading dims.

A chain calls its networks on values of shape (particles..., data..., event...). A linear layer takes them unchanged; a
convolution needs one batch dim, so the convolutional networks here flatten the leading dims before and
restore them after, as :class:`Flattened` does for any network. No network here normalises over the
batch: batch normalisation couples the data of a minibatch, so that a bound is no longer a sum over data.

**Time.** A denoiser gets :math:`\gamma = -\log SNR` of its input as sine features

.. math::
    e(\gamma) = (\sin \omega_1 \gamma, \dots, \cos \omega_1 \gamma, \dots),\qquad \omega_i = 2 \pi / P_i,
    \qquad P_i \text{ geometric from 100 to 1}

so that the slowest pair is nearly linear over the range of a schedule and the fastest resolves neighbouring layers.

A denoiser of categories gets :math:`\gamma = \log b - \log a`, a the probability that an entry is still the datum's.

**Initial weights.** :func:`xavier_` of a network, and ``MLP(..., xavier=True)``, draw weights with variance 2 / (fan
in + fan out), biases zero, as in Importance Weighted Autoencoders (Burda, Grosse and Salakhutdinov, 2016); their
decoder's output bias starts at the logit of the training data's mean, which is :func:`logit_of_mean`.
"""

from pyro_hvae.nn.denoisers import DenoisingMLP, SignDenoiser, TimeEmbedding, UNet
from pyro_hvae.nn.images import ConvDecoder, ConvEncoder
from pyro_hvae.nn.layers import MLP, Flattened, logit_of_mean, xavier_
from pyro_hvae.nn.tables import TableEncoder
from pyro_hvae.nn.tokens import TokenMLP, TokenTransformer, TokenUNet

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "DenoisingMLP",
    "Flattened",
    "SignDenoiser",
    "TableEncoder",
    "TimeEmbedding",
    "TokenMLP",
    "TokenTransformer",
    "TokenUNet",
    "UNet",
    "logit_of_mean",
    "xavier_",
]
