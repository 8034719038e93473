"""Metric families: each by hand, cell-eval's against cell-eval itself, what degenerate predictions get, exploits, and what is refused."""
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import SHARED, needs_shared
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

from perturb_research.core import Problem
from perturb_research.evaluate.metrics import Choices
from perturb_research.evaluate.panels import (FAMILIES, Cells, Comparison, cellsimbench_weights, empirical_null, expected_hits, families, family_metric, fdr_limits,
                                              interaction_curve, interaction_scores, interactions, ndcg_at, panel_scores, recall_at, weighted_mse, weighted_r2)

MINE = {name: m for name, m in FAMILIES.items() if m.function.__module__ == 'perturb_research.evaluate.panels'}
SYSTEMS = {'perturbench', 'scperturbench', 'cell_eval', 'vcc2026', 'gears', 'systema', 'ahlmann_eltze', 'cellsimbench', 'genespeaks', 'scmodelforge'}
rng = np.random.default_rng(11)
N, D, G = 30, 10, 1200  # conditions, of which pairs of genes, genes
GENES = [f'G{i}' for i in range(G)]
TARGETS = [(f'G{i}',) for i in range(N - D)] + [(f'G{2 * i}', f'G{2 * i + 1}') for i in range(D)]
NAMES = ['+'.join(t) for t in TARGETS]
CONTROL, OWN = rng.gamma(1, 1, G), rng.gamma(1, 1, G)
MEAN = rng.normal(scale=.2, size=G)
EFFECTS = (MEAN + rng.normal(scale=.3, size=(N, G))) * (rng.random((N, G)) < .9)  # some effects are exactly zero
GUESS = .5 * EFFECTS + rng.normal(scale=.3, size=(N, G)) * (rng.random((N, G)) < .8)
ADDITIVE = np.full((N, G), np.nan)
ADDITIVE[N - D:] = [EFFECTS[2 * i] + EFFECTS[2 * i + 1] for i in range(D)]
EFFECTS[N - D:] = ADDITIVE[N - D:] + rng.normal(scale=.1, size=(D, G)) + 1.5 * rng.choice([-1, 0, 1], p=[.02, .96, .02], size=(D, G))
GUESS[N - D:] = ADDITIVE[N - D:] + .3 * (EFFECTS - ADDITIVE)[N - D:] + rng.normal(scale=.3, size=(D, G))
for array in (EFFECTS, GUESS): array[np.abs(array) < 1e-4] = 0  # a comparison sweeps what is smaller than 1e-6 of the control


def comparison(guess=GUESS, effects=EFFECTS, **kwargs):
    given = dict(conditions=NAMES, targets=TARGETS, genes=GENES, real=CONTROL + effects, predicted=CONTROL + guess, control=CONTROL, predicted_control=OWN, train_mean=MEAN, additive=ADDITIVE)
    return Comparison(**given | kwargs)


def values(comparison, name):
    "(n,) or a number."
    got = panel_scores(comparison, [name])['value'].to_numpy()
    return got if FAMILIES[name].per == 'condition' else got[0]


# by hand: condition by condition, with SciPy and scikit-learn
P, T, P_OWN, M = GUESS, EFFECTS, CONTROL + GUESS - OWN, MEAN
TOP = [sorted(range(G), key=lambda g: (-abs(t[g]), g)) for t in T]
HIGH = sorted(range(G), key=lambda g: (-CONTROL[g], g))[:1000]


def each(function, p=P, t=T, k=None):
    "One value a condition, on its top k genes if given."
    return np.array([function(x if k is None else x[TOP[i][:k]], y if k is None else y[TOP[i][:k]]) for i, (x, y) in enumerate(zip(p, t))])


def r(p, t): return stats.pearsonr(p, t)[0]
def rho(p, t): return stats.spearmanr(p, t)[0]
def mse(p, t): return sk.mean_squared_error(t, p)
def mae(p, t): return sk.mean_absolute_error(t, p)
def cos(p, t): return sk.pairwise.cosine_similarity(p[None], t[None])[0, 0]
def same_sign(p, t): return np.mean(np.sign(p) == np.sign(t))
def opposite_sign(p, t): return np.mean(np.sign(p) * np.sign(t) == -1)


def rank(d, ties, n):
    "Mean place of the diagonal in each row of d, from 0, over n."
    places = []
    for i, row in enumerate(d):
        others = np.delete(row, i)
        places.append((sum(others < row[i]) + ties * sum(others == row[i])) / n)
    return np.array(places)


def without_own(metric):
    "Distances of cell-eval: rows are predictions; the gene with the name of the condition is left out."
    keep = [[g for g in range(G) if GENES[g] != name] for name in NAMES]
    return np.array([cdist(P_OWN[[i]][:, k], T[:, k], metric)[0] for i, k in enumerate(keep)])


def logfc(effects, control):
    with np.errstate(invalid='ignore', divide='ignore'): return np.nan_to_num(np.log2(control + effects + .1) - np.log2(control + .1), nan=0, posinf=0, neginf=0)


def recall(k): return np.array([len(set(TOP[i][:30]) & set(np.argsort(-abs(p))[:k])) / 30 for i, p in enumerate(P)])


def ndcg(k): return np.array([sk.ndcg_score([[g in TOP[i][:30] for g in range(G)]], [abs(p)], k=k) for i, p in enumerate(P)])


def truly_interacting(): return interactions(T[N - D:][:, HIGH], ADDITIVE[N - D:][:, HIGH]).found.ravel()


def interaction_score(): return np.abs(P - ADDITIVE)[N - D:][:, HIGH].ravel()


def best_tpr():
    order = np.argsort(-interaction_score(), kind='stable')
    hits = truly_interacting()[order].cumsum()
    return max(hits[i] / hits[-1] for i in range(len(hits)) if 1 - hits[i] / (i + 1) <= .5)


REMOVED = [g for g in range(G) if g >= N - D]  # every target of the panel is among the first genes
BY_HAND = {
    'perturbench.rmse': lambda: np.sqrt(each(mse)),
    'perturbench.cosine_logfc': lambda: each(cos, logfc(P_OWN, OWN), logfc(T, CONTROL)),
    'perturbench.rank_rmse': lambda: rank(cdist(T, P), .5, N - 1),
    'perturbench.rank_rmse_paper': lambda: rank(cdist(T, P), 1, N - 1),
    'perturbench.rank_cosine_logfc': lambda: rank(cdist(logfc(T, CONTROL), logfc(P_OWN, OWN), 'cosine'), .5, N - 1),
    'perturbench.rank_cosine_logfc_paper': lambda: rank(cdist(logfc(T, CONTROL), logfc(P_OWN, OWN), 'cosine'), 1, N - 1),
    'scperturbench.mse': lambda: each(mse), 'scperturbench.mse_top100': lambda: each(mse, k=100),
    'scperturbench.pcc_delta': lambda: each(r), 'scperturbench.pcc_delta_top100': lambda: each(r, k=100),
    'cell_eval.pearson_delta': lambda: each(r, P_OWN), 'cell_eval.mae': lambda: each(mae), 'cell_eval.mse': lambda: each(mse),
    'cell_eval.mae_delta': lambda: each(mae, P_OWN), 'cell_eval.mse_delta': lambda: each(mse, P_OWN),
    'cell_eval.pds_l1': lambda: 1 - rank(without_own('cityblock'), .5, N), 'cell_eval.pds_l2': lambda: 1 - rank(without_own('euclidean'), .5, N),
    'cell_eval.pds_cosine': lambda: 1 - rank(without_own('cosine'), .5, N),
    'vcc2026.pds_cosine_effects': lambda: 1 - rank(cdist(P[:, REMOVED], T[:, REMOVED], 'cosine'), .5, N - 1),
    'gears.mse': lambda: each(mse), 'gears.mse_top20': lambda: each(mse, k=20),
    'gears.pearson': lambda: each(r, CONTROL + P, CONTROL + T), 'gears.pearson_top20': lambda: each(r, CONTROL + P, CONTROL + T, k=20),
    'gears.pearson_delta': lambda: each(r), **{f'gears.pearson_delta_top{k}': lambda k=k: each(r, k=k) for k in (20, 50, 100, 200)},
    'gears.direction_correct': lambda: each(same_sign), 'gears.direction_correct_top20': lambda: each(same_sign, k=20),
    'gears.direction_opposite': lambda: each(opposite_sign), 'gears.direction_opposite_top20': lambda: each(opposite_sign, k=20),
    'gears.mse_top20_normalised': lambda: each(mse, k=20).mean() / each(mse, 0 * P, k=20).mean(),
    'systema.pearson_delta': lambda: each(r), 'systema.pearson_delta_top20': lambda: each(r, k=20),
    'systema.pearson_centred': lambda: each(r, P - M, T - M), 'systema.pearson_centred_top20': lambda: each(r, P - M, T - M, k=20),
    'systema.centroid_accuracy': lambda: 1 - rank(cdist(P, T), 1, N - 1), 'cellsimbench.nir': lambda: 1 - rank(cdist(P, T), 1, N - 1),
    'systema.systematic_variation': lambda: np.mean([cos(t, T.mean(0)) for t in T]),
    'genespeaks.rmse': lambda: np.sqrt(each(mse).mean()), 'genespeaks.cosine_delta': lambda: each(cos), 'genespeaks.pearson_delta': lambda: each(r),
    'genespeaks.spearman_delta': lambda: each(rho), 'genespeaks.sign_at_30': lambda: each(same_sign, k=30),
    **{f'genespeaks.recall_at_{k}': lambda k=k: recall(k) for k in (10, 30, 50, 100)}, **{f'genespeaks.ndcg_at_{k}': lambda k=k: ndcg(k) for k in (10, 30, 50, 100)},
    'scmodelforge.pearson': lambda: each(r, k=50), 'scmodelforge.mse': lambda: each(mse, k=50), 'scmodelforge.direction_accuracy': lambda: each(same_sign, k=50),
    'scmodelforge.fraction_above_baseline': lambda: each(r, k=50) > each(r, np.tile(M, (N, 1)), k=50),
    'ahlmann_eltze.l2_top1000': lambda: np.linalg.norm((P - T)[:, HIGH], axis=1), 'ahlmann_eltze.pearson_delta_top1000': lambda: each(r, P[:, HIGH], T[:, HIGH]),
    'ahlmann_eltze.interaction_auprc': lambda: sk.average_precision_score(truly_interacting(), interaction_score()),
    'ahlmann_eltze.interaction_auroc': lambda: sk.roc_auc_score(truly_interacting(), interaction_score()),
    'ahlmann_eltze.interaction_tpr_fdp50': best_tpr}


def test_the_registry_is_complete():
    assert {name.split('.')[0] for name in MINE} == SYSTEMS
    assert set(BY_HAND) == set(MINE), "every metric of the notebook has a test by hand"
    for name, m in MINE.items():
        assert m.name == name and m.formula and m.source and m.range[0] in '[(' and isinstance(m.higher, bool), name
        assert len(m.choices) == 10 and all(isinstance(c, str) and c for c in m.choices) and m.degenerate == m.choices.degenerate, name
        assert any(mark in m.source for mark in ('@', '0.', '20')), f"{name}: a version or a year"
        assert m.per == 'condition' or m.choices.aggregation != Choices().aggregation, f"{name}: the order of aggregation of a single value"
        assert (m.choices.ranking == 'none') == ('rank' not in m.formula + name and 'q != p' not in m.formula and 'recall' not in name and 'ndcg' not in name
                                                 and 'interaction' not in name) or 'spearman' in name, name


@pytest.mark.parametrize('name', BY_HAND)
def test_by_hand(name):
    np.testing.assert_allclose(values(comparison(), name), BY_HAND[name](), rtol=1e-6, atol=1e-7)


def test_against_cell_eval_itself():
    ad, types = pytest.importorskip('anndata'), pytest.importorskip('cell_eval._types')
    from cell_eval.metrics import _anndata as theirs
    n, g = 12, 90
    genes, conditions = [f'G{i}' for i in range(g)], [f'G{i}' for i in range(n - 2)] + ['G0+G1', 'drug']

    def side(shift):
        group = np.repeat(np.arange(-1, n), 15)
        X = np.log1p(rng.poisson(2, size=(len(group), g)) + shift * (group[:, None] >= 0) * rng.random((n + 1, g)).repeat(15, axis=0)).astype('float32')
        obs = pd.DataFrame({'target': np.array(['control', *conditions])[group + 1]}, index=[f'c{i}' for i in range(len(group))])
        return Cells(sp.csr_matrix(X), group), ad.AnnData(X, obs, pd.DataFrame(index=genes))
    (real, real_data), (predicted, predicted_data) = side(3), side(2)
    pair = types.PerturbationAnndataPair(real=real_data, pred=predicted_data, pert_col='target', control_pert='control')
    ours = Comparison.of_cells(real, predicted, conditions, [tuple(c.split('+')) if c != 'drug' else () for c in conditions], genes)
    for name in ('pearson_delta', 'mse', 'mae', 'mse_delta', 'mae_delta'):
        expected = getattr(theirs, name)(pair)
        np.testing.assert_allclose(values(ours, f'cell_eval.{name}'), [expected[c] for c in conditions], rtol=1e-5, atol=1e-6, err_msg=name)
    for metric in ('l1', 'l2', 'cosine'):
        expected = theirs.discrimination_score(pair, metric=metric)
        np.testing.assert_allclose(values(ours, f'cell_eval.pds_{metric}'), [expected[c] for c in conditions], atol=1e-12, err_msg=metric)


@pytest.mark.parametrize('name', MINE)
def test_perfect_is_best_and_noise_is_worse(name):
    metric = MINE[name]
    perfect, noisy = (np.nanmean(values(comparison(g, predicted_control=CONTROL), name)) for g in (T, T + 10 * rng.normal(size=T.shape)))
    if name == 'systema.systematic_variation': assert perfect == noisy and np.isnan(metric.best)
    else:
        assert perfect == pytest.approx(metric.best, abs=1e-9)
        assert (perfect - noisy > 0) == metric.higher


# what each says of a prediction that knows nothing: no change, and the same for every condition (float32, as predictions are stored)
NAN, ANY = float('nan'), None
DEGENERATE = {  # no change, mean of the training perturbations
    'perturbench.cosine_logfc': (NAN, ANY), 'perturbench.rank_rmse': (.5, .5), 'perturbench.rank_rmse_paper': (1, 1), 'perturbench.rank_cosine_logfc': (.5, .5),
    'perturbench.rank_cosine_logfc_paper': (1, 1), 'scperturbench.pcc_delta': (NAN, ANY), 'scperturbench.pcc_delta_top100': (NAN, ANY), 'cell_eval.pearson_delta': (NAN, ANY),
    'cell_eval.pds_cosine': (.5 + .5 / N, ANY), 'vcc2026.pds_cosine_effects': (.5, .5), 'gears.pearson_delta': (0, ANY), 'gears.pearson_delta_top20': (0, ANY),
    'gears.mse_top20_normalised': (1, ANY), 'gears.direction_opposite': (0, ANY), 'gears.direction_correct_top20': (0, ANY), 'systema.pearson_delta': (NAN, ANY),
    'systema.pearson_centred': (ANY, NAN), 'systema.pearson_centred_top20': (ANY, NAN), 'systema.centroid_accuracy': (.5, .5), 'cellsimbench.nir': (.5, .5),
    'genespeaks.cosine_delta': (0, ANY), 'genespeaks.pearson_delta': (0, ANY), 'genespeaks.spearman_delta': (0, ANY), 'genespeaks.sign_at_30': (0, ANY),
    'genespeaks.recall_at_10': (10 / G, ANY), 'genespeaks.ndcg_at_30': (30 / G, ANY), 'scmodelforge.pearson': (NAN, ANY), 'scmodelforge.direction_accuracy': (0, ANY),
    'scmodelforge.fraction_above_baseline': (0, 0), 'ahlmann_eltze.pearson_delta_top1000': (NAN, ANY)}


@pytest.mark.parametrize('name', DEGENERATE)
def test_what_a_prediction_that_knows_nothing_gets(name):
    for effect, expected in zip((0 * MEAN, MEAN), DEGENERATE[name]):
        if expected is ANY: continue
        predicted = np.tile((CONTROL + effect).astype('float32'), (N, 1))
        got = values(comparison(predicted=predicted, predicted_control=CONTROL.astype('float32')), name)
        assert np.isnan(expected) == np.isnan(got).any(), (name, got)
        if np.isnan(expected): assert np.isnan(got).all(), "the same for every condition, no random survivors"
        else: assert np.mean(got) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize('shape', ['mean', 'one number', 'random', 'huge'])
@pytest.mark.parametrize('name', ['perturbench.rank_rmse', 'perturbench.rank_cosine_logfc', 'vcc2026.pds_cosine_effects', 'systema.centroid_accuracy', 'cellsimbench.nir'])
def test_the_same_for_every_condition_is_exactly_chance(name, shape):
    guess = {'mean': MEAN, 'one number': np.full(G, .1), 'random': rng.normal(size=G), 'huge': 1e4 * rng.normal(size=G)}[shape]
    assert np.mean(values(comparison(np.tile(guess, (N, 1)), predicted_control=CONTROL), name)) == pytest.approx(.5, abs=1e-12)


@pytest.mark.parametrize('distance', ['l1', 'l2', 'cosine'])
def test_pds_of_cell_eval_has_another_chance(distance):
    "(n + 1) / 2n; exact where the targets are not among the genes, since the gene left out differs from condition to condition."
    outside = [(f'X{i}',) for i in range(N)]
    got = values(comparison(np.tile(MEAN, (N, 1)), targets=outside, predicted_control=CONTROL), f'cell_eval.pds_{distance}')
    assert got.mean() == pytest.approx((N + 1) / (2 * N), abs=1e-12)
    assert values(comparison(T, predicted_control=CONTROL), f'cell_eval.pds_{distance}').min() == 1


@pytest.mark.parametrize('name', MINE)
def test_permuted_predictions_know_nothing_of_the_condition(name):
    metric, centred = MINE[name], EFFECTS - EFFECTS.mean(0)
    given = dict(predicted_control=CONTROL) | ({} if 'baseline' in name else dict(train_mean=0 * MEAN))
    got, right = (np.nanmean(values(comparison(g, centred, **given), name)) for g in (np.roll(centred, 1, axis=0), centred))
    if metric.range == '[-1, 1]' and name not in ('gears.pearson', 'gears.pearson_top20', 'systema.systematic_variation'): assert abs(got) < .12
    if 'rank' in name or 'pds' in name or 'centroid' in name or 'nir' in name: assert abs(got - .5) < .3
    if name != 'systema.systematic_variation': assert (right - got > 0) == metric.higher


def test_one_condition_alone():
    one = Comparison(['A'], [('A',)], ['A', 'B', 'C'], np.array([[1., 2, 3]]), np.array([[1., 2, 2]]), np.array([1., 1, 1]))
    got = panel_scores(one).set_index('metric')['value']
    assert all(got[name] == .5 for name in got.index if 'pds' in name or 'rank' in name or name.endswith(('nir', 'centroid_accuracy')))


def test_targets_that_mark_a_prediction_are_seen_by_some_and_not_by_others():
    "A prediction of nothing but the perturbed genes is told apart where they are kept, and where only the own one is removed by marking the others."
    targets = [(f'G{i}',) for i in range(N)]
    rows, effects = np.arange(N), MEAN + rng.normal(scale=.3, size=(N, G))
    effects[rows, rows] -= 8  # a knock-down that works
    nothing, spiked = np.tile(effects.mean(0), (N, 1)), np.tile(effects.mean(0), (N, 1))
    spiked[rows, rows] -= 8
    score = lambda guess, name: np.mean(values(comparison(guess, effects, targets=targets, predicted_control=CONTROL), name))
    assert score(spiked, 'systema.centroid_accuracy') > .99
    assert score(spiked, 'vcc2026.pds_cosine_effects') == pytest.approx(.5, abs=1e-9) and score(nothing, 'vcc2026.pds_cosine_effects') == pytest.approx(.5, abs=1e-9)
    others = nothing.copy()  # all targets but the own one raised: the others' knock-downs now look wrong
    others[:, :N] += 8 * (1 - np.eye(N))
    assert score(others, 'cell_eval.pds_l2') > .9 > .6 > score(others, 'vcc2026.pds_cosine_effects')


def test_editing_the_own_control_moves_only_those_that_use_it():
    names = [n for n, m in MINE.items() if m.needs != 'additive']
    guess = MEAN + .03 * EFFECTS + rng.normal(scale=.3, size=(N, G))
    honest, edited = (panel_scores(comparison(guess, predicted_control=c), names).groupby('metric')['value'].mean() for c in (CONTROL, CONTROL + MEAN))
    moved = set(honest.index[~np.isclose(honest, edited)])
    assert moved == {n for n in names if MINE[n].choices.control == "each side's own"}


def test_without_a_control_profiles_are_effects():
    c = Comparison(NAMES, TARGETS, GENES, T, P)
    got = set(panel_scores(c)['metric'])
    assert got == {n for n, m in FAMILIES.items() if m.needs == 'effects'} and c.transductive
    np.testing.assert_allclose(values(c, 'systema.pearson_centred'), each(r, P - T.mean(0), T - T.mean(0)))
    np.testing.assert_allclose(values(c, 'systema.centroid_accuracy'), BY_HAND['systema.centroid_accuracy']())


def test_scores_are_a_long_table_in_the_order_of_the_registry():
    got = panel_scores(comparison(), ['systema', 'gears.mse'])
    assert got.columns.tolist() == ['condition', 'metric', 'value']
    assert list(dict.fromkeys(got['metric'])) == [m.name for m in families(['systema', 'gears.mse'])] and 'gears.mse' in set(got['metric'])
    assert got.loc[got['metric'] == 'systema.systematic_variation', 'condition'].tolist() == ['*']
    assert got.loc[got['metric'] == 'gears.mse', 'condition'].tolist() == NAMES
    assert panel_scores(comparison(control=None, predicted_control=None), 'ahlmann_eltze').empty


def test_means_of_cells():
    X, group = rng.random((40, 5)).astype('float32'), np.resize(np.arange(-1, 3), 40)
    for given in (X, sp.csr_matrix(X)):
        mean, control = Cells(given, group).means(3)
        np.testing.assert_allclose(mean, [X[group == i].mean(0) for i in range(3)], rtol=1e-6)
        np.testing.assert_allclose(control, X[group == -1].mean(0), rtol=1e-6)
    side = Cells(X, group)
    c = Comparison.of_cells(side, Cells(X + 1, group), list('abc'), [()] * 3, list('vwxyz'))
    np.testing.assert_allclose(c.own_effects, c.real_effects, atol=1e-6)
    np.testing.assert_allclose(c.predicted_effects, c.real_effects + 1, rtol=1e-6)
    assert c.has('cells') and not c.has('counts') and not c.has('additive') and c.has('means')
    assert Comparison.of_cells(Cells(X, group, X), Cells(X, group, X), list('abc'), [()] * 3, list('vwxyz')).has('counts')
    assert not c.own_targets.any()


@pytest.mark.parametrize('says, make', {
    r'predicted: shape \(29, 1200\); expected \(30, 1200\)': lambda: comparison(predicted=P[1:]), 'targets: 29 for 30': lambda: comparison(targets=TARGETS[1:]),
    'real: 1200 values are NaN': lambda: comparison(real=np.vstack([T[1:], T[:1] * np.nan])), 'train_mean: shape': lambda: comparison(train_mean=MEAN[1:]),
    'predicted_control: given without control': lambda: comparison(control=None), '0 conditions': lambda: Comparison([], [], GENES, T[:0], P[:0]), "did you mean 'gears.pearson'": lambda: families(['gears.pearsn']),
    "did you mean 'systema'": lambda: families('sistema'), 'cells: group of shape': lambda: Cells(np.ones((3, 2)), [0, 1]),
    'cells: counts of shape': lambda: Cells(np.ones((3, 2)), [0, 1, -1], np.ones((3, 1))), "real cells: 'b' has no cells": lambda:
        Comparison.of_cells(Cells(np.ones((3, 2)), [0, 0, -1]), Cells(np.ones((3, 2)), [0, 1, -1]), ['a', 'b'], [(), ()], ['x', 'y']),
    "predicted cells: 'control' has no cells": lambda:
        Comparison.of_cells(Cells(np.ones((3, 2)), [0, 1, -1]), Cells(np.ones((3, 2)), [0, 1, 1]), ['a', 'b'], [(), ()], ['x', 'y']),
    'groups -1 to 5': lambda: Cells(np.ones((3, 2)), [0, 5, -1]).means(['a']), 'real_cells: 2 genes': lambda: comparison(real_cells=Cells(np.ones((3, 2)), [0, 1, -1])),
    "metric 'nameless'": lambda: family_metric('nameless', formula='', higher=True, best=1, range='', source='', needs='effects'),
    "needs 'luck'": lambda: family_metric('a.b', formula='', higher=True, best=1, range='', source='', needs='luck'),
    '499 deviations': lambda: empirical_null(np.arange(499.)), 'half of the deviations are equal': lambda: empirical_null(np.zeros(1000)),
    'the same doubles x genes': lambda: interactions(T, T[1:]), 'leave doubles out': lambda: interactions(T, T * np.nan)}.items())
def test_refused_in_one_line(says, make):
    with pytest.raises(Problem, match=says) as e: make()
    assert '\n' not in str(e.value)


def test_a_metric_of_the_wrong_shape_is_named():
    enter = family_metric('test.wrong', formula='', higher=True, best=1, range='', source='', needs='effects')
    try:
        enter(lambda c: 1.)
        with pytest.raises(Problem, match='test.wrong'): panel_scores(comparison(), ['test.wrong'])
    finally: FAMILIES.pop('test.wrong')


def test_weighted_error_and_r2():
    w = cellsimbench_weights(rng.normal(size=(N, G)))
    assert w.min() == 0 and w.max() == 1
    np.testing.assert_allclose(weighted_mse(P, T, w), [np.average((p - t)**2, weights=x) for p, t, x in zip(P, T, w)])
    np.testing.assert_allclose(weighted_r2(P, T, w), [sk.r2_score(t, p, sample_weight=x) for p, t, x in zip(P, T, w)])
    nothing, flat = 0 * w, np.ones_like(T)
    assert np.isnan(weighted_mse(P, T, nothing)).all()
    np.testing.assert_allclose(weighted_r2(P, T, nothing), [sk.r2_score(t, p) for p, t in zip(P, T)])
    assert (weighted_r2(flat, flat, w) == 1).all() and (weighted_r2(P, flat, w) == 0).all()
    assert (cellsimbench_weights(flat) == 0).all() and (cellsimbench_weights(np.full((1, 3), np.nan)) == 0).all()


def test_expected_hits_are_the_mean_over_orders_of_the_tied():
    scores, relevant = rng.integers(0, 4, size=(6, 25)).astype(float), rng.random((6, 25)) < .3
    drawn = np.zeros((6, 25))
    for _ in range(4000):
        order = np.lexsort((rng.random((6, 25)), -scores), axis=-1)
        drawn += np.take_along_axis(relevant, order, axis=-1)
    hits = expected_hits(scores, relevant)
    np.testing.assert_allclose(hits, drawn / 4000, atol=.05)
    np.testing.assert_allclose(hits.sum(1), relevant.sum(1))
    assert np.isnan(recall_at(0 * hits, 5)).all() and np.isnan(ndcg_at(0 * hits, 5)).all()
    np.testing.assert_allclose(recall_at(hits, 25), 1)


def test_the_empirical_null_finds_what_was_planted():
    noise, signal = rng.normal(-.03, .08, size=60000), np.concatenate([rng.normal(.6, .1, 1500), rng.normal(-.5, .1, 500)])
    z = np.concatenate([noise, signal])
    null, (low, high) = empirical_null(z), fdr_limits(z)
    assert null.mean == pytest.approx(-.03, abs=.003) and null.sd == pytest.approx(.08, rel=.05) and null.share == pytest.approx(60000 / 62000, abs=.03)
    called = (z < low) | (z > high)
    assert called[60000:].mean() > .95 and (called[:60000].sum() / called.sum()) < .02
    # where the local rate is 5 % by the true densities
    density = lambda x: (60000 * stats.norm.pdf(x, -.03, .08) + 1500 * stats.norm.pdf(x, .6, .1) + 500 * stats.norm.pdf(x, -.5, .1)) / 62000
    for limit in (low, high): assert 60000 / 62000 * stats.norm.pdf(limit, -.03, .08) / density(limit) == pytest.approx(.05, abs=.045)
    assert fdr_limits(np.append(z, 1e9)) == pytest.approx((low, high), abs=.01)  # an absurd value neither moves it nor needs memory
    lone = fdr_limits(rng.normal(size=60000))
    assert lone[0] < -3.5 and lone[1] > 3.5  # next to nothing is called in pure noise


def test_interactions_have_kinds():
    additive = rng.normal(scale=.2, size=(40, 300))
    additive[:, 0], additive[:, 1] = 2, 0
    real = additive + rng.normal(scale=.05, size=additive.shape)
    real[:10, 0], real[10:20, 0], real[20:30, 0], real[:10, 1] = 3, 1, -1, 1
    got = interactions(real, additive)
    assert (got.kind[:10, 0] == 'synergistic').all() and (got.kind[10:20, 0] == 'buffering').all() and (got.kind[20:30, 0] == 'opposite').all()
    assert (got.kind[:10, 1] == 'other').all() and (got.kind[~got.found] == '').all() and got.found.sum() == pytest.approx(40, abs=15)
    np.testing.assert_allclose(got.deviation, real - additive)


def test_detection_of_interactions():
    additive, found = rng.normal(size=(20, 50)), rng.random((20, 50)) < .1
    guess = np.round(additive + found * rng.normal(size=found.shape) + .3 * rng.normal(size=found.shape), 1)  # with ties
    score = np.round(np.abs(guess - additive), 6)
    got = interaction_scores(score, 0 * additive, found)
    assert got['auprc'] == pytest.approx(sk.average_precision_score(found.ravel(), score.ravel())) and got['auroc'] == pytest.approx(sk.roc_auc_score(found.ravel(), score.ravel()))
    curve = interaction_curve(score, 0 * additive, found)
    assert curve['fdp'].is_monotonic_increasing and curve['tpr'].is_monotonic_increasing and curve['tpr'].iloc[-1] == 1
    assert curve.loc[curve['fdp'] <= .5, 'tpr'].max() == got['tpr_fdp50']
    alone = interaction_scores(additive, additive, found)
    assert alone['auprc'] == pytest.approx(found.mean()) and alone['auroc'] == .5 and alone['tpr_fdp50'] == 0
    assert interaction_scores(additive.astype('float32'), additive, found)['auroc'] == .5  # dust is no deviation
    assert interaction_curve(additive, additive, found).to_numpy().tolist() == [[pytest.approx(1 - found.mean()), 1]]
    assert np.isnan(list(interaction_scores(guess, additive, 0 * found > 0).values())).all()
    small = Comparison(['A+B'], [('A', 'B')], ['A', 'B', 'C'], np.ones((1, 3)), np.ones((1, 3)), np.zeros(3), additive=np.zeros((1, 3)))
    assert np.isnan(values(small, 'ahlmann_eltze.interaction_auprc'))


@needs_shared
def test_interactions_of_norman():
    "Log ratios of this file, not the published log1p differences, and other genes; published: 4.1 % of 1,000 genes x 124 doubles."
    import anndata as ad
    data = ad.read_h5ad(SHARED / 'norman/norman_effects.h5ad')
    X, row = np.asarray(data.X, dtype=float), {c: i for i, c in enumerate(data.obs['condition'].astype(str))}
    doubles = [c for c in row if '+' in c and set(c.split('+')) <= set(row)]
    got = interactions(X[[row[c] for c in doubles]], np.array([sum(X[row[g]] for g in c.split('+')) for c in doubles]))
    assert len(doubles) > 90 and .01 < got.found.mean() < .06
    kinds = pd.Series(got.kind[got.found]).value_counts()
    assert {'buffering', 'synergistic', 'opposite'} <= set(kinds.index)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for guess in (P, 0 * P, np.tile(MEAN, (N, 1)), 1e6 * P): panel_scores(comparison(guess), list(MINE))
        panel_scores(comparison(effects=0 * T), list(MINE))
