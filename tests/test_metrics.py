"""Metrics: parity with scipy and scikit-learn, adversaries, ties, and what is refused."""
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

from perturb_research.core import Problem, generator
from perturb_research.evaluate.metrics import (INTERACTIONS, METRICS, Choices, Metric, beats_mean, centred_distances, centroid_accuracy, constant, described, discrimination,
                                               distance_correlation, distances, gi_scores, perturbation_mean, placed, relative_l2, robust_fit, score, spearman, top_precision)

warnings.simplefilter('error')
rng = np.random.default_rng(7)
N, G = 40, 130
TRUTH = rng.normal(size=(N, G)) * rng.gamma(1, 1, size=(N, 1))
PREDICTED = .5 * TRUTH + rng.normal(size=(N, G))
MEAN = rng.normal(scale=.2, size=G)
NAMES = [f'c{i:02d}' for i in range(N)]


def table(predicted, truth=TRUTH, mean=MEAN, conditions=NAMES, **kwargs):
    return score(predicted, truth, train_mean=mean, conditions=conditions, **kwargs)


def wide(*args, **kwargs):
    return table(*args, **kwargs).pivot(index='condition', columns='metric', values='value')


def by_hand(name, p, t, m):
    "One metric of one condition, by other libraries."
    form, _, view = name.partition('_')
    if view.startswith('top'):
        top = sorted(range(len(t)), key=lambda g: (-abs(t[g]), g))[:int(view[3:])]
        p, t = p[top], t[top]
    if view == 'centred': p, t = p - m, t - m
    return {'l2': lambda: np.sqrt(((p - t)**2).sum()), 'rmse': lambda: sk.root_mean_squared_error(t, p), 'mae': lambda: sk.mean_absolute_error(t, p),
            'cosine': lambda: sk.pairwise.cosine_similarity(p[None], t[None])[0, 0], 'pearson': lambda: stats.pearsonr(p, t)[0],
            'spearman': lambda: stats.spearmanr(p, t)[0], 'direction': lambda: np.mean(np.sign(p) == np.sign(t))}[form]()


@pytest.mark.parametrize('name', [n for n in METRICS if n not in ('centroid_accuracy', 'beats_mean')])
def test_parity(name):
    expected = [by_hand(name, p, t, MEAN) for p, t in zip(PREDICTED, TRUTH)]
    np.testing.assert_allclose(wide(PREDICTED, names=[name])[name], expected, rtol=1e-6, atol=1e-12)


def test_spearman_shares_ranks_of_ties():
    tied = np.round(PREDICTED)
    np.testing.assert_allclose(wide(tied)['spearman'], [stats.spearmanr(p, t)[0] for p, t in zip(tied, TRUTH)], rtol=1e-6)


def test_ranks_of_rows_with_and_without_ties():
    mixed = PREDICTED.copy()
    mixed[::3] = np.round(mixed[::3])
    mixed[0] = 1
    np.testing.assert_allclose(spearman(mixed[1:], TRUTH[1:]), [stats.spearmanr(p, t)[0] for p, t in zip(mixed[1:], TRUTH[1:])], rtol=1e-12)
    assert spearman(mixed, TRUTH)[0] == 0


def test_constant_up_to_single_precision():
    assert constant(np.array([[0., 0, 0], [.1, .1, .1], [1e9, 1e9, 1e9], [0, 0, 1e-9], [1, 1, 1.1]])).tolist() == [True, True, True, False, False]
    assert constant((np.full(50, .1, dtype='float32') + np.float32(.2)).astype(float) - np.float32(.2))


def test_centroid_accuracy_by_hand():
    tied = TRUTH.copy()
    tied[5] = tied[3]
    d = np.linalg.norm(PREDICTED[:, None] - tied[None], axis=-1)
    own = np.diag(d)[:, None]
    expected = ((d > own) + .5 * (d == own)).sum(1) - .5
    np.testing.assert_allclose(wide(PREDICTED, tied)['centroid_accuracy'], expected / (N - 1), rtol=1e-12)
    assert (d[3] == own[3]).sum() == 2


def test_candidates_of_ones_own():
    more = pd.DataFrame(np.vstack([TRUTH[:10], TRUTH[20:25] + .1]), index=NAMES[:10] + list('vwxyz'))
    one = wide(PREDICTED, candidates=more, names=['centroid_accuracy'])['centroid_accuracy']
    d = np.linalg.norm(PREDICTED[:, None] - more.to_numpy()[None], axis=-1)
    own = np.linalg.norm(PREDICTED - TRUTH, axis=1)
    for i in (0, 9): assert one.iloc[i] == pytest.approx((np.delete(d[i], i) > own[i]).sum() / 14)
    for i in (10, 39): assert one.iloc[i] == pytest.approx((d[i] > own[i]).sum() / 15)
    assert wide(PREDICTED[:1], TRUTH[:1], conditions=['a'])['centroid_accuracy'].tolist() == [.5]


@pytest.mark.parametrize('name', METRICS)
def test_perfect_prediction_is_the_best(name):
    assert wide(TRUTH)[name].mean() == pytest.approx(METRICS[name].best, abs=1e-12)
    better = wide(TRUTH + .1 * rng.normal(size=TRUTH.shape))[name].mean() - wide(TRUTH + 3 * rng.normal(size=TRUTH.shape))[name].mean()
    assert (better > 0) == METRICS[name].higher


CONSTANTS = {'no change': np.zeros(G), 'one number': np.full(G, np.float32(.1)), 'mean': MEAN.astype('float32'), 'random': rng.normal(size=G),
             'negative mean': -MEAN, 'huge': 1e6 * rng.normal(size=G)}


@pytest.mark.parametrize('constant', CONSTANTS)
def test_the_same_for_every_condition_is_chance(constant):
    got = wide(np.tile(CONSTANTS[constant], (N, 1)))
    assert got.notna().all(axis=None)
    assert got['centroid_accuracy'].mean() == pytest.approx(.5, abs=1e-12)


def test_stated_values_of_degenerate_predictions():
    nothing, flat, mean = (wide(np.tile(CONSTANTS[k], (N, 1))) for k in ('no change', 'one number', 'mean'))
    for view in ('', '_top20', '_top50'):
        for form, value in (('cosine', 0), ('pearson', 0), ('spearman', 0), ('direction', .5)): assert (nothing[form + view] == value).all()
        assert (flat['pearson' + view] == 0).all() and (flat['spearman' + view] == 0).all()
    for form, value in (('cosine', 0), ('pearson', 0), ('spearman', 0), ('direction', .5)): assert (mean[f'{form}_centred'] == value).all()
    assert (mean['beats_mean'] == .5).all()
    np.testing.assert_allclose(nothing['l2'], np.linalg.norm(TRUTH, axis=1))


def test_a_truth_without_any_effect():
    got = wide(PREDICTED, np.zeros_like(TRUTH))
    assert got.notna().all(axis=None)
    assert (got['pearson'] == 0).all() and (got['direction'] == .5).all() and (got['centroid_accuracy'] == .5).all()


def test_permuted_predictions_know_nothing_of_the_condition():
    got = wide(np.roll(TRUTH - TRUTH.mean(0), 1, axis=0), TRUTH - TRUTH.mean(0), 0 * MEAN).mean()
    assert abs(got['pearson']) < .1 and abs(got['centroid_accuracy'] - .5) < .15 and abs(got['direction'] - .5) < .05


def test_mean_tile_is_rewarded_only_where_it_is_not_centred():
    shared = TRUTH + 3 * rng.normal(size=G)
    mean = shared.mean(0)
    got = wide(np.tile(mean, (N, 1)), shared, mean).mean()
    assert got['pearson'] > .8 and got['pearson_centred'] == 0 and got['centroid_accuracy'] == pytest.approx(.5)


def test_scale_matters_to_errors_alone():
    one, half = wide(PREDICTED), wide(PREDICTED / 2)
    for name in ('cosine', 'pearson', 'spearman_top20', 'direction_top50'): np.testing.assert_allclose(one[name], half[name], atol=1e-12)
    assert (one['l2'] != half['l2']).all()


def test_fewer_genes_than_the_top():
    got = wide(PREDICTED[:, :7], TRUTH[:, :7], MEAN[:7])
    np.testing.assert_allclose(got['rmse_top20'], got['rmse'])
    np.testing.assert_allclose(got['pearson_top50'], got['pearson'])
    assert wide(PREDICTED[:, :1], TRUTH[:, :1], MEAN[:1]).notna().all(axis=None)


def test_several_models_and_blocks_agree_with_one_by_one():
    genes, n = 9000, 300  # more than one block
    truth, predicted = rng.normal(size=(n, genes)), rng.normal(size=(2, n, genes)).astype('float32')
    given = dict(train_mean=truth.mean(0), conditions=range(n), names=['l2', 'pearson_centred', 'mae_top20', 'centroid_accuracy', 'beats_mean'])
    both = score(predicted, truth, **given)
    assert both.columns.tolist() == ['model', 'condition', 'metric', 'value']
    for i in (0, 1):
        alone = score(predicted[i], truth, **given)
        assert alone.columns.tolist() == ['condition', 'metric', 'value']
        pd.testing.assert_frame_equal(alone, both[both['model'] == i].drop(columns='model').reset_index(drop=True))
    few = [0, 150, 299]
    less = score(predicted[0][few], truth[few], **given | dict(conditions=few, candidates=pd.DataFrame(truth)))
    pd.testing.assert_frame_equal(less, both[(both['model'] == 0) & both['condition'].isin(few)].drop(columns='model').reset_index(drop=True))


def test_beats_mean_counts_ties_half():
    t = np.array([[2., 0], [2, 0], [2, 0]])
    assert beats_mean(np.array([[2., 0], [0, 0], [1, 0]]), t, np.array([1., 0])).tolist() == [1, 0, .5]


def test_centroid_accuracy_of_equal_candidates():
    assert centroid_accuracy(np.ones((3, 4)), np.ones((3, 4)), np.ones((3, 4)), np.arange(3)).tolist() == [.5] * 3


def by_place(d, ties, denominator):
    "1 - place of the diagonal in each row of distances, one row at a time."
    values = []
    for i, row in enumerate(d):
        others = np.delete(row, i)
        values.append(1 - ((others < row[i]).sum() + (.5 if ties == 'half' else 1) * (others == row[i]).sum()) / (len(others) + (denominator == 'all')))
    return values


@pytest.mark.parametrize('denominator', ['others', 'all'])
@pytest.mark.parametrize('ties', ['half', 'lose'])
@pytest.mark.parametrize('fixed', ['prediction', 'reference'])
@pytest.mark.parametrize('distance, metric', [('l1', 'cityblock'), ('l2', 'euclidean'), ('cosine', 'cosine')])
def test_every_way_to_place_a_condition(distance, metric, fixed, ties, denominator):
    p, t = np.round(PREDICTED[:, :4]), np.round(TRUTH[:, :4]) + .5  # whole and half numbers: many ties, exact in l1
    p[3] = p[7]
    t[9] = t[12]
    d = np.round(cdist(p, t, metric) if fixed == 'prediction' else cdist(t, p, metric), 10)
    d[np.isnan(d)] = 1  # SciPy has no angle to a zero vector
    got = discrimination(p, t, distance=distance, fixed=fixed, ties=ties, denominator=denominator)
    np.testing.assert_allclose(got, by_place(d, ties, denominator), rtol=1e-12)


@pytest.mark.parametrize('distance, metric', [('l1', 'cityblock'), ('l2', 'euclidean'), ('cosine', 'cosine')])
def test_genes_left_out_of_a_distance(distance, metric):
    own = np.zeros((N, G), dtype=bool)
    own[np.arange(N), np.arange(N)] = True
    own[0] = False  # a drug
    own[1, :9] = True
    expected = [cdist(p[None, ~out], TRUTH[:, ~out], metric)[0] for p, out in zip(PREDICTED, own)]
    np.testing.assert_allclose(distances(PREDICTED, TRUTH, distance, own), expected, rtol=1e-9, atol=1e-12)
    spiked = PREDICTED + 1e6 * own  # whatever a left-out gene holds, nothing moves
    np.testing.assert_allclose(distances(spiked, TRUTH, distance, own), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(distances(PREDICTED, TRUTH, distance, own.any(0)), cdist(PREDICTED[:, ~own.any(0)], TRUTH[:, ~own.any(0)], metric), rtol=1e-12)
    assert (discrimination(PREDICTED, TRUTH, distance=distance, removed=np.ones(G, dtype=bool)) == .5).all()
    assert (discrimination(PREDICTED, TRUTH, distance=distance, removed=np.ones((N, G), dtype=bool)) == .5).all()


def test_centroid_accuracy_is_one_of_them():
    np.testing.assert_allclose(wide(PREDICTED)['centroid_accuracy'], discrimination(PREDICTED, TRUTH), rtol=1e-12)


def test_placed_among_nobody_and_unknown_choices():
    assert placed(np.zeros((1, 1)), 0, [True], denominator='all').tolist() == [.5] == placed(np.zeros((1, 0)), 0, [False]).tolist()
    for change in (dict(ties='win'), dict(denominator='most'), dict(distance='l3'), dict(fixed='both')):
        with pytest.raises(Problem, match=next(iter(change.values()))): discrimination(PREDICTED, TRUTH, **change)


def test_one_vote_each_perturbation():
    obs = pd.DataFrame({'perturbation': pd.Categorical(list('AAAB'), categories=list('ABC'))}, index=list('1234'))
    assert perturbation_mean(ad.AnnData(np.array([[0.], [3], [6], [10]], dtype='float32'), obs=obs)).tolist() == [6.5]


def test_relative_l2():
    mine, additive = table(PREDICTED), table(np.zeros_like(TRUTH))
    expected = np.linalg.norm(PREDICTED - TRUTH, axis=1).mean() / np.linalg.norm(TRUTH, axis=1).mean()
    assert relative_l2(mine, additive) == pytest.approx(expected)
    assert relative_l2(pd.concat([mine, mine[mine['condition'] == 'c00']]), additive) == pytest.approx(expected)  # a repeat counts once
    with pytest.raises(Problem, match='same conditions'): relative_l2(mine[mine['condition'] != 'c00'], additive)
    with pytest.raises(Problem, match='no error at all'): relative_l2(mine, table(TRUTH))


def with_value(array, value):
    "A copy with one bad entry."
    array = array.copy()
    array[2, 3] = value
    return array


@pytest.mark.parametrize('says, change', {
    'truth: shape': dict(truth=TRUTH[:0], conditions=[]), r'predicted: shape \(39, 130\)': dict(predicted=PREDICTED[:-1]),
    'predicted: 1 values are NaN or infinite, the first at': dict(predicted=with_value(PREDICTED, np.nan)),
    'predicted: 1 values': dict(predicted=with_value(PREDICTED.astype('float32'), np.inf)), 'truth: 1 values': dict(truth=with_value(TRUTH, -np.inf)),
    'train_mean: shape': dict(mean=MEAN[1:]), 'predicted: no models': dict(predicted=PREDICTED[None][:0]), 'train_mean: 130 values': dict(mean=MEAN * np.nan),
    'conditions: 39 different names for 40 rows': dict(conditions=['c01', *NAMES[1:]]), 'predicted: values of type': dict(predicted=PREDICTED.astype(str)),
    "did you mean 'centroid_accuracy'": dict(names=['centroid_acuracy']), 'candidates: shape': dict(candidates=pd.DataFrame(TRUTH[:, 1:])),
    'candidates: a condition occurs twice': dict(candidates=pd.DataFrame(TRUTH, index=['a'] * N))}.items())
def test_refused_in_one_line(says, change):
    with pytest.raises(Problem, match=says) as e: table(**dict(predicted=PREDICTED) | change)
    assert '\n' not in str(e.value)


def test_names_choose_and_order():
    assert table(PREDICTED, names=['pearson', 'l2'])['metric'].tolist()[:4] == ['pearson', 'l2'] * 2
    assert set(table(PREDICTED)['metric']) == set(METRICS)


def test_every_name_stands_for_ten_choices():
    table = described(METRICS.values())
    assert list(table.index) == list(METRICS) and set(Choices._fields) < set(table.columns) and len(Choices._fields) == 10
    assert table.notna().all(axis=None) and (table[[*Choices._fields, 'formula', 'range', 'source']] != '').all(axis=None)
    assert not table.duplicated(['formula', *Choices._fields]).any(), "no two names for one number"
    assert all(m.degenerate == m.choices.degenerate and m.needs == 'effects' and m.per == 'condition' for m in METRICS.values())
    assert (table.loc[table.index.str.endswith('_centred'), 'centring'] == 'training perturbation mean').all()
    with pytest.raises(AttributeError): Metric('a', None, '', True, 1., '', '').name = 'b'


def test_distance_correlation_by_its_definition():
    x, y = generator(6, 'x').normal(size=(2, 40))
    a, b = (np.abs(v[:, None] - v) for v in (x, y))
    a, b = (d - d.mean(0) - d.mean(1)[:, None] + d.mean() for d in (a, b))
    by_hand = np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))
    assert np.isclose(distance_correlation(centred_distances(x), centred_distances(y)), by_hand)
    assert np.isclose(distance_correlation(centred_distances(x), centred_distances(1 - 3 * x)), 1)
    assert distance_correlation(centred_distances(x), centred_distances(np.zeros(40))) == 0


def test_interaction_scores_tell_planted_kinds_apart():
    A, B, new = generator(7, 'kinds').normal(size=(3, 400))
    found = {name: gi_scores(A, B, AB) for name, AB in dict(synergy=2 * (A + B), suppression=.2 * (A + B), neomorphism=new, epistasis=A, redundancy=.5 * (A + B), additive=A + B).items()}
    of = lambda score: {k: v[score] for k, v in found.items()}
    assert max(of('magnitude'), key=of('magnitude').get) == 'synergy' and of('magnitude')['suppression'] < .3
    assert min(of('fit'), key=of('fit').get) == 'neomorphism' == min(of('similarity'), key=of('similarity').get)
    assert of('equality')['epistasis'] < .2 < of('equality')['additive']
    assert set(dict(INTERACTIONS.values())) <= set(found['additive'])


def test_robust_fit_ignores_a_few_wild_genes():
    A, B = generator(8, 'wild').normal(size=(2, 300))
    AB = .6 * A - .3 * B
    AB[:8] = 40
    assert np.allclose(robust_fit(A, B, AB), [.6, -.3], atol=.02)


def test_precision_of_a_constant_is_chance():
    assert np.isclose(top_precision([5] * 10, range(10), 3), .3)
    assert top_precision(range(10), range(10), 3) == top_precision(range(10), range(10), 3, -1) == 1


def test_a_sign_that_rounding_has_chosen_counts_half():
    from perturb_research.evaluate.metrics import direction
    truth = np.array([1., -1., 1., 1.])
    assert direction(np.array([2., -1., 1e-16, -1e-16]), truth) == direction(np.array([2., -1., 0., 0.]), truth) == .75
    assert direction(np.full(4, 1e-16), truth) == direction(np.ones(4), truth)  # small throughout is no rounding
