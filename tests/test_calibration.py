"""Intervals that cover, ceilings that are right where the truth is known, tests whose errors are as often as they say."""
import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturb_research.core import Problem
from perturb_research.evaluate.calibration import (AGREEMENTS, beats_null_share, bootstrap_interval, bootstrap_ratio, calibrated, ceiling, detectable_sentence,
                                                   duplicate_weight, dynamic_range_fraction, half_noise, hierarchical_bootstrap, holm, interpolated_duplicate,
                                                   minimum_detectable_difference, noise_free, paired_tests, scaled, score_array, sign_flip_p, spearman_brown, with_halves)
from perturb_research.evaluate.metrics import METRICS, score

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


def long(values, models=None, metric='l2', conditions=None):
    "Long table of scores of an array (perturbations, models) or (perturbations, seeds, models)."
    values = np.asarray(values, dtype=float)
    values = values[:, None] if values.ndim == 2 else values
    n, seeds, m = values.shape
    conditions = [f'P{i:03d}' for i in range(n)] if conditions is None else conditions
    at = np.indices(values.shape).reshape(3, -1)
    return pd.DataFrame(dict(condition=np.array(conditions)[at[0]], seed=at[1], model=np.array(models or [f'm{i}' for i in range(m)])[at[2]], metric=metric, value=values.ravel()))


def test_interpolated_duplicate_lies_between_and_never_sees_its_half2():
    rng = np.random.default_rng(0)
    half1, half2 = rng.normal(size=(2, 20, 300))
    mean, cells = rng.normal(size=300), rng.integers(20, 200, size=20)
    weight = duplicate_weight(half1, mean, half_noise(half1, half2, cells))
    blend = interpolated_duplicate(half1, mean, weight)
    assert ((weight >= 0) & (weight <= 1)).all()
    assert ((blend - mean) * (half1 - mean) >= 0).all() and (np.abs(blend - mean) <= np.abs(half1 - mean)).all()
    np.testing.assert_array_equal(interpolated_duplicate(half1, mean, np.ones_like(half1)), half1)
    np.testing.assert_array_equal(interpolated_duplicate(half1, mean, np.zeros_like(half1)), np.tile(mean, (20, 1)))
    for row in (0, 7):  # whatever half 2 of a condition is, its own blend stays
        other = half2.copy()
        other[row] = 100 * rng.normal(size=300)
        changed = duplicate_weight(half1, mean, half_noise(half1, other, cells))
        np.testing.assert_allclose(changed[row], weight[row], atol=1e-9)
        assert not np.allclose(changed[row - 1], weight[row - 1])


def test_half_noise_is_the_standard_error():
    rng = np.random.default_rng(1)
    cells, sd = rng.integers(20, 400, size=400), rng.gamma(3, .5, size=50)
    signal = rng.normal(size=(400, 50))
    half1, half2 = (signal + sd / np.sqrt(cells)[:, None] * rng.normal(size=signal.shape) for _ in range(2))
    np.testing.assert_allclose(half_noise(half1, half2, cells), sd / np.sqrt(cells)[:, None], rtol=.15)
    half1[3] = np.nan
    assert np.isfinite(half_noise(half1, half2, cells)).all()  # a condition without halves has a noise, from the others
    assert np.isnan(duplicate_weight(half1, 0, half_noise(half1, half2, cells))[3]).all()
    assert np.isnan(half_noise(half1[:1], half2[:1])).all()


def test_interpolated_row_of_the_ceiling():
    rng = np.random.default_rng(2)
    signal = 3. * (rng.random((30, 400)) < .05) * rng.normal(size=(30, 400))
    half1, half2 = (signal + .5 * rng.normal(size=signal.shape) for _ in range(2))
    half1[4] = np.nan
    weight = duplicate_weight(half1, 0, half_noise(half1, half2))
    given = dict(train_mean=np.zeros(400), conditions=range(30))
    got, _ = ceiling(half1, half2, weight=weight, **given)
    plain, _ = ceiling(half1, half2, **given)
    pd.testing.assert_frame_equal(got[got['row'] != 'interpolated'].reset_index(drop=True), plain)
    l2 = got[got['metric'] == 'l2'].groupby('row')['value'].mean()
    assert l2['noise_free'] < l2['interpolated'] < .9 * l2['replicate']  # sparse effects: half of the noise is in genes that do not respond


@pytest.mark.parametrize('higher', [True, False])
def test_scaled_has_no_sign_flip(higher):
    null, ceiling_, sign = np.array([.2, .2, .2, np.nan]), np.array([.8, .2, -.4, .8]), 1 if higher else -1
    got = scaled(sign * np.array([.5, .5, .5, .5]), sign * null, sign * ceiling_, higher)
    assert got[0] == pytest.approx(.5) and np.isnan(got[1:]).all()
    assert scaled(sign * .05, sign * .2, sign * .8, higher) == pytest.approx(-.25)  # worse than the mean stays worse, unclipped
    assert scaled(sign * 1.4, sign * .2, sign * .8, higher) == pytest.approx(2)


def test_dynamic_range_fraction_by_hand():
    assert dynamic_range_fraction(.1, .7, 1.) == pytest.approx(.6 / .9)  # more is better
    assert dynamic_range_fraction(10., 4, 0) == pytest.approx(.6)  # an error
    assert dynamic_range_fraction(10., 15, 0) == pytest.approx(-.5) and dynamic_range_fraction(1., 30, 0) == -1
    assert np.isnan(dynamic_range_fraction(1., .5, 1.))
    assert dynamic_range_fraction(.2, .2, 1.) == 0


def test_beats_null_share_counts_ties_half_and_skips_nan():
    ceiling_, null = np.array([[1., 3], [1, 1], [2, np.nan], [.5, 1.]]), np.array([[2., 2], [1, 2], [1, 2], [1, 2.]])
    np.testing.assert_allclose(beats_null_share(ceiling_, null, True), [1.5 / 4, 1 / 3])
    np.testing.assert_allclose(beats_null_share(ceiling_, null, False), [2.5 / 4, 2 / 3])
    assert np.isnan(beats_null_share([np.nan], [1.], True))
    assert beats_null_share(np.float32([.1]).astype(float), [.1], True) == .5  # rounding is a tie


def references(n=24, noise=1., seed=3):
    "Scores of two models and of the references against half 2, of 12 perturbations in two contexts each."
    signal, half1, half2 = screen(n=n, g=200, noise=noise, seed=seed)
    given = dict(train_mean=signal.mean(0), conditions=[f'P{i // 2}|KO|||line{i % 2}' for i in range(n)])
    naive = {'mean': np.tile(signal.mean(0), (n, 1)), 'no_change': np.zeros_like(signal)}
    table, _ = ceiling(half1, half2, weight=duplicate_weight(half1, signal.mean(0), half_noise(half1, half2)), **given)
    rows = pd.concat([table, *(score(p, half2, **given).assign(row=name) for name, p in naive.items())])
    models = pd.concat([score(p, half2, **given).assign(model=name) for name, p in (('half', half1), ('mean', naive['mean']), ('signal', signal))])
    return models.assign(metric=models['metric'] + '@half2'), rows


def test_calibrated_puts_every_score_between_its_references():
    models, rows = references()
    table = calibrated(models, rows).set_index(['model', 'metric'])
    assert len(table) == 3 * len(METRICS) and (table['n'] == 12).all()
    np.testing.assert_allclose(table.loc['mean', 'scaled'].dropna(), 0, atol=1e-12)
    np.testing.assert_allclose(table.loc['half', 'scaled'].dropna(), 1)
    assert (table.loc[('signal', ['l2', 'pearson_centred']), 'scaled'] > 1).all()
    assert (table['remark'] == '').eq(table['scaled'].notna()).all()
    one = table.loc[('signal', 'pearson')]
    by_hand = rows[(rows['metric'] == 'pearson')].assign(who=lambda t: t['condition'].str.split('|').str[0]).groupby(['row', 'who'])['value'].mean().groupby('row').mean()
    for row, name in (('mean', 'null'), ('replicate', 'ceiling'), ('interpolated', 'interpolated'), ('noise_free_both', 'noise_free_both')): assert one[name] == pytest.approx(by_hand[row])
    assert one['drf'] == pytest.approx((by_hand['replicate'] - by_hand['mean']) / (1 - by_hand['mean']))
    assert one['bds'] == 1


def test_calibrated_without_a_range_and_without_a_replicate():
    models, rows = references(noise=6.)
    drowned = calibrated(models, rows).set_index(['model', 'metric']).loc[('signal', 'l2')]
    assert np.isnan(drowned['scaled']) and drowned['remark'] == 'the replicate is not better than the mean' and drowned['drf'] < 0 and drowned['bds'] < .5
    none = calibrated(models, rows[rows['row'].isin(['mean', 'no_change'])])
    assert none[['scaled', 'ceiling', 'drf', 'bds']].isna().all(axis=None) and (none['remark'] == 'no replicate').all() and none['value'].notna().all()


def test_calibrated_compares_the_same_conditions():
    models, rows = references()
    some = rows[~((rows['row'] == 'replicate') & rows['condition'].str.startswith('P3|'))]
    fewer = models[~((models['model'] == 'signal') & models['condition'].str.startswith('P5|'))]
    table = calibrated(fewer, some).set_index(['model', 'metric'])
    assert table.loc[('signal', 'l2'), 'n'] == 10 and table.loc[('half', 'l2'), 'n'] == 11
    assert table.loc[('half', 'l2'), 'scaled'] == pytest.approx(1)


def test_score_array_averages_conditions_then_keeps_gaps():
    table = pd.DataFrame([('A|x|1', 'm', 0, 1.), ('A|x|2', 'm', 0, 3.), ('B|x|1', 'm', 0, 5.), ('B|x|1', 'k', 1, np.nan)], columns=['condition', 'model', 'seed', 'value']).assign(metric='l2')
    got = score_array(table)
    assert got.values.shape == (2, 2, 2, 1) and list(got.models) == ['m', 'k'] and list(got.perturbations) == ['A|x', 'B|x']
    np.testing.assert_array_equal(got.over_seeds()[:, 0, 0], [2, 5])
    assert np.isnan(got.over_seeds()[:, 1]).all()
    shuffled = score_array(table.iloc[[3, 1, 0, 2]])
    np.testing.assert_array_equal(shuffled.values[:, :, list(shuffled.models).index('m')], got.values[:, :, 0])


def test_hierarchical_bootstrap_is_the_mean_and_deterministic():
    rng = np.random.default_rng(5)
    values = rng.normal(size=(30, 3, 2))
    values[:10, 1:, 1] = np.nan  # some perturbations in one run only
    table = pd.concat([long(values), long(values[:, :1, :1], ['single'])])
    first, second = (hierarchical_bootstrap(table, np.random.default_rng(1), draws=200) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    shuffled = hierarchical_bootstrap(table.sample(frac=1, random_state=0), np.random.default_rng(1), draws=200).set_index('model').loc[first['model']].reset_index()
    pd.testing.assert_frame_equal(first, shuffled[first.columns])
    expected = [np.nanmean(np.nanmean(values[:, :, j], axis=1)) for j in range(2)]
    np.testing.assert_allclose(first['value'][:2], expected)
    assert first['seeds'].tolist() == [3, 3, 1] and (first['n'] == 30).all() and ((first['low'] < first['value']) & (first['value'] < first['high'])).all()


def test_hierarchical_bootstrap_with_one_seed_is_the_bootstrap():
    values = np.random.default_rng(6).gamma(2, size=(60, 2))
    got = hierarchical_bootstrap(long(values, ['a', 'b']), np.random.default_rng(0), draws=4000).set_index('model')
    expected = bootstrap_interval(values[:, 0], np.random.default_rng(1), draws=4000)
    np.testing.assert_allclose(got.loc['a', ['low', 'high']].astype(float), expected, atol=.05)
    ratio = hierarchical_bootstrap(long(values, ['a', 'b']), np.random.default_rng(0), draws=4000, relative_to='b').set_index('model')
    np.testing.assert_allclose(ratio.loc['a', ['low', 'high']].astype(float), bootstrap_ratio(*values.T, np.random.default_rng(1), draws=4000), atol=.06)
    assert ratio.loc['b', ['value', 'low', 'high']].tolist() == [1, 1, 1]
    assert hierarchical_bootstrap(long(values[:1]), np.random.default_rng(0))[['low', 'high']].isna().all(axis=None)
    with pytest.raises(Problem, match="no model 'c'"): hierarchical_bootstrap(long(values, ['a', 'b']), np.random.default_rng(0), relative_to='c')
    with pytest.raises(Problem, match='zero everywhere'): hierarchical_bootstrap(long(values * [1, 0], ['a', 'b']), np.random.default_rng(0), relative_to='b')


@pytest.mark.parametrize('between_runs, seeds', [(0, 1), (0, 5), (.2, 8)])
def test_hierarchical_bootstrap_covers(between_runs, seeds):
    "Over new perturbations and new runs. Runs that differ as a whole are covered too; with few of them a little too seldom."
    rng, inside = np.random.default_rng(7), []
    for _ in range(400):
        values = rng.normal(size=(40, 1)) + between_runs * rng.normal(size=(1, seeds)) + .5 * rng.normal(size=(40, seeds))
        got = hierarchical_bootstrap(long(values[:, :, None]), rng, draws=150).iloc[0]
        inside.append(got['low'] <= 0 <= got['high'])
    assert .90 <= np.mean(inside) <= .975


def test_runs_are_drawn_for_all_perturbations_at_once():
    "30 perturbations of equal difficulty, 6 runs of a model that differ: the interval is as wide as the runs say, not six times narrower."
    rng = np.random.default_rng(8)
    values = .3 * rng.normal(size=(1, 6, 1)) + .01 * rng.normal(size=(30, 6, 1))
    got = hierarchical_bootstrap(long(values), rng).iloc[0]
    runs = bootstrap_interval(values.mean(axis=(0, 2)), rng)
    assert got['high'] - got['low'] == pytest.approx(runs[1] - runs[0], rel=.15)


def test_sign_flip_is_exact_for_few():
    d = np.array([1.2, -.4, 2., .7, 1.1])
    flips = [abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12 for signs in itertools.product([1, -1], repeat=5)]
    assert sign_flip_p(d, None) == pytest.approx(np.mean(flips))
    assert sign_flip_p(np.abs(d), None) == 2 / 2**5
    assert sign_flip_p(np.r_[d, np.nan], None) == sign_flip_p(d, None) and np.isnan(sign_flip_p(np.full(4, np.nan), None))
    assert sign_flip_p(np.array([1., -1, 1, -1]), None) == 1


def test_sign_flip_agrees_with_scipy():
    d = np.random.default_rng(9).normal(.4, 1, size=(30, 3))
    got = sign_flip_p(d, np.random.default_rng(0))
    for p, column in zip(got, d.T):
        assert p == pytest.approx(stats.permutation_test((column,), np.mean, permutation_type='samples', n_resamples=9999, random_state=1).pvalue, abs=.02)
    assert sign_flip_p(np.ones(40), np.random.default_rng(0), draws=999) == 1 / 1000


@pytest.mark.parametrize('n', [8, 30])
def test_p_is_uniform_under_the_null(n):
    "Differences of heavy tails, symmetric around zero: p <= a in a share a of 4,000 screens."
    p = sign_flip_p(np.random.default_rng(n).standard_t(3, size=(n, 4000)), np.random.default_rng(0), draws=999)
    for level in (.05, .2, .5, .8): assert np.mean(p <= level) == pytest.approx(np.floor(level * 2**(n - 1)) / 2**(n - 1), abs=.025)
    if n > 12: assert stats.kstest(p, 'uniform').pvalue > 1e-3


def test_holm():
    p = np.array([.001, np.nan, .04, .03, .2])
    np.testing.assert_allclose(holm(p)[[0, 2, 3, 4]], [.004, .09, .09, .2])
    assert np.isnan(holm(p)[1]) and holm([]).size == 0
    assert (holm(np.random.default_rng(0).random(20)) <= 1).all()


def test_family_wise_error_is_held():
    "Six models that are no better than the best baseline and share its noise: any of them is called better or worse in at most 5 % of screens."
    rng, wrong = np.random.default_rng(10), []
    for _ in range(400):
        table = long(rng.normal(size=(10, 1)) + .3 * rng.normal(size=(10, 7)), ['mean', *'abcdef'])
        wrong.append((paired_tests(table, rng, boot=2)['p_adjusted'] < .05).any())
    assert np.mean(wrong) <= .075


def test_the_best_of_several_baselines_is_a_harder_opponent():
    "Four naive rows and six models, all alike: the best naive row was chosen by luck, so that almost no model seems better, and losers lose to that luck too."
    rng, better, worse = np.random.default_rng(13), [], []
    for _ in range(200):
        tests = paired_tests(long(rng.normal(size=(10, 1)) + .3 * rng.normal(size=(10, 10)), ['no_change', 'mean', 'context_mean', 'additive', *'abcdef']), rng, boot=2)
        better.append(((tests['p_adjusted'] < .05) & (tests['difference'] > 0)).any())
        worse.append(((tests['p_adjusted'] < .05) & (tests['difference'] < 0)).any())
    assert np.mean(better) <= .02 and np.mean(worse) <= .15


def test_paired_tests_find_the_best_baseline_and_the_direction():
    rng = np.random.default_rng(11)
    hard = rng.gamma(4, 1, size=(40, 1))
    values = hard * [1., 1.2, .8, 1.1] * (1 + .05 * rng.normal(size=(40, 4)))
    table = pd.concat([long(values, ['mean', 'no_change', 'good', 'bad']), long(1 / values, ['mean', 'no_change', 'good', 'bad'], metric='pearson')])
    got = paired_tests(table, np.random.default_rng(0)).set_index(['metric', 'model'])
    assert (got['baseline'] == 'mean').all()
    for metric in ('l2', 'pearson'):  # less error and more correlation are both a gain
        assert got.loc[(metric, 'good'), 'difference'] > 0 > got.loc[(metric, 'bad'), 'difference']
        assert (got.loc[metric, 'p_adjusted'] < .01).all()
    one = got.loc[('l2', 'good')]
    gain = values[:, 0] - values[:, 2]
    assert one['difference'] == pytest.approx(gain.mean()) and one['sd'] == pytest.approx(gain.std(ddof=1)) and one['low'] < one['difference'] < one['high']
    assert one['detectable'] == pytest.approx(minimum_detectable_difference(gain.std(ddof=1), 40, alpha=.025))
    with pytest.raises(Problem, match='none of the baselines'): paired_tests(table, rng, baselines=['nothing'])


def test_paired_tests_with_gaps_dust_and_seeds():
    rng = np.random.default_rng(12)
    values = rng.gamma(4, 1, size=(20, 3, 4))
    values[:, :, 0] = values[:, :1, 0]
    values[:, :, 2] = values[:, :, 0] * (1 + 1e-8)  # the baseline up to rounding
    values[:5, :, 3] = np.nan
    table = long(values, ['mean', 'additive', 'copy', 'partial']).dropna()
    table = table[~((table['model'] == 'additive') & (table['seed'] > 0))]
    table.loc[table['model'] == 'additive', 'value'] += 100
    got = paired_tests(table, np.random.default_rng(0)).set_index('model')
    assert got.loc['copy', ['difference', 'p', 'p_adjusted', 'detectable']].tolist() == [0, 1, 1, 0]
    assert got.loc['partial', 'n'] == 15 and got.loc['partial', 'baseline'] == 'mean'
    assert got.loc['partial', 'difference'] == pytest.approx(np.nanmean(values[5:, :, 0].mean(1) - values[5:, :, 3].mean(1)))
    few = paired_tests(table[table['condition'] < 'P004'], np.random.default_rng(0)).set_index('model')
    assert np.isinf(few.loc['copy', 'detectable']) and few.loc['copy', 'p'] == 1 and 'partial' not in few.index


@pytest.mark.parametrize('n, alpha', [(6, .05), (8, .01), (9, .0083), (12, .01), (13, .05), (30, .05), (30, .0083)])
def test_power_at_the_minimum_detectable_difference(n, alpha):
    sd = 2.
    d = minimum_detectable_difference(sd, n, alpha) + sd * np.random.default_rng([n, 1]).normal(size=(n, 2000))
    assert np.mean(sign_flip_p(d, np.random.default_rng(0), draws=999) <= alpha) == pytest.approx(.8, abs=.04)


def test_minimum_detectable_difference_admits_defeat():
    np.testing.assert_array_equal(np.isinf(minimum_detectable_difference(1., [0, 1, 2, 5, 6, 10])), [True] * 4 + [False] * 2)
    assert np.isinf(minimum_detectable_difference(1., 7, alpha=.01)) and np.isfinite(minimum_detectable_difference(1., 8, alpha=.01))
    assert minimum_detectable_difference(1., 30, power=.9) > minimum_detectable_difference(1., 30) > minimum_detectable_difference(1., 60)
    assert minimum_detectable_difference(3., 30) == pytest.approx(3 * minimum_detectable_difference(1., 30))
    assert detectable_sentence(.0412, 30, 'r').startswith('with 30 test perturbations you can see a difference of 0.041 in r')
    assert 'no difference at all: the smallest p of a paired test is 0.12' in detectable_sentence(np.inf, 4)
    assert detectable_sentence(np.inf, 1).startswith('with 1 test perturbation you')


def test_a_panel_of_200_conditions_and_20_models_is_quick():
    table = pd.concat([long(np.random.default_rng(k).random((200, 20)), ['mean', *(f'm{i}' for i in range(19))], metric=m) for k, m in enumerate(METRICS)])
    start = time.process_time()
    hierarchical_bootstrap(table, np.random.default_rng(0), 1000)
    paired_tests(table, np.random.default_rng(0))
    assert time.process_time() - start < 10
