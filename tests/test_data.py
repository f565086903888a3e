"""Data: files read back what was written, bad ones are named, and an epoch is a permutation that can be resumed."""

import builtins
import gzip
import struct
import time

import numpy as np
import pytest
import torch

from pyro_hvae.data import Batches, binarize, check_finite, digits, idx_folder, read_idx

CODES = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}


def idx_bytes(array):
    header = bytes([0, 0, CODES[array.dtype.name], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, size in (("train", 7), ("t10k", 3)):
        images = rng.integers(0, 256, (size, 4, 5), dtype=np.uint8)
        labels = np.arange(size, dtype=np.uint8)
        compress = gzip.compress if part == "train" else bytes
        ending = ".gz" if part == "train" else ""
        (tmp_path / f"{part}-images-idx3-ubyte{ending}").write_bytes(compress(idx_bytes(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte{ending}").write_bytes(compress(idx_bytes(labels)))
    return tmp_path


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path, dtype, compress):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    path = tmp_path / "file"
    path.write_bytes(compress(idx_bytes(array)))
    back = read_idx(path)
    assert back.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(back, array)


def test_folder_scales_and_shapes(folder):
    data = idx_folder(folder)
    raw = read_idx(folder / "train-images-idx3-ubyte.gz")
    torch.testing.assert_close(data.train, torch.from_numpy(raw.reshape(7, 20) / 255.0))
    assert data.test.shape == (3, 20)
    assert data.train_labels.tolist() == list(range(7))
    assert idx_folder(folder, flat=False).train.shape == (7, 1, 4, 5)


def test_folder_without_labels(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    assert idx_folder(folder).test_labels is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 zip", "not an IDX file: it starts with 50 4b 03 04"),
        (b"", "not an IDX file: it starts with nothing"),
        (bytes([0, 0, 7, 1]), "unknown IDX type 0x07; the types are 0x08 uint8"),
        (bytes([0, 0, 8, 3, 0, 0]), "ends within its header: 6 bytes, where 3 dims need 16"),
        (idx_bytes(np.zeros((2, 2, 2), np.uint8))[:-3], r"truncated: 21 bytes.*shape \(2, 2, 2\), uint8\) needs 24"),
        (idx_bytes(np.zeros((2, 2, 2), np.uint8)) + b"\0", "too long: 25 bytes"),
        (gzip.compress(idx_bytes(np.zeros((9, 9, 9), "u1")), mtime=0)[:-12], "gzip file that can't be decompressed"),
        (idx_bytes(np.zeros((2, 4, 5), np.float32)), r"holds float32 of shape \(2, 4, 5\); images are uint8"),
        (idx_bytes(np.zeros((2, 20), np.uint8)), r"holds uint8 of shape \(2, 20\)"),
        (idx_bytes(np.zeros((2, 4, 5), np.uint8)), r"labels of shape \(7,\) for 2 images"),
    ],
)
def test_bad_files_are_named(folder, content, message):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        idx_folder(folder)
    assert "train-" in str(caught.value)


def test_missing_folder_and_missing_file(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        idx_folder(tmp_path / "nowhere")
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"no t10k-images\* or test-images\* in .* has t10k-labels"):
        idx_folder(folder)


def test_digits_are_split_the_same_way_everywhere():
    data = digits()
    assert data.train.shape == (1437, 64)
    assert data.test.shape == (360, 64)
    assert data.train.dtype == torch.float64
    levels = torch.unique(data.train * 16)
    assert levels.tolist() == list(range(17))
    assert digits(flat=False).test.shape == (360, 1, 8, 8)
    assert data.test_labels[:3].tolist() == [0, 5, 0]
    assert torch.bincount(data.test_labels, minlength=10).min() > 20


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pyro-hvae\[demo\]"):
        digits()


def test_binarize_draws_with_the_right_probability_and_anew():
    g = torch.rand(20)
    n = 20_000
    draws = binarize(g.expand(n, 20))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((draws.mean(0) - g).abs() < 4.5 * (g * (1 - g) / n).sqrt()).all()
    assert not torch.equal(binarize(g), binarize(g))
    first = binarize(g, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, binarize(g, generator=torch.Generator().manual_seed(3)))
    assert binarize(torch.tensor([0.4, 0.6]), threshold=0.5).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_binarize_in_all_precisions(dtype):
    n = 400_000
    g = torch.full((n,), 0.001).to(dtype)
    draws, probability = binarize(g), float(g[0])
    assert draws.dtype == dtype
    assert abs(float(draws.double().mean()) - probability) < 4 * (probability / n) ** 0.5
    ends = binarize(torch.tensor([0.0, 1.0], dtype=dtype).expand(n, 2)).double().mean(0)
    assert ends.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_binarize_refuses_what_is_no_grey_value(bad):
    x = torch.full((3, 4), 0.5)
    x[1, 2] = x[2, 0] = bad
    with pytest.raises(
        ValueError, match=rf"2 of 12 values of x are outside \[0, 1\]; the first is {bad:g} at index \(1, 2\)"
    ):
        binarize(x)


def test_check_finite_counts_and_respects_the_mask():
    x = torch.zeros(2, 3)
    x[0, 1], x[1, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"2 of 6 values of x are NaN or infinite; the first is nan at index \(0, 1\)"):
        check_finite(x)
    check_finite(x, mask=torch.tensor([[True, False, True], [False, True, True]]))


@pytest.mark.parametrize(
    ("n", "batch_size", "drop_last"), [(10, 3, False), (10, 3, True), (9, 3, False), (2, 5, False)]
)
def test_an_epoch_is_a_permutation(n, batch_size, drop_last):
    batches = Batches(torch.arange(n), torch.arange(n) * 2, batch_size=batch_size, drop_last=drop_last)
    epochs = []
    for _ in range(3):
        parts = list(batches)
        assert len(parts) == len(batches)
        assert all(torch.equal(2 * x, y) for x, y in parts)
        seen = torch.cat([x for x, _ in parts]).tolist()
        assert len(set(seen)) == len(seen) == (n // batch_size * batch_size if drop_last else n)
        epochs.append(tuple(seen))
    assert len(set(epochs)) == len(epochs) or n == 2
    assert batches.epoch == 3


def test_order_depends_on_the_seed_alone():
    def order(seed):
        return torch.cat(list(Batches(torch.arange(50), batch_size=7, seed=seed))).tolist()

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("stop", range(1, 9))
def test_resumed_order_is_the_order_never_interrupted(stop):
    def fresh():
        return Batches(torch.arange(10), batch_size=3, seed=5)

    whole = fresh()
    expected = [b.tolist() for _ in range(3) for b in whole]
    first, seen = fresh(), []
    while len(seen) < stop:
        for batch in first:
            seen.append(batch.tolist())
            if len(seen) == stop:
                state = first.state_dict()
                break
    second = fresh()
    second.load_state_dict(state)
    while second.epoch < 3:
        seen += [batch.tolist() for batch in second]
    assert seen == expected


def test_leaving_an_epoch_early_starts_a_new_one():
    batches = Batches(torch.arange(10), batch_size=3)
    next(iter(batches))
    assert len(list(batches)) == 4


def test_named_tensors_come_as_a_dict_and_x_is_transformed():
    x, context = torch.full((6, 2), 0.5), torch.arange(6.0)
    batches = Batches(context=context, x=x, batch_size=4, shuffle=False, transform=binarize)
    batch = next(iter(batches))
    assert set(batch) == {"context", "x"}
    assert batch["context"].tolist() == [0, 1, 2, 3]
    assert set(batch["x"].unique().tolist()) <= {0.0, 1.0}
    assert batches.data_size == len(batches.dataset) == 6


def test_missing_entries_may_be_nan():
    x = torch.tensor([[1.0, float("nan")]])
    Batches(x=x, mask=torch.tensor([[True, False]]), batch_size=1)
    with pytest.raises(ValueError, match=r"1 of 2 values of x are NaN .* at index \(0, 1\)"):
        Batches(x=x, mask=torch.tensor([[True, True]]), batch_size=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(batch_size=2), "either by position or by name"),
        (lambda: Batches(torch.zeros(2), x=torch.zeros(2), batch_size=2), "either by position or by name"),
        (lambda: Batches(torch.zeros(2), torch.zeros(3), batch_size=2), "same number of data; they have .*2.*3"),
        (lambda: Batches(torch.zeros(0, 2), batch_size=2), "no data: N = 0"),
        (lambda: Batches(torch.zeros(2), batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: Batches(torch.zeros(2), batch_size=3, drop_last=True), "leaves no batch: batch_size is 3, N is 2"),
        (lambda: Batches(torch.zeros(9), batch_size=3).load_state_dict({"position": 5}), "is at batch 5.*has 3"),
    ],
)
def test_batches_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_batches_cost_little():
    """One gather a batch: 20,000 images must pass in well under the 10 s that collating one by one would take."""
    batches = Batches(torch.zeros(20_000, 784, dtype=torch.float32), batch_size=100)
    begin = time.perf_counter()
    assert sum(len(x) for x in batches) == 20_000
    assert time.perf_counter() - begin < 5


def test_fit_takes_batches():
    from pyro_hvae.bounds import TraceELBO
    from pyro_hvae.models import vae
    from pyro_hvae.training import fit

    torch.manual_seed(0)
    model, guide = vae(6, 2, hidden=(4,))
    before = [p.detach().clone() for p in model.parameters()]
    batches = Batches(x=torch.full((10, 6), 0.5), batch_size=4, transform=binarize)
    result = fit(model, guide, batches, bound=TraceELBO(), epochs=2, progress=False)
    assert result.steps == 6
    assert batches.epoch == 2
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
