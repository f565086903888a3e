r"""Images as tensors of grey values in [0, 1], and their binarisation.

**Grey pixels and Bernoulli.** A grey value g in [0, 1] isn't in the support of a Bernoulli likelihood. Published
likelihoods of MNIST come from images redrawn as x ~ Bernoulli(g) at every use in training; that is
``transform=binarize``, in :class:`~pyro_hvae.data.Batches` or in ``fit``. Likelihoods of images binarised once, or by a
threshold, can't be compared with them.

The IDX format: two zero bytes, a byte for the type, a byte for the number of dims, the sizes as big-endian 32-bit
integers, then the values in C order (The MNIST database, LeCun, Cortes and Burges, 1998).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_hvae.arguments import check_number

__all__ = ["Split", "binarize", "check_finite", "check_unit_interval", "digits", "idx_folder", "read_idx"]

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class Split(NamedTuple):
    """Images to train on and images held out.

    Attributes:
        train: (N, D) or (N, C, H, W), values in [0, 1], default dtype.
        test: (M, D) or (M, C, H, W).
        train_labels: (N,) int64, or ``None``.
        test_labels: (M,) int64, or ``None``.
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None


def digits(*, flat: bool = True) -> Split:
    """Load scikit-learn's handwritten digits: 8 x 8 pixels with 17 grey levels, scaled to [0, 1].

    Every fifth image is held out: 1437 to train on, 360 to test, the same on every machine.

    Args:
        flat: images as vectors of 64; otherwise as (1, 8, 8).

    Raises:
        ImportError: without scikit-learn, which the extra ``demo`` installs.

    Reference: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (Alpaydin and Kaynak, 1998).

    Example:
        >>> data = digits()
        >>> data.train.shape, data.test.shape, float(data.train.max())
        (torch.Size([1437, 64]), torch.Size([360, 64]), 1.0)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits() reads images that come with scikit-learn, which is not installed: pip install 'pyro-hvae[demo]'"
        ) from error
    raw = load_digits()
    images = torch.as_tensor(raw.images / 16.0, dtype=torch.get_default_dtype())
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    images = images.reshape(len(images), -1) if flat else images.unsqueeze(1)
    held_out = torch.arange(len(images)) % 5 == 0
    return Split(images[~held_out], images[held_out], labels[~held_out], labels[held_out])


def idx_folder(path: str | Path, *, flat: bool = True) -> Split:
    """Load a folder of images in MNIST's format, grey values scaled to [0, 1].

    The names of the files are ``train-images*`` and ``t10k-images*`` (or ``test-images*``), and of optional labels
    ``train-labels*`` and so on; a file ending in ``.gz`` is decompressed.

    Args:
        path: the folder.
        flat: images as vectors of H W; otherwise as (1, H, W).

    Raises:
        FileNotFoundError: if the folder or one of the two image files is missing, with the files there.
        ValueError: for a file that :func:`read_idx` refuses, images that are not (N, H, W) bytes, or labels that
            don't match the images in number.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 1, 2)
        >>> for part in ("train", "t10k"):
        ...     _ = (folder / f"{part}-images-idx3-ubyte").write_bytes(header + bytes([0, 255, 51, 102]))
        >>> idx_folder(folder).train
        tensor([[0.0000, 1.0000],
                [0.2000, 0.4000]])
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: idx_folder needs the one with the IDX files.")
    train, train_labels = _part(folder, ("train",), flat)
    test, test_labels = _part(folder, ("t10k", "test"), flat)
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"the training images of {str(folder)!r} have shape {tuple(train.shape[1:])} and the test images "
            f"{tuple(test.shape[1:])}: they must be alike."
        )
    return Split(train, test, train_labels, test_labels)


def read_idx(path: str | Path) -> np.ndarray:
    """Read one IDX file, plain or compressed by gzip.

    Returns:
        The array with the file's own shape and type, in the machine's byte order.

    Raises:
        ValueError: if the file is not IDX (with its first bytes), has an unknown type, or is shorter or longer
            than its header says.
    """
    path = Path(path)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a gzip file that can't be decompressed ({error}): copy it again.") from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ValueError(
            f"{path} is not an IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}, where 00 00, a type and a "
            "number of dims were expected."
        )
    code, num_dims = raw[2], raw[3]
    if code not in _IDX_TYPES:
        types = ", ".join(f"{key:#04x} {np.dtype(name).name}" for key, name in _IDX_TYPES.items())
        raise ValueError(f"{path} has the unknown IDX type {code:#04x}; the types are {types}.")
    start = 4 + 4 * num_dims
    if len(raw) < start:
        raise ValueError(f"{path} ends within its header: {len(raw)} bytes, where {num_dims} dims need {start}.")
    shape = struct.unpack(f">{num_dims}I", raw[4:start])
    dtype = np.dtype(_IDX_TYPES[code])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "too long"
        raise ValueError(
            f"{path} is {state}: {len(raw)} bytes, where its header (shape {shape}, {dtype.name}) needs {expected}."
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def binarize(x: Tensor, *, threshold: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    r"""Turn grey values into zeros and ones: x ~ Bernoulli(g) anew at each call, or x = 1 where g > threshold.

    To binarise once, call it once; for a new draw at every use of an image, pass the function itself:
    ``fit(..., transform=binarize)`` or ``Batches(..., transform=binarize)``.

    Args:
        x: grey values g in [0, 1], any shape.
        threshold: cut there and draw nothing.
        generator: of the draw; by default torch's own.

    Raises:
        ValueError: for NaN or values outside [0, 1], with their count and the first index; checked on the CPU only,
            where it costs no synchronisation.

    Reference: On the quantitative analysis of deep belief networks (Salakhutdinov and Murray, 2008).

    Example:
        >>> binarize(torch.tensor([0.0, 0.4, 0.6, 1.0]), threshold=0.5)
        tensor([0., 0., 1., 1.])
        >>> draws = binarize(torch.full((10_000,), 0.3))
        >>> draws.unique().tolist(), abs(draws.mean().item() - 0.3) < 0.02
        ([0.0, 1.0], True)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}.")
    if threshold is not None:
        check_number("threshold", threshold, 0.0, 1.0)
    if x.device.type == "cpu":
        check_unit_interval(x)
    if threshold is not None:
        return (x > threshold).to(x.dtype)
    # torch.bernoulli takes four times as long on a CPU.  Half precision has too few uniform numbers.
    exact = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    uniform = torch.rand(x.shape, generator=generator, dtype=exact, device=x.device)
    return uniform.lt_(x).to(x.dtype)


def check_finite(x: Tensor, name: str = "x", mask: Tensor | None = None) -> None:
    """Refuse NaN and infinite values, except where a mask is False (nothing was observed).

    Raises:
        ValueError: with the count of such values, the first one and its index.
    """
    if not x.is_floating_point():
        return
    bad = ~x.isfinite()
    if mask is not None:
        bad = bad & mask
    _refuse(bad, x, name, "NaN or infinite", "Drop those data, or mark the entries as missing by mask= (False there).")


def check_unit_interval(x: Tensor, name: str = "x") -> None:
    """Refuse values outside [0, 1], NaN included.

    Raises:
        ValueError: with the count of such values, the first one and its index.
    """
    if x.numel():
        low, high = torch.aminmax(x)  # one pass; NaN where there is one
        if low >= 0 and high <= 1:
            return
    _refuse(~((x >= 0) & (x <= 1)), x, name, "outside [0, 1]", "Scale grey levels by their largest, e.g. x / 255.")


def _part(folder: Path, prefixes: tuple[str, ...], flat: bool) -> tuple[Tensor, Tensor | None]:
    """Return the images of one part of a folder, and its labels if there are any."""
    image_file, label_file = _find(folder, prefixes, "images"), _find(folder, prefixes, "labels")
    if image_file is None:
        names = " or ".join(f"{prefix}-images*" for prefix in prefixes)
        files = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"no {names} in {str(folder)!r}, which has {files}.")
    raw = read_idx(image_file)
    if raw.dtype != np.uint8 or raw.ndim != 3:
        raise ValueError(f"{image_file} holds {raw.dtype.name} of shape {raw.shape}; images are uint8 (N, H, W).")
    images = torch.from_numpy(raw).to(torch.get_default_dtype()).div_(255.0)
    images = images.flatten(1) if flat else images.unsqueeze(1)
    if label_file is None:
        return images, None
    labels = read_idx(label_file)
    if labels.shape != (len(images),):
        raise ValueError(f"{label_file} holds labels of shape {labels.shape} for {len(images)} images.")
    return images, torch.from_numpy(labels.astype(np.int64))


def _find(folder: Path, prefixes: tuple[str, ...], kind: str) -> Path | None:
    for prefix in prefixes:
        files = sorted(file for file in folder.glob(f"{prefix}[-_.]{kind}*") if file.is_file())
        if files:
            return files[0]  # a plain file sorts before its .gz
    return None


def _refuse(bad: Tensor, x: Tensor, name: str, what: str, instead: str) -> None:
    count = int(bad.sum())
    if count:
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{count} of {x.numel()} values of {name} are {what}; "
            f"the first is {x[first].item():g} at index {first}. {instead}"
        )
