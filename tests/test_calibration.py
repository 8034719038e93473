"""Intervals that cover, and ceilings that are right where the truth is known."""
from pathlib import Path

import numpy as np
import pytest

from perturb_research.core import Problem
from perturb_research.evaluate.calibration import AGREEMENTS, bootstrap_interval, bootstrap_ratio, ceiling, noise_free, spearman_brown, with_halves
from perturb_research.evaluate.metrics import score

CARPOOL = Path(__file__).parents[2]/'shared'/'data'/'carpool'/'carpool_effects.h5ad'


def test_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    inside = [low <= 1 <= high for low, high in (bootstrap_interval(rng.gamma(2, .5, size=50), rng, draws=400) for _ in range(400))]
    assert .90 <= np.mean(inside) <= .98
    narrow = bootstrap_interval(rng.normal(size=50), rng, level=.5)
    assert narrow[1] - narrow[0] < .3


def test_ratio_covers_and_is_paired():
    rng, inside, widths = np.random.default_rng(1), [], []
    for _ in range(300):
        size = rng.gamma(4, 1, size=50)
        errors = size * rng.normal(.8, .05, size=50)
        low, high = bootstrap_ratio(errors, size, rng, draws=300)
        inside.append(low <= .8 <= high)
        widths.append(high - low)
    assert .90 <= np.mean(inside) <= .985
    assert np.mean(widths) < .06  # unpaired resampling would give about .4


def test_repeats_are_averaged_first():
    values = np.random.default_rng(2).normal(size=(30, 4))
    expected = bootstrap_interval(values.mean(1), np.random.default_rng(3))
    assert bootstrap_interval(values, np.random.default_rng(3)) == pytest.approx(expected)
    uneven = values.copy()
    uneven[:15, 1:] = np.nan  # in one repeat only
    expected = bootstrap_interval(np.r_[values[:15, 0], values[15:].mean(1)], np.random.default_rng(3))
    assert bootstrap_interval(uneven, np.random.default_rng(3)) == pytest.approx(expected)


def test_same_generator_same_interval():
    values = np.arange(20.)
    assert bootstrap_interval(values, np.random.default_rng(5)) == bootstrap_interval(values, np.random.default_rng(5))


def test_intervals_refuse_and_admit():
    rng = np.random.default_rng(0)
    assert np.isnan(bootstrap_interval([3.], rng)).all() and np.isnan(bootstrap_ratio([3.], [2.], rng)).all()
    for bad in ([], [1, np.nan], np.full((3, 2), np.nan)):
        with pytest.raises(Problem, match='without any number'): bootstrap_interval(bad, rng)
    with pytest.raises(Problem, match='same conditions'): bootstrap_ratio([1., 2], [1., 2, 3], rng)
    with pytest.raises(Problem, match='zero everywhere'): bootstrap_ratio([1., 2], [0., 0], rng)


def test_spearman_brown():
    np.testing.assert_allclose(spearman_brown(np.array([0, .5, 1, -.3])), [0, 2 / 3, 1, 0])


def screen(n=60, g=1500, noise=1., shared=0., seed=0):
    "Signal and two halves with noise of a known size; `shared` is noise of controls that both halves have in common."
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(n, g)) * rng.uniform(.5, 2, size=(n, 1)) + .7 * rng.normal(size=g)
    common = shared * rng.normal(size=(n, g))
    return signal, *(signal + common + noise * rng.normal(size=(n, g)) for _ in range(2))


@pytest.mark.parametrize('noise', [.3, 1., 2.])
def test_ceilings_where_the_truth_is_known(noise):
    signal, half1, half2 = screen(noise=noise)
    given = dict(train_mean=signal.mean(0), conditions=range(60))
    got, remark = ceiling(half1, half2, **given)
    means = got.groupby(['row', 'metric'])['value'].mean()
    for row, truth in (('noise_free', half2), ('noise_free_both', (half1 + half2) / 2)):
        truly = score(signal, truth, **given).groupby('metric')['value'].mean()
        for metric in AGREEMENTS: assert means[row, metric] == pytest.approx(truly[metric], abs=.015)
        for metric in ('l2', 'rmse'): assert means[row, metric] == pytest.approx(truly[metric], rel=.02)
    assert means['noise_free_both', 'l2'] == pytest.approx(noise * np.sqrt(1500 / 2), rel=.02)
    assert remark == '60 of 60 conditions have halves'


def test_shared_controls_raise_the_ceiling_and_are_flagged():
    signal, half1, half2 = screen(shared=1.)
    given = dict(train_mean=signal.mean(0), conditions=range(60), names=['pearson'])
    got, remark = ceiling(half1, half2, shared_controls=True, **given)
    truly = score(signal, half2, **given)['value'].mean()
    assert got.loc[got['row'] == 'noise_free', 'value'].mean() > truly + .05
    assert 'share controls: the agreement is too high' in remark


def test_conditions_without_halves_are_left_out_and_counted():
    signal, half1, half2 = screen(n=10, g=50)
    half1[2], half2[5, 7] = np.nan, np.nan
    got, remark = ceiling(half1, half2, train_mean=signal.mean(0), conditions=[f'c{i}' for i in range(10)], names=['direction', 'l2'])
    assert remark.startswith('8 of 10') and not {'c2', 'c5'} & set(got['condition'])
    assert got.groupby('row').size().to_dict() == {'noise_free': 8, 'noise_free_both': 8, 'replicate': 16}
    assert got['value'].notna().all() and with_halves(half1, half2).sum() == 8
    only, _ = ceiling(half1, half2, train_mean=signal.mean(0), conditions=range(10), names=['direction'])
    assert set(only['row']) == {'replicate'}
    with pytest.raises(Problem, match='none of 10 conditions'): ceiling(half1 * np.nan, half2, train_mean=signal.mean(0), conditions=range(10))


def test_noise_free_says_what_it_cannot_estimate():
    with pytest.raises(Problem, match='no estimate'): noise_free('pearson_top20', .5)


@pytest.mark.skipif(not CARPOOL.exists(), reason='public data not at hand')
def test_carpool_ceiling_as_published():
    import anndata as ad
    screen = ad.read_h5ad(CARPOOL)
    got, remark = ceiling(screen.layers['half1'], screen.layers['half2'], train_mean=screen.X.mean(0), conditions=screen.obs_names, shared_controls=True)
    means = got.groupby(['row', 'metric'])['value'].mean()
    assert remark.startswith('118 of 146')
    assert means['replicate', 'pearson'] == pytest.approx(.84, abs=.01)  # reference/feasibility.md
    assert means['noise_free_both', 'pearson'] == pytest.approx(.95, abs=.01)
