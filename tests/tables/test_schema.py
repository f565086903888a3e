"""Frames as numbers, and the way back."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats as stats
import torch

from pyro_hvae.data import table
from pyro_hvae.tables import Schema


def patients():
    """A frame with each kind of column, some entries missing."""
    return pd.DataFrame(
        {
            "age": [31.5, np.nan, 60.25, 44.0],
            "smokes": pd.array([True, None, False, True], dtype="boolean"),
            "treated": [0, 1, 1, 0],
            "stage": pd.Categorical(["b", "a", None, "c"], categories=["b", "a", "c"], ordered=True),
            "region": ["north", "south", None, "west"],
            "visits": pd.array([0, 3, None, 12], dtype="Int64"),
            "born": [1980, 1990, 1955, 2001],
            "income": [100.0, 2000.0, 350.0, np.nan],
            "dose": [0.5, 2.0, 1.0, 4.0],
            "share": [0.25, 0.5, np.nan, 0.9],
            "size": pd.cut([1.0, 5.0, np.nan, 9.0], [0, 3, 6, 10]),
        },
        index=pd.Index(["ann", "bo", "cy", "di"], name="patient"),
    )


FAMILIES = {"income": "log_normal", "dose": "gamma", "share": "beta"}


class TestInference:
    def test_families(self):
        schema = table(patients(), FAMILIES).schema
        assert {column.name: column.family for column in schema.columns} == {
            "age": "student_t", "smokes": "bernoulli", "treated": "bernoulli", "stage": "ordinal",
            "region": "categorical", "visits": "negative_binomial", "born": "student_t", "income": "log_normal",
            "dose": "gamma", "share": "beta", "size": "ordinal",
        }  # fmt: skip
        assert schema["stage"].categories == ("b", "a", "c")
        assert schema["born"].whole
        assert not schema["age"].whole

    def test_numbers(self):
        """Standardised by the observed values; labels are codes."""
        rows = table(patients(), FAMILIES)
        x, seen = rows.x, ~torch.as_tensor(patients().isna().to_numpy())
        assert torch.equal(rows.mask, seen)
        for name in ("age", "born"):
            j = rows.schema.names.index(name)
            values = x[seen[:, j], j]
            torch.testing.assert_close(values.mean(), torch.tensor(0.0), atol=1e-12, rtol=0)
            torch.testing.assert_close(values.std(correction=0), torch.tensor(1.0))
        logs = x[seen[:, 7], 7].log()
        torch.testing.assert_close(logs.std(correction=0), torch.tensor(1.0))
        torch.testing.assert_close(x[:, 8].mean(), torch.tensor(1.0))
        assert x[seen[:, 3], 3].tolist() == [0.0, 1.0, 2.0]
        assert x[seen[:, 4], 4].tolist() == [0.0, 1.0, 2.0]
        assert x[~seen].tolist() == [0.0] * int((~seen).sum())

    def test_default_dtype(self):
        torch.set_default_dtype(torch.float32)
        assert table(patients(), FAMILIES).x.dtype == torch.float32

    @pytest.mark.parametrize(
        ("values", "family"),
        [
            ([0.0, 1.0, np.nan, 1.0], "bernoulli"),
            ([1, 2, 3, 7], "negative_binomial"),
            ([18, 30, 41, 22], "student_t"),
            ([0, 5, 2000, 3], "student_t"),
            (["a", None, "b", "a"], "bernoulli"),
            ([-1, 0, 1, 2], "student_t"),
            ([True, False, None, True], "bernoulli"),
        ],
    )
    def test_rules(self, values, family):
        assert table(pd.DataFrame({"a": values})).schema["a"].family == family


class TestWayBack:
    def test_the_frame_returns(self):
        frame = patients()
        again = table(frame, FAMILIES).frame()
        pd.testing.assert_frame_equal(again, frame)

    def test_new_rows_in_another_order_of_columns(self):
        rows = table(patients(), FAMILIES)
        again = table(patients()[rows.schema.names[::-1]].iloc[[2, 0]], schema=rows.schema)
        assert torch.equal(again.x, rows.x[[2, 0]])
        assert list(again.index) == ["cy", "ann"]

    def test_record_is_plain_data(self):
        import json

        rows = table(patients(), FAMILIES)
        record = json.loads(json.dumps(rows.schema.record()))
        again = table(patients(), schema=Schema.of_record(record))  # intervals became text and are recognised
        assert torch.equal(again.x, rows.x)
        without = patients().drop(columns="size")
        schema = table(without, FAMILIES).schema
        assert Schema.of_record(json.loads(json.dumps(schema.record()))) == schema

    def test_log_scale_is_the_jacobian(self):
        """Densities of the numbers, plus log_scale, are densities in the units of the frame."""
        frame = patients()[["age", "income", "dose"]].dropna()
        rows = table(frame, {"income": "log_normal", "dose": "gamma"})
        mean, sd = frame.age.mean(), frame.age.std(ddof=0)
        logs, dose = np.log(frame.income), frame.dose.mean()
        units = (
            stats.norm.logpdf(frame.age, mean, sd)
            + stats.lognorm.logpdf(frame.income, logs.std(ddof=0), scale=np.exp(logs.mean()))
            + stats.gamma.logpdf(frame.dose, 2.0, scale=dose)
        )
        x = rows.x.numpy()
        numbers = stats.norm.logpdf(x[:, 0]) + stats.lognorm.logpdf(x[:, 1], 1.0) + stats.gamma.logpdf(x[:, 2], 2.0)
        np.testing.assert_allclose(numbers + rows.schema.log_scale(rows.x).numpy(), units)
        nothing = rows.schema.log_scale(rows.x, torch.zeros_like(rows.mask))
        assert not nothing.any()


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "family", "message"),
        [
            ([1.0, -2.0], "gamma", r"-2 at index 1.*positive numbers"),
            ([0.0, 2.0], "log_normal", "positive numbers"),
            ([0.5, 1.0], "beta", "between 0 and 1"),
            ([1.5, 2.0], "poisson", "counts"),
            ([-1, 2], "negative_binomial", "counts"),
            ([1, 2, 3], "bernoulli", "has 3 values"),
            (["a", "b"], "gaussian", "needs numbers"),
            ([1, 2], "normal", "must be one of"),
            ([np.nan, np.nan], None, "no value"),
            ([3.0, 3.0], None, "one value 3.0"),
            ([1.0, np.inf], None, "infinite at index 1"),
            ([str(i) for i in range(60)], None, "60 different labels"),
            (pd.to_datetime(["2020-01-01", "2021-01-01"]), None, "days since"),
            ([1 + 2j, 3j], None, "complex"),
        ],
    )
    def test_columns(self, values, family, message):
        with pytest.raises((TypeError, ValueError), match=message):
            table(pd.DataFrame({"a": values}), None if family is None else {"a": family})

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda frame: table(frame.to_numpy()), "takes a pandas.DataFrame"),
            (lambda frame: table(frame.set_axis(range(11), axis=1)), "is text"),
            (lambda frame: table(frame[["age", "age"]]), "a name of its own"),
            (lambda frame: table(frame.iloc[:0]), "at least one row"),
            (lambda frame: table(frame, {"agge": "gaussian"}), "agge"),
            (lambda frame: table(frame.drop(columns="age"), schema=table(frame).schema), r"lacks \['age'\]"),
            (lambda frame: table(frame.assign(new=1), schema=table(frame).schema), r"besides \['new'\]"),
            (lambda frame: table(frame, {"age": "gaussian"}, schema=table(frame).schema), "one of the two"),
            (lambda frame: table(frame.assign(region="east"), schema=table(frame).schema), "'east' at index 'ann'"),
        ],
    )
    def test_frames(self, make, message):
        with pytest.raises((TypeError, ValueError), match=message):
            make(patients())
