"""Linear probes against scikit-learn's solvers and the conditions of a minimum."""

import numpy as np
import pytest
from sklearn import datasets, linear_model

from tokjax.train.probes import logistic, ridge


@pytest.fixture(scope="module")
def digits():
    x, y = datasets.load_digits(return_X_y=True)
    return (3 * x + 50).astype(np.float32), y.astype(np.int32)  # corner pixels never change


def test_logistic_is_scikit_learns(digits):
    x, y = digits
    l2 = 1e-2
    probe = logistic(x, y, 10, l2=l2, iterations=500, tolerance=1e-6)
    scaled = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    reference = linear_model.LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=2000).fit(scaled, y)
    mine = np.asarray(probe(x))
    np.testing.assert_allclose(
        mine - mine.mean(1, keepdims=True), reference.decision_function(scaled), atol=2e-2, rtol=1e-3
    )
    again = logistic(x, y, 10, l2=l2, iterations=500, tolerance=1e-6)
    np.testing.assert_array_equal(probe.kernel, again.kernel)


def test_a_class_without_rows_is_never_chosen(digits):
    x, y = digits
    chosen = np.asarray(logistic(x[y < 4], y[y < 4], 6)(x)).argmax(1)
    assert set(chosen) <= {0, 1, 2, 3} and (chosen == y)[y < 4].mean() > 0.99


def test_ridge_is_scikit_learns(digits):
    x, y = digits
    targets = np.stack([y, x[:, 20] * y], 1)
    probe = ridge(x, targets, l2=0.1)
    scaled = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    reference = linear_model.Ridge(alpha=0.1 * len(x)).fit(scaled, targets)
    np.testing.assert_allclose(probe(x), reference.predict(scaled), rtol=1e-3, atol=5e-3)


def test_bad_input_is_refused(digits):
    x, y = digits
    with pytest.raises(ValueError, match="same number of rows"):
        ridge(x, y[:5, None])
    with pytest.raises(ValueError, match="finite"):
        logistic(np.full((3, 2), np.nan), np.zeros(3, int), 2)
    with pytest.raises(ValueError, match=r"labels must be \[n\] in 0..8"):
        logistic(x, y, 9)
    with pytest.raises(ValueError, match="l2 must be above 0"):
        ridge(x, y[:, None], l2=0.0)
