"""Whitening: against scikit-learn's Ledoit-Wolf, on both sides of n = g, what it is for, and what it refuses."""
import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from perturb_research.core import Problem
from perturb_research.data.whitening import noise_whitening, within

RNG = np.random.default_rng(0)


def noise(n, genes=40):
    "Rows with strong common directions, and the covariance that they have."
    mixed = np.random.default_rng(1).normal(size=(5, genes)) * 2
    return RNG.normal(size=(n, 5)) @ mixed + RNG.normal(size=(n, genes)), mixed.T @ mixed + np.eye(genes)


@pytest.mark.parametrize('n', [10, 39, 40, 41, 400])
@pytest.mark.parametrize('centre', [False, True])
def test_is_the_root_of_the_inverse_of_scikit_learns_covariance(n, centre):
    rows = noise(n)[0] + 3 * centre
    reference, mine = LedoitWolf(assume_centered=not centre).fit(rows), noise_whitening(rows, centre=centre)
    assert mine.shrinkage == pytest.approx(reference.shrinkage_, rel=1e-9)
    np.testing.assert_allclose(mine.W @ reference.covariance_ @ mine.W, np.eye(40), atol=1e-9)
    np.testing.assert_allclose(mine.apply(rows), (rows - mine.mean) @ mine.W, atol=1e-9)
    np.testing.assert_allclose(mine.W, mine.W.T, atol=1e-12)


def test_noise_becomes_round():
    seen, unseen = noise(5000)[0], noise(5000)[0]
    assert abs(np.cov(unseen.T) - np.eye(40)).max() > 2
    np.testing.assert_allclose(np.cov(noise_whitening(seen, centre=True).apply(unseen).T), np.eye(40), atol=.15)


def test_full_shrinkage_only_scales():
    rows = noise(20)[0]
    found = noise_whitening(rows, shrinkage=1)
    np.testing.assert_allclose(found.W, np.eye(40) / np.sqrt((rows**2).mean()), atol=1e-12)


def test_order_of_rows_and_units_of_genes_do_not_matter_where_they_should_not():
    rows, asked = noise(15)[0], noise(7)[0]
    a, b, c = (noise_whitening(r).apply(asked) for r in (rows, rows[::-1], 5 * rows))
    np.testing.assert_allclose(a, b, atol=1e-9)
    np.testing.assert_allclose(a, 5 * c, atol=1e-9)


def test_within_has_the_covariance_of_one_row():
    truth = noise(2)[1]
    group = np.repeat(np.arange(6000), RNG.integers(1, 4, 6000))
    residuals = within(noise(len(group))[0] + RNG.normal(size=(6000, 40))[group] * 9, group)
    counts = np.bincount(group)
    assert len(residuals) == counts[counts > 1].sum()
    assert abs(residuals.T @ residuals / len(residuals) - truth).max() < .08 * truth.max()
    assert within([[1.], [2.]], ['a', 'b']).shape == (0, 1)


def test_five_thousand_genes_need_no_matrix_of_all_genes():
    rows = RNG.normal(size=(60, 5000))
    found = noise_whitening(rows)
    assert found.V.shape == (5000, 60) and found.apply(rows[:3]).shape == (3, 5000)


@pytest.mark.parametrize('residuals, named, said', [
    (np.zeros((5, 3)), {}, 'all zero'),
    (np.ones((1, 3)), {}, 'at least 2 rows'),
    (np.ones(3), {}, 'at least 2 rows'),
    ([[1, np.nan], [2, 3]], {}, '1 values of the residuals are NaN'),
    (np.eye(3), {'shrinkage': 2}, "'shrinkage' is 2"),
    (np.eye(2, 5), {'shrinkage': 0}, '2 independent residuals for 5 genes'),
])
def test_refuses(residuals, named, said):
    with pytest.raises(Problem, match=said): noise_whitening(residuals, **named)


def test_refuses_other_genes():
    with pytest.raises(Problem, match='expected 40 genes'): noise_whitening(noise(9)[0]).apply(np.ones((2, 3)))
    with pytest.raises(Problem, match='2 names for 3 rows'): within(np.ones((3, 1)), ['a', 'b'])
