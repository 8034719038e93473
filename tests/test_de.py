"""Differential expression: parity with SciPy, scanpy, pdex, statsmodels, scikit-learn and cell-eval; ties, degenerate genes and groups, and what is refused."""
import warnings
from dataclasses import replace

import anndata as ad
import numba as nb
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from sklearn import metrics as sk

from conftest import SHARED, needs_shared
from perturb_research.core import Problem
from perturb_research.evaluate import de as de_module
from perturb_research.evaluate.de import (
    FOLD_CHANGES, benjamini_hochberg, differential_expression, direction_match, direction_reach, direction_yield, expressed_in_control,
    fold_change_nmae, informedness, log10_p, markedness, matthews, n_significant, overlap_at, pr_auc, precision_at, restrict, roc_auc,
    significant_jaccard, significant_recall, spearman_fold_change, spearman_n_significant, top_genes, top_jaccard, top_recall)

N, G = 7, 60
NAMES = [f'P{i}' for i in range(N)]
GENES = [f'G{i:02d}' for i in range(G)]
SIZES = [90, 40, 25, 31, 12, 60, 5, 33]  # controls, then groups


def draw(seed, strength=1.):
    "Log-normalised cells of one side, float64 CSR, in random order: many zeros, an all-zero gene, a constant one, two alike."
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(-1, N), SIZES))
    effect = np.random.default_rng(99).normal(0, strength, (N + 1, G)) * (np.random.default_rng(98).random((N + 1, G)) < .4)
    effect[-1] = 0  # controls
    counts = rng.poisson(rng.lognormal(-.5, .2, (len(group), 1)) * np.random.default_rng(97).lognormal(0, 1.3, G) * np.exp(effect[group]))
    x = np.log1p(10. * counts / counts.mean())
    x[:, 3], x[:, 4], x[:, 6] = 0, 1.5, x[:, 5]
    x[:, 7] *= group == -1  # in controls alone
    x[:, 8] *= group == 1   # in one group alone
    return sp.csr_matrix(x), group


X, GROUP = draw(0)
DENSE = X.toarray()
PREDICTED, _ = draw(1, .8)
GROUP_P = draw(1)[1]
CONTROL = DENSE[GROUP == -1]


def de(x=X, group=GROUP, **kwargs):
    return differential_expression(x, group, **dict(groups=NAMES, genes=GENES) | kwargs)


def adata(x=X, group=GROUP):
    label = pd.Categorical.from_codes(group + 1, ['control', *NAMES])
    return ad.AnnData(x.copy(), pd.DataFrame({'target': label}, index=[f'c{i}' for i in range(len(group))]), pd.DataFrame(index=GENES))


REAL, OTHER = de(), de(PREDICTED, GROUP_P)


# ---------------------------------------------------------------- parity of the tests

@pytest.mark.parametrize('continuity', (True, False))
def test_wilcoxon_is_scipys(continuity):
    got = de(continuity=continuity)
    for i in range(N):
        with np.errstate(all='ignore'): theirs = stats.mannwhitneyu(DENSE[GROUP == i], CONTROL, use_continuity=continuity, method='asymptotic')
        np.testing.assert_allclose(got.p[i], np.nan_to_num(theirs.pvalue, nan=1.), rtol=1e-10)  # one value in all cells: SciPy NaN without continuity, here 1
        half = theirs.statistic - SIZES[i + 1] * SIZES[0] / 2
        assert (np.sign(got.score[i]) == np.sign(half) * (np.abs(half) > .5 * continuity)).all()


@pytest.mark.parametrize('choice', [dict(test='wilcoxon', tie_correct=True), dict(test='wilcoxon', tie_correct=False), dict(test='welch')], ids=str)
def test_scanpys_rank_genes_groups(choice):
    import scanpy as sc
    method = {'wilcoxon': 'wilcoxon', 'welch': 't-test'}[choice['test']]
    screen, ties = adata(), {k: v for k, v in choice.items() if k == 'tie_correct'}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sc.tl.rank_genes_groups(screen, 'target', reference='control', method=method, **ties)
    got = de(fold_change='scanpy', continuity=False, **choice)
    for i, name in enumerate(NAMES):
        theirs = sc.get.rank_genes_groups_df(screen, name).set_index('names').loc[GENES]
        usual = np.setdiff1d(np.arange(G), [4])  # the constant gene: rounding of its mean decides in scanpy's t-test
        for ours, column in ((got.score, 'scores'), (got.p, 'pvals'), (got.log2_fold_change, 'logfoldchanges')):
            np.testing.assert_allclose(ours[i, usual], theirs[column].to_numpy()[usual], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.p_adjusted[i], theirs['pvals_adj'], rtol=1e-6)


def test_welch_is_scipys():
    got = de(test='welch')
    usual = [g for g in range(G) if g not in (3, 4)]
    for i in range(N):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            theirs = stats.ttest_ind(DENSE[GROUP == i][:, usual], CONTROL[:, usual], equal_var=False)
        np.testing.assert_allclose(got.score[i, usual], np.nan_to_num(theirs.statistic, nan=0), rtol=1e-8)  # neither side has the gene: SciPy NaN, here 0 and 1
        np.testing.assert_allclose(got.p[i, usual], np.nan_to_num(theirs.pvalue, nan=1), rtol=1e-8)
    assert (got.score[:, [3, 4]] == 0).all() and (got.p[:, [3, 4]] == 1).all()  # SciPy: NaN


def test_adjusted_p_are_scipys_and_statsmodels():
    from statsmodels.stats.multitest import multipletests
    p = np.random.default_rng(0).random((20, 300))**4
    p[:, ::7] = p[:, 1::7]  # ties
    adjusted = benjamini_hochberg(p)
    np.testing.assert_allclose(adjusted, stats.false_discovery_control(p, axis=1), rtol=1e-12)
    np.testing.assert_allclose(adjusted[0], multipletests(p[0], method='fdr_bh')[1], rtol=1e-12)
    gaps = np.where(np.random.default_rng(1).random(p.shape) < .3, np.nan, p)
    for ours, row in zip(benjamini_hochberg(gaps), gaps):
        np.testing.assert_allclose(ours[~np.isnan(row)], stats.false_discovery_control(row[~np.isnan(row)]), rtol=1e-12)
        assert np.isnan(ours[np.isnan(row)]).all()
    assert np.isnan(benjamini_hochberg([np.nan, np.nan])).all() and benjamini_hochberg([.3]) == [.3]


def pdexs(**kwargs):
    from pdex import pdex
    return pdex(adata(), groupby='target', reference='control', mode='ref', is_log1p=True, threads=1, as_pandas=True, **kwargs).set_index(['target', 'feature'])


def test_defaults_are_pdexs_as_cell_eval_calls_it():
    theirs = pdexs(epsilon=0.).loc[[(n, g) for n in NAMES for g in GENES]]
    ours = REAL.table()
    for mine, column in (('p', 'p_value'), ('p_adjusted', 'fdr')): np.testing.assert_allclose(ours[mine], theirs[column], rtol=1e-9)
    finite = np.isfinite(theirs['log2_fold_change'].to_numpy())
    np.testing.assert_allclose(ours['log2_fold_change'][finite], theirs['log2_fold_change'][finite], rtol=1e-6, atol=1e-12)
    assert (ours['log2_fold_change'].to_numpy()[~finite] == theirs['log2_fold_change'].to_numpy()[~finite]).all() and (~finite).sum() > 3
    assert np.isneginf(REAL.log2_fold_change[0, 7]) and REAL.log2_fold_change[0, 3] == 0


def test_arithmetic_fold_change_is_pdexs():
    theirs = pdexs(epsilon=1e-11, geometric_mean=False)['log2_fold_change'].loc[[(n, g) for n in NAMES for g in GENES]]  # counts per 1e4: its epsilon a hundredth
    np.testing.assert_allclose(de(fold_change='cpm').log2_fold_change.ravel(), theirs, rtol=1e-6, atol=1e-9)


def test_fold_changes_by_hand():
    mean = np.stack([DENSE[GROUP == i].mean(0) for i in range(N)])
    both = (mean > 0) & (CONTROL.mean(0) > 0)
    np.testing.assert_allclose(REAL.mean, mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(REAL.control_mean, CONTROL.mean(0), rtol=1e-12)
    expected = {'pdex': np.log2(np.expm1(mean[both]) / np.expm1(np.broadcast_to(CONTROL.mean(0), mean.shape)[both]))}
    expected['scanpy'] = expected['pdex']
    linear = np.stack([np.expm1(DENSE[GROUP == i]).mean(0) for i in range(N)])
    expected['cpm'] = np.log2(linear[both] / np.broadcast_to(np.expm1(CONTROL).mean(0), mean.shape)[both])
    expected['difference'] = ((mean - CONTROL.mean(0)) / np.log(2))[both]
    for how in FOLD_CHANGES: np.testing.assert_allclose(de(fold_change=how).log2_fold_change[both], expected[how], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- the set metrics

def comparison(real, predicted):
    "Two of our tables as cell-eval holds them."
    import polars as pl
    from cell_eval._types import initialize_de_comparison
    names = dict(group='target', gene='feature', p='p_value', p_adjusted='fdr')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        return initialize_de_comparison(*(pl.DataFrame(t.table().rename(columns=names).drop(columns='score').to_dict('list')) for t in (real, predicted)))


def cell_evals(real, predicted):
    "Every DE metric of cell-eval on two of our tables."
    from cell_eval._types import MetricType
    from cell_eval.metrics import metrics_registry
    pair = comparison(real, predicted)
    return {name: metrics_registry.compute(name, pair) for name in metrics_registry.list_metrics(MetricType.DE)}


def quiet(table, *rows):
    "`table` with nothing significant in `rows`."
    p = table.p_adjusted.copy()
    p[list(rows)] = 1
    return replace(table, p_adjusted=p)


@pytest.mark.parametrize('real, predicted', [(REAL, OTHER), (OTHER, REAL), (REAL, REAL), (quiet(REAL, 0, 2), quiet(OTHER, 2, 3)), (REAL, quiet(OTHER, *range(N)))],
                         ids=('pair', 'swapped', 'itself', 'some quiet', 'nothing predicted'))
def test_set_metrics_are_cell_evals(real, predicted):
    theirs = cell_evals(real, predicted)
    ours = {'de_direction_match': direction_match(real, predicted), 'de_spearman_lfc_sig': spearman_fold_change(real, predicted),
            'de_sig_genes_recall': significant_recall(real, predicted), 'pr_auc': pr_auc(real, predicted), 'roc_auc': roc_auc(real, predicted)}
    for k in (None, 50, 100, 200, 500): ours |= {f'overlap_at_{k or "N"}': overlap_at(real, predicted, k), f'precision_at_{k or "N"}': precision_at(real, predicted, k)}
    for name, values in ours.items():
        np.testing.assert_allclose(values, [np.nan if theirs[name].get(n) is None else theirs[name][n] for n in NAMES], rtol=1e-6, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(spearman_n_significant(real, predicted), theirs['de_spearman_sig'], rtol=1e-6)
    assert [theirs['de_nsig_counts'][n]['real'] for n in NAMES] == n_significant(real).tolist()
    assert set(theirs) == {*ours, 'de_spearman_sig', 'de_nsig_counts'}


@pytest.mark.parametrize('k', (1, 3, 6, 10))
def test_short_heads_and_ties_are_cell_evals(k):
    from cell_eval.metrics._de import de_overlap_metric
    tied = [replace(t, log2_fold_change=np.round(t.log2_fold_change)) for t in (REAL, OTHER)]  # many equal fold changes: the earlier gene first
    for pair in ((REAL, OTHER), tied):
        for metric, ours in (('overlap', overlap_at), ('precision', precision_at)):
            theirs = de_overlap_metric(comparison(*pair), k, metric)
            np.testing.assert_allclose(ours(*pair, k), [theirs[n] for n in NAMES], rtol=1e-12)


def test_the_example_is_not_trivial():
    assert (n_significant(REAL) > 5).sum() >= 4 and (n_significant(REAL) == 0).sum() <= 2
    assert 0 < np.nanmean(overlap_at(REAL, OTHER)) < 1 and np.unique(overlap_at(REAL, OTHER, 5)).size > 2


def test_heads_shorter_than_the_lists():
    for f, who in ((overlap_at, 0), (precision_at, 1)):
        for k in (1, 3, 10):
            lists = [[sorted(np.flatnonzero(t.significant()[i]), key=lambda g: (-abs(np.float32(t.log2_fold_change[i, g])), g)) for i in range(N)] for t in (REAL, OTHER)]
            cut = [min(k, len(lists[who][i])) for i in range(N)]
            expected = [len({*a[:c]} & {*b[:c]}) / c if c else 0 for a, b, c in zip(*lists, cut)]
            np.testing.assert_allclose(f(REAL, OTHER, k), expected)


def test_areas_and_chance_corrected_are_scikit_learns():
    for i in range(N):
        label, call = REAL.significant()[i], OTHER.significant()[i]
        if not label.any(): continue
        score = -OTHER.p_adjusted[i]
        assert pr_auc(REAL, OTHER)[i] == pytest.approx(sk.average_precision_score(label, score), rel=1e-6)
        assert roc_auc(REAL, OTHER)[i] == pytest.approx(sk.roc_auc_score(label, score), rel=1e-6)
        if call.any() and not call.all():
            assert matthews(REAL, OTHER)[i] == pytest.approx(sk.matthews_corrcoef(label, call))
            assert informedness(REAL, OTHER)[i] == pytest.approx(2 * sk.balanced_accuracy_score(label, call) - 1)
            assert markedness(REAL, OTHER)[i] == pytest.approx(2 * sk.balanced_accuracy_score(call, label) - 1)
        assert significant_jaccard(REAL, OTHER)[i] == pytest.approx(sk.jaccard_score(label, call))


def by_hand(real, predicted, i):
    "cell-eval2's direction yield, reach and fold-change error of one group, as its document says them."
    sig, call = real.significant()[i], predicted.significant()[i]
    lfc, guess = real.log2_fold_change[i], np.where(np.isnan(predicted.p[i]), np.nan, predicted.log2_fold_change[i])
    signed = (lfc != 0) & ~np.isnan(real.p[i])
    n_real, n_pred = sig.sum(), (call & signed).sum()
    k = sum(np.sign(guess[g]) == np.sign(lfc[g]) for g in np.flatnonzero(call & signed))
    order = sorted(np.flatnonzero(sig), key=lambda g: (not call[g], np.nan_to_num(predicted.p_adjusted[i, g], nan=9), np.nan_to_num(predicted.p[i, g], nan=9), -abs(guess[g]) if guess[g] == guess[g] else 0, GENES[g]))
    right, reach = [], 0
    for g in order:
        if signed[g]: right.append(np.sign(guess[g]) == np.sign(lfc[g]))
        if right and np.mean(right) >= .9: reach = len(right)
    gate = np.flatnonzero(sig & np.isfinite(lfc))
    fill = np.where(np.isfinite(guess), guess, 0)
    nmae = np.abs(fill - lfc)[gate].sum() / np.abs(lfc[gate]).sum() if len(gate) >= 10 else np.nan
    return k / max(n_pred, n_real) if max(n_pred, n_real) else np.nan, reach / n_real if n_real else np.nan, nmae


@pytest.mark.parametrize('masks', [(None, None), (np.arange(G) < 45, np.arange(G) > 10)], ids=('all genes', 'other genes tested'))
def test_cell_eval2_by_hand(masks):
    rng = np.random.default_rng(3)
    flipped = replace(OTHER, log2_fold_change=np.where(rng.random((N, G)) < .05, 0, OTHER.log2_fold_change) * np.where(rng.random((N, G)) < .1, -1, 1))
    real, predicted = (t if m is None else restrict(t, m) for t, m in zip((REAL, flipped), masks))
    expected = np.array([by_hand(real, predicted, i) for i in range(N)], dtype=float).T
    for f, values in zip((direction_yield, direction_reach, fold_change_nmae), expected): np.testing.assert_allclose(f(real, predicted), values, rtol=1e-9, err_msg=f.__name__)
    assert np.isfinite(expected).sum() > 10


def test_reach_recovers_after_an_early_miss():
    p = np.sort(np.random.default_rng(0).random((1, 10))) / 1e3
    real = replace(REAL, groups=REAL.groups[:1], genes=REAL.genes[:10], p=p, p_adjusted=p, log2_fold_change=np.ones((1, 10)), score=np.ones((1, 10)))
    guess = np.ones((1, 10))
    guess[0, 0] = -1
    assert direction_reach(real, replace(real, log2_fold_change=guess)) == [1.]  # one miss, nine hits: .9
    guess[0, 5] = -1
    assert direction_reach(real, replace(real, log2_fold_change=guess)) == [0.]


def test_tops():
    real, other = de(test='welch'), de(PREDICTED, GROUP_P, test='welch')
    for k in (3, 20, 100):
        a, b = ([sorted(range(G), key=lambda g: (-abs(t.score[i, g]), g))[:k] for i in range(N)] for t in (real, other))
        assert [row[row >= 0].tolist() for row in top_genes(real, k)] == a
        np.testing.assert_allclose(top_recall(real, other, k), [len({*x} & {*y}) / len(x) for x, y in zip(a, b)])
        np.testing.assert_allclose(top_jaccard(real, other, k), [len({*x} & {*y}) / len({*x} | {*y}) for x, y in zip(a, b)])
    for i in range(N):  # GEARS' lists
        ranked = sorted(range(G), key=lambda g: (-abs(real.score[i, g]), g))
        shown = [g for g in ranked if real.mean[i, g] != 0]
        assert top_genes(real, G, 'non_zero')[i].tolist() == shown + [-1] * (G - len(shown))
        assert top_genes(real, 20, 'non_dropout')[i].tolist() == [g for g in ranked if real.mean[i, g] != 0 or real.control_mean[g] == 0][:20]
    with pytest.raises(Problem, match='non_zero'): top_genes(real, keep='nonzero')


def test_degenerate_values_are_the_stated_ones():
    silent, loud = quiet(OTHER, *range(N)), replace(OTHER, p_adjusted=np.zeros((N, G)))
    none = quiet(REAL, *range(N))
    has = n_significant(REAL) > 0
    for f in (overlap_at, precision_at): assert (f(REAL, silent) == 0).all() and (f(none, OTHER) == 0).all()
    for f in (direction_match, spearman_fold_change, significant_recall, pr_auc, roc_auc, direction_reach, fold_change_nmae): assert np.isnan(f(none, OTHER)).all()
    assert np.isnan(direction_yield(none, silent)).all() and (direction_yield(REAL, silent)[has] == 0).all()
    assert (significant_jaccard(none, silent) == 1).all() and (significant_jaccard(REAL, silent)[has] == 0).all()
    for f in (markedness, matthews): assert (f(REAL, silent) == -1).all() and (f(REAL, loud) == -1).all()
    assert (informedness(REAL, loud)[has] == 0).all() and (informedness(none, OTHER) == -1).all()
    assert spearman_n_significant(none, OTHER) == 1 and np.isnan(spearman_n_significant(REAL, silent))


def test_restricting_the_tests():
    own = np.ones((N, G), bool)
    own[np.arange(N), np.arange(N)] = False
    less = restrict(REAL, own)
    for i in range(N): np.testing.assert_allclose(np.delete(less.p_adjusted[i], i), stats.false_discovery_control(np.delete(REAL.p[i], i)), rtol=1e-12)
    assert not less.significant()[np.arange(N), np.arange(N)].any() and np.array_equal(less.score, REAL.score)
    expected = np.expm1(CONTROL).mean(0) * 100 > 300
    for x in (X, DENSE): assert np.array_equal(expressed_in_control(x, GROUP, 300), expected)
    assert 0 < expected.sum() < G
    assert not (top_genes(restrict(REAL, expected), G)[:, :expected.sum()] == -1).any()


# ---------------------------------------------------------------- adversaries

def same(a, b):
    for name in ('score', 'p', 'p_adjusted', 'log2_fold_change', 'mean', 'control_mean'): np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_no_matter_the_container():
    same(REAL, de(DENSE))
    same(REAL, de(X.tocsc()))
    same(REAL, de(np.asfortranarray(DENSE)))
    zeros = sp.csr_matrix((np.r_[X.data, 0, 0], np.r_[X.indices, 3, 3], np.r_[X.indptr[:-1], X.nnz + 2]), shape=X.shape)  # explicit zeros, twice
    same(REAL, de(zeros))
    before = X.copy()
    de()
    assert (before != X).nnz == 0
    single = de(X.astype(np.float32))
    np.testing.assert_allclose(single.p, de(X.astype(np.float32).astype(np.float64)).p, rtol=1e-12)


def test_permuted_cells_are_the_same_cells():
    order = np.random.default_rng(5).permutation(len(GROUP))
    other = de(X[order], GROUP[order])
    assert np.array_equal(other.p, REAL.p) and np.array_equal(other.score, REAL.score)  # of ranks: exact
    np.testing.assert_allclose(other.log2_fold_change[np.isfinite(REAL.log2_fold_change)], REAL.log2_fold_change[np.isfinite(REAL.log2_fold_change)], rtol=1e-9, atol=1e-12)
    swapped = de(X, np.where(GROUP < 0, -1, N - 1 - GROUP))
    assert np.array_equal(swapped.p[::-1], REAL.p)


def test_threads_change_nothing(monkeypatch):
    mean = de(test='welch', fold_change='cpm')
    for threads in (1, 3, 8):
        monkeypatch.setattr(nb.config, 'NUMBA_NUM_THREADS', threads)
        same(REAL, de())
        same(mean, de(test='welch', fold_change='cpm'))


def test_dense_blocks_change_nothing(monkeypatch):
    monkeypatch.setattr(de_module, 'AT_ONCE', 7 * len(GROUP))  # seven genes at a time
    same(REAL, de(DENSE))
    same(de(X, test='welch'), de(DENSE, test='welch'))


@pytest.mark.parametrize('dtype', (np.int8, np.int64, np.float32, bool))
def test_integers_are_numbers(dtype):
    whole = (DENSE > 1).astype(dtype) if dtype is bool else np.round(3 * DENSE).astype(dtype)
    got, expected = de(whole, fold_change='difference'), de(whole.astype(float), fold_change='difference')
    np.testing.assert_allclose(got.p, expected.p, rtol=1e-12)
    np.testing.assert_allclose(got.p[0], [1. if len(np.unique(a)) == len(np.unique(b)) == 1 and a[0] == b[0] else stats.mannwhitneyu(a, b, method='asymptotic').pvalue
                                          for a, b in zip(whole[GROUP == 0].astype(float).T, whole[GROUP == -1].astype(float).T)], rtol=1e-9)


def test_negative_values_and_zeros_in_between():
    shifted = np.round(DENSE - .8, 1) * (DENSE != 1.5)
    shifted[np.abs(shifted) < .3] = 0
    shifted[::3] *= -1
    shifted[shifted == 0] = -0.
    for x in (shifted, sp.csr_matrix(shifted), shifted.astype(np.float32)):
        got = de(x)
        for i in (0, 5):
            a, b = np.asarray(shifted[GROUP == i], dtype=float), np.asarray(shifted[GROUP == -1], dtype=float)
            usual = [g for g in range(G) if np.ptp(np.r_[a[:, g], b[:, g]]) > 0]
            np.testing.assert_allclose(got.p[i, usual], stats.mannwhitneyu(a[:, usual], b[:, usual], method='asymptotic').pvalue, rtol=1e-6)
        assert not np.isnan(got.log2_fold_change).any()


@pytest.mark.parametrize('test', ('wilcoxon', 'welch'))
@pytest.mark.parametrize('value', (0., 1.5, -2.7))
def test_all_tied(value, test):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = de(np.full_like(DENSE, value), test=test)
    assert (got.score == 0).all() and (got.p == 1).all() and (got.p_adjusted == 1).all() and np.allclose(got.log2_fold_change, 0)
    assert not got.significant().any()


def test_two_unequal_constants():
    x = np.where((GROUP == -1)[:, None], 1.25, 2.25) * np.ones((1, 3))
    rank, mean = differential_expression(x, GROUP), differential_expression(x, GROUP, test='welch')
    np.testing.assert_allclose(rank.p[0], stats.mannwhitneyu(x[GROUP == 0], x[GROUP == -1], method='asymptotic').pvalue)
    assert np.isposinf(mean.score).all() and (mean.p == 0).all()


def test_one_cell_in_a_group():
    group = np.where(GROUP == 6, -1, GROUP)
    group[np.flatnonzero(GROUP == 6)[0]] = 6
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        rank, mean = de(group=group), de(group=group, test='welch')
    a, b = DENSE[group == 6], DENSE[group == -1]
    usual = [g for g in range(G) if g not in (3, 4)]
    np.testing.assert_allclose(rank.p[6, usual], stats.mannwhitneyu(a[:, usual], b[:, usual], method='asymptotic').pvalue)
    assert (mean.score[6] == 0).all() and (mean.p[6] == 1).all()
    assert rank.n_cells[6] == 1 and rank.n_control == (group == -1).sum()


def test_extreme_p_keeps_its_size():
    x = np.r_[np.arange(9000.), np.arange(4000.) + 1e5][:, None] / 1e5
    got = differential_expression(x, np.r_[np.full(9000, -1), np.zeros(4000, int)], fold_change='difference')
    assert got.score[0, 0] > 60 and got.p[0, 0] == 0 and got.p_adjusted[0, 0] == 0
    assert np.isfinite(log10_p(got.score)).all() and log10_p(got.score)[0, 0] < -700
    np.testing.assert_allclose(log10_p(np.array([1., -8, 30])), np.log10(2 * stats.norm.sf([1, 8, 30])), rtol=1e-12)
    assert log10_p(0.) == pytest.approx(0, abs=1e-12)


def test_many_groups_and_large_runs():
    rng = np.random.default_rng(0)
    group = np.r_[np.full(50, -1), np.repeat(np.arange(3000), 2)]
    x = rng.integers(0, 3, (len(group), 2)).astype(float)
    got = differential_expression(x, group, fold_change='difference')
    for i in (0, 1234, 2999): np.testing.assert_allclose(got.p[i], stats.mannwhitneyu(x[group == i], x[group == -1], method='asymptotic').pvalue)


def with_nan():
    x = DENSE.copy()
    x[2, 3] = np.nan
    return x


@pytest.mark.parametrize('says, change', {
    'X: 1 values are NaN': dict(x=with_nan()), 'X: 1 values are NaN or infinite': dict(x=sp.csr_matrix(with_nan())), 'X: <U': dict(x=DENSE.astype(str)),
    r'X: float64 of shape \(0': dict(x=DENSE[:0], group=GROUP[:0]), 'group: float64': dict(group=GROUP.astype(float)), r'group: int64 of shape \(295': dict(group=GROUP[1:]),
    "no cells of 1 of the 7 groups, the first 'P2'": dict(group=np.where(GROUP == 2, 3, GROUP)), 'group: 0 control cells': dict(group=np.abs(GROUP)),
    'group: values from -2': dict(group=GROUP * 2), 'group: values from -1 to 6; expected': dict(groups=NAMES[1:]), 'groups, genes: 7 and 59 names': dict(genes=GENES[1:]),
    "test is 't'": dict(test='t'), "fold_change is 'log'": dict(fold_change='log'), 'whole numbers up to .* look like counts': dict(x=np.round(3 * DENSE)),
    'values up to .* look like counts': dict(x=100 * DENSE)}.items())
def test_refused_in_one_line(says, change):
    with pytest.raises(Problem, match=says) as e: de(**change)
    assert '\n' not in str(e.value)


def test_other_tables_are_refused():
    other = de(groups=NAMES[::-1])
    for f in (overlap_at, direction_match, spearman_fold_change, spearman_n_significant, significant_recall, pr_auc, roc_auc, direction_yield, direction_reach,
              significant_jaccard, fold_change_nmae, matthews, top_recall):
        with pytest.raises(Problem, match='its groups are not those'): f(REAL, other)
    with pytest.raises(Problem, match='its genes'): overlap_at(REAL, de(genes=GENES[::-1]))


def test_a_known_null_is_rarely_called():
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(np.log1p(rng.poisson(1., (1100, 400)) * 1.1))
    p = differential_expression(x, np.repeat(np.arange(-1, 10), 100)).p
    assert .035 < (p < .05).mean() < .06 and stats.kstest(p.ravel(), 'uniform').statistic < .02


@needs_shared
def test_real_cells():
    screen = ad.read_h5ad(SHARED/'norman'/'norman_mcfaline_cells.h5ad')
    column = next(c for c in ('condition', 'perturbation', 'target') if c in screen.obs)
    labels = screen.obs[column].astype(str).to_numpy()
    line = next((c for c in ('cell_line', 'cell_type', 'context') if c in screen.obs), None)
    if line is not None:
        rows = (screen.obs[line] == screen.obs[line].value_counts().index[0]).to_numpy()
        screen, labels = screen[rows], labels[rows]
    control = next(c for c in ('control', 'ctrl', 'non-targeting') if c in labels)
    names = [n for n in pd.unique(labels) if n != control][:5]
    group = pd.Index(names).get_indexer(labels)
    keep = (group >= 0) | (labels == control)
    x, group = sp.csr_matrix(screen.X)[keep], group[keep]
    got = differential_expression(x, group, groups=names)
    a, b = x[group == 0].toarray(), x[group == -1].toarray()
    with np.errstate(all='ignore'): theirs = stats.mannwhitneyu(a, b, method='asymptotic').pvalue
    np.testing.assert_allclose(got.p[0], np.nan_to_num(theirs, nan=1), rtol=1e-8)
    assert got.significant().any(1).sum() >= 3
