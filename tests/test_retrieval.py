"Retrieval: distances against scipy and against explicit masking, ranks against all orders of ties, chance against simulation."
from itertools import combinations, permutations
from math import comb
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from perturb_research.core import Problem
from perturb_research.data.splits import target_genes
from perturb_research.evaluate.retrieval import (DISTANCES, KS, MASKS, ask, by_candidate, candidate_genes, cell_votes, chance_scores, de_overlap, distances,
                                                 gallery_files, graded_scores, hidden_genes, incidence, leading_axes, leftover, name_causes, popularity, pose, questions, read_gallery,
                                                 retrieval_scores, target_activation, way_scores, whitened)

DATA = Path(__file__).parents[2]/'shared'/'data'


def rng(seed=0): return np.random.default_rng(seed)


def table(names, kind='CRISPRa', **columns):
    return pd.DataFrame({'perturbation': names, 'perturbation_type': kind, 'context': 'x', 'dose': np.nan} | columns, index=[f'{i}|{n}' for i, n in enumerate(names)])


def screen(n_genes=30, singles='ABCDE', seed=0):
    "Singles and all their pairs, added up; the read-out holds the perturbed genes too."
    genes = [*singles, *(f'g{i}' for i in range(n_genes))]
    alone = dict(zip(singles, rng(seed).normal(size=(len(singles), len(genes)))))
    pairs = [f'{a}+{b}' for a, b in combinations(singles, 2)]
    X = np.array([*alone.values(), *(alone[p[0]] + alone[p[-1]] for p in pairs)])
    return ad.AnnData(X, table([*singles, *pairs]), pd.DataFrame(index=genes))


# distances

def test_distances_agree_with_scipy():
    query, gallery = rng().normal(size=(7, 40)), rng(1).normal(size=(11, 40))
    for mine, theirs in (('cosine', 'cosine'), ('pearson', 'correlation'), ('euclidean', 'euclidean')):
        np.testing.assert_allclose(distances(query, gallery, mine), cdist(query, gallery, theirs), atol=1e-12)
    rho = spearmanr(query.round(), gallery.round(), axis=1).statistic[:7, 7:]
    np.testing.assert_allclose(distances(query.round(), gallery.round(), 'spearman'), 1 - rho, atol=1e-12)


@pytest.mark.parametrize('distance', DISTANCES)
def test_own_mask_is_the_explicit_computation(distance):
    query, gallery = rng().normal(size=(9, 25)), rng(1).normal(size=(13, 25))
    gallery[:, 3] *= 100  # a gene that decides everything where it is shown
    hidden = rng(2).random((9, 25)) < .15
    explicit = [distances(q[None, ~h], gallery[:, ~h], distance)[0] for q, h in zip(query, hidden)]
    np.testing.assert_allclose(distances(query, gallery, distance, hidden), explicit, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(distances(query, gallery, distance, hidden[0])[0], explicit[0], rtol=1e-9, atol=1e-9)


def test_a_vector_without_direction_is_at_distance_one():
    gallery = np.vstack([rng().normal(size=(3, 8)), np.zeros(8), np.full(8, .3)])
    for distance in ('cosine', 'pearson', 'spearman'):
        assert (distances(np.zeros((1, 8)), gallery, distance) == 1).all()
        assert distances(gallery[:1], gallery, distance)[0, 3] == 1
    assert (distances(gallery[:2], gallery, 'pearson')[:, 4] == 1).all()
    spike = np.zeros((1, 8))
    spike[0, 2] = 7.7  # nothing is left of it when its gene is hidden
    assert (distances(gallery[:1], spike, 'cosine', np.arange(8)[None] == 2) == 1).all()


def test_equal_vectors_are_at_distance_nought_in_every_distance():
    X = rng().normal(size=(5, 300)).astype(np.float32) * 50 + 3
    for distance in DISTANCES: np.testing.assert_allclose(np.diag(distances(X, X, distance)), 0, atol=1e-12)


def test_bad_arrays_are_refused():
    good = np.ones((2, 4))
    with pytest.raises(Problem, match='4 genes, but the queries have 3'): distances(good[:, :3], good)
    with pytest.raises(Problem, match='query: 1 effects are not finite'): distances(np.array([[1, np.nan, 2, 3]]), good)
    with pytest.raises(Problem, match="'manhattan' is unknown"): distances(good, good, 'manhattan')


# masks

def test_masks():
    genes = list('ABCDE')
    query, candidates = [['A', 'B'], ['Z']], [['A'], ['C'], ['A', 'Y']]
    assert not hidden_genes('none', query, candidates, genes).any()
    assert hidden_genes('all', query, candidates, genes).tolist() == [True, False, True, False, False]
    assert hidden_genes('own', query, candidates, genes).tolist() == [[True, True, False, False, False], [False] * 5]
    with pytest.raises(Problem, match='hides all 2 genes'): hidden_genes('all', query, candidates, ['A', 'C'])
    with pytest.raises(Problem, match='hides all 2 genes'): hidden_genes('own', query, candidates, ['A', 'B'])
    with pytest.raises(Problem, match="'mine' is unknown"): hidden_genes('mine', query, candidates, genes)


def test_incidence_passes_over_unknown_names():
    assert incidence([['A', 'Q'], [], ['C', 'A']], list('ABC')).tolist() == [[True, False, False], [False] * 3, [True, False, True]]


# ranks

def all_orders(distance, exact, relevant, ks):
    "The metrics of one query, averaged over every order of all candidates that respects the distances."
    n, scores = len(distance), []
    for order in permutations(range(n)):
        if (np.diff([distance[i] for i in order if np.isfinite(distance[i])]) < 0).any(): continue
        if any(np.isinf(distance[a]) and np.isfinite(distance[b]) for a, b in zip(order, order[1:])): continue
        rank = 1 + order.index(exact)
        scores.append([*(rank <= k for k in ks), *(bool(set(order[:k]) & set(relevant)) for k in ks), 1 / rank, rank])
    return np.mean(scores, axis=0)


@pytest.mark.parametrize('seed', range(25))
def test_ties_are_the_mean_over_all_orders(seed):
    draw, ks = rng(seed), (1, 2, 3, 5, 8)
    n = int(draw.integers(3, 7))
    distance = draw.choice([.1, .2, .3, np.inf], size=n)
    truth = int(draw.integers(n))
    relevant = np.unique([truth, *draw.integers(n, size=2)])
    got = retrieval_scores(distance[None], np.arange(n)[None] == truth, np.isin(np.arange(n), relevant)[None], ks)
    np.testing.assert_allclose(got.to_numpy()[0], all_orders(distance, truth, relevant, ks), atol=1e-12)


def test_no_ties_gives_the_plain_rank():
    distance = rng().random((40, 60))
    truth = rng(1).integers(60, size=40)
    exact = np.arange(60) == truth[:, None]
    rank = 1 + (distance < distance[exact][:, None]).sum(1)
    got = retrieval_scores(distance, exact, exact)
    np.testing.assert_array_equal(got['rank'], rank)
    np.testing.assert_allclose(got['mrr'], 1 / rank)
    for k in KS: np.testing.assert_array_equal(got[f'exact@{k}'], rank <= k)


def test_chance_is_the_closed_form_and_the_simulation():
    chance = chance_scores(210, [39, 20, 1], (1, 8))
    np.testing.assert_allclose(chance['exact@8'], 8 / 210)
    np.testing.assert_allclose(chance['relevant@8'], [1 - comb(210 - m, 8) / comb(210, 8) for m in (39, 20, 1)])
    assert chance['relevant@1'].round(3).tolist()[:2] == [.186, .095]
    assert chance['relevant@8'].round(3).tolist()[:2] == [.813, .557]
    assert chance['rank'].tolist() == [105.5] * 3
    exact, relevant = np.arange(210) == np.zeros((4000, 1)), np.arange(210) < np.full((4000, 1), 39)
    drawn = retrieval_scores(rng().random((4000, 210)), exact, relevant, (1, 8))
    spread = 4 * drawn.std() / np.sqrt(len(drawn))
    assert ((drawn.mean() - chance.iloc[0]).abs() < spread).all()


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('distance', DISTANCES)
def test_a_constant_gallery_lands_exactly_on_chance(distance, mask):
    effects = screen(n_genes=400, singles='ABCDEFGHIJKLMNOPQRST')
    question = pose(effects[20:], candidate_genes(effects.obs, pairs=True))
    assert len(question.candidates) == 210
    same = effects.copy()
    same.X = np.repeat(effects.X.mean(0, keepdims=True), effects.n_obs, axis=0)
    got = retrieval_scores(ask(question, same, distance, mask), question.exact, question.relevant)
    assert got.equals(chance_scores(210, question.relevant.sum(1)))


def test_a_query_without_effect_lands_on_chance():
    effects = screen()
    asked = effects[5:7].copy()
    asked.X[:] = 0
    question = pose(asked, candidate_genes(effects.obs))
    for distance in ('cosine', 'pearson', 'spearman'):
        got = retrieval_scores(ask(question, effects, distance), question.exact, question.relevant)
        assert got.equals(chance_scores(15, question.relevant.sum(1)))


def test_a_truth_that_the_gallery_lacks_is_drawn_from_what_it_lacks():
    effects = screen()
    question = pose(effects[5:], candidate_genes(effects.obs, pairs=True))
    got = retrieval_scores(ask(question, effects[:5]), question.exact, question.relevant, (1, 5, 6, 10, 15))
    assert (got['rank'] == 5 + (1 + 10) / 2).all()
    np.testing.assert_allclose(got[['exact@1', 'exact@5', 'exact@6', 'exact@10', 'exact@15']], [[0, 0, .1, .5, 1]] * 10, atol=1e-12)
    np.testing.assert_allclose(got['mrr'], np.mean(1 / np.arange(6, 16)))
    assert (got['relevant@1'] == 1).all()  # the sum of two vectors is nearest to one of them


def test_a_query_that_is_no_candidate_is_refused():
    effects = screen()
    question = pose(effects[:1], {'B': ['B'], 'C': ['C']})
    with pytest.raises(Problem, match='no true candidate'): retrieval_scores(ask(question, effects), question.exact, question.relevant)


# questions

@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('distance', DISTANCES)
def test_order_of_genes_rows_and_candidates_changes_nothing(distance, mask):
    effects = screen()
    gallery = effects.copy()
    gallery.X = effects.X + rng(3).normal(size=effects.shape)
    question = pose(effects[5:], candidate_genes(effects.obs, pairs=True))
    first = retrieval_scores(ask(question, gallery, distance, mask), question.exact, question.relevant)
    shuffled = gallery[rng(4).permutation(gallery.n_obs), rng(5).permutation(gallery.n_vars)]
    names = list(question.candidates)
    other = pose(effects[5:, rng(6).permutation(effects.n_vars)], {names[i]: question.candidates[names[i]] for i in rng(7).permutation(len(names))})
    second = retrieval_scores(ask(other, shuffled, distance, mask), other.exact, other.relevant)
    np.testing.assert_allclose(first, second, atol=1e-12)


def test_the_mask_takes_away_the_lookup():
    "Effects that are noise but for the perturbed gene: even its own gene hidden it is found, as wrong candidates' genes are shown; not with all hidden."
    names = [f'p{i:02}' for i in range(40)]
    genes = [*names, *(f'g{i}' for i in range(60))]
    spiked = lambda seed: ad.AnnData(rng(seed).normal(size=(40, 100)) + 30 * np.eye(40, 100), table(names), pd.DataFrame(index=genes))
    question = pose(spiked(1), candidate_genes(table(names)))
    exact_at_1 = {mask: retrieval_scores(ask(question, spiked(2), 'euclidean', mask), question.exact, question.relevant)['exact@1'].mean() for mask in MASKS}
    assert exact_at_1['none'] == exact_at_1['own'] == 1 and exact_at_1['all'] < .15


def test_genes_are_matched_by_name():
    effects = screen()
    question = pose(effects[:2], candidate_genes(effects.obs))
    stranger = effects.copy()
    stranger.var_names = [f'ENSG{i}' for i in range(stranger.n_vars)]
    with pytest.raises(Problem, match="none of its 35 genes, such as ENSG0, ENSG1, ENSG2, is among the queries' 35, such as A, B, C"): ask(question, stranger)
    np.testing.assert_allclose(ask(question, effects[:, 4:20]), ask(pose(effects[:2, 4:20], question.candidates), effects), atol=1e-12)


def test_a_candidate_is_as_near_as_its_nearest_dose():
    drugs = ad.AnnData(rng().normal(size=(6, 9)), table(['d1', 'd1', 'd2', 'd2', 'd3', 'd3'], 'drug', dose=[1., 10] * 3), pd.DataFrame(index=[f'g{i}' for i in range(9)]))
    question = pose(drugs[1:2], candidate_genes(drugs.obs))
    rows = distances(drugs.X[1:2], drugs.X)
    np.testing.assert_allclose(ask(question, drugs), rows.reshape(1, 3, 2).min(2), atol=1e-12)
    np.testing.assert_allclose(ask(question, drugs, same_dose=True), rows[:, 1::2], atol=1e-12)
    assert by_candidate(rows, [-1] * 6, 2).tolist() == [[np.inf] * 2]


def test_relatives_of_drugs_share_a_target_where_one_is_known():
    obs = table(['a+b', 'c', 'd', 'e'], 'drug', targets=['KIT;ABL1', 'ABL1', '', np.nan])
    assert target_genes(obs) == [['ABL1', 'KIT'], ['ABL1'], [], []]
    question = pose(ad.AnnData(np.ones((4, 2)), obs), candidate_genes(obs))
    assert question.relevant.tolist() == [[True, True, False, False], [True, True, False, False], [False] * 4, [False] * 4]
    got = retrieval_scores(np.ones((4, 4)), question.exact, question.relevant)
    assert got['relevant@1'].isna().tolist() == [False, False, True, True]
    assert got['exact@1'].tolist() == [.25] * 4


def test_candidates_are_singles_and_pairs_of_the_screen():
    assert list(candidate_genes(table(['B', 'A', 'A+C']), pairs=True)) == ['A', 'A+B', 'A+C', 'B', 'B+C', 'C']
    assert list(candidate_genes(table(['B', 'A', 'A+C']))) == ['A', 'A+C', 'B']
    assert len(candidate_genes(table([f'g{i:03}' for i in range(104)]), pairs=True)) == 5460


# heuristics

def test_overlap_is_the_share_of_common_strongest_genes():
    query, gallery = rng().normal(size=(5, 50)), rng(1).normal(size=(6, 50))
    hidden = rng(2).random((5, 50)) < .2
    for masks, show in ((None, lambda i: np.ones(50, bool)), (hidden, lambda i: ~hidden[i]), (hidden[0], lambda i: ~hidden[0])):
        got = de_overlap(query, gallery, 10, masks)
        top = lambda v, shown: set(np.flatnonzero(shown)[np.argsort(-np.abs(v[shown]))[:10]])
        want = [[1 - len(top(q, show(i)) & top(g, show(i))) / 10 for g in gallery] for i, q in enumerate(query)]
        np.testing.assert_allclose(got, want)


def test_genes_without_effect_do_not_overlap():
    assert (de_overlap(np.zeros((1, 30)), np.zeros((4, 30)), 5) == 1).all()


def test_target_activation_follows_the_sign_of_the_perturbation():
    effect, spread = np.array([[4., -1., 2., 0.]]), np.array([2., 1., 0., 1.])
    candidates = {'A': ['A'], 'A+B': ['A', 'B'], 'B': ['B'], 'B+Z': ['B', 'Z'], 'C': ['C'], 'Z': ['Z']}
    up = target_activation(effect, list('ABCD'), candidates, 1, spread)
    assert up.tolist() == [[-2., -.5, 1., np.inf, 0., np.inf]]  # C never varies in training and says nothing
    down = target_activation(effect, list('ABCD'), candidates, -1, spread)
    assert down[0, 2] < down[0, 1] < down[0, 0]


def test_popularity_counts_occurrences_in_training():
    known = table(['A', 'A+B', 'A+C'])
    question = pose(ad.AnnData(np.ones((2, 1)), table(['B', 'C'])), candidate_genes(known, pairs=True))
    assert dict(zip(question.candidates, popularity(question, known)[1])) == {'A': -3, 'A+B': -4, 'A+C': -4, 'B': -1, 'B+C': -2, 'C': -1}


# cells

def test_cell_votes_are_counted_neighbours():
    cells, gallery = rng().normal(size=(70, 20)), rng(1).normal(size=(12, 20))
    nearest = np.argsort(cdist(cells, gallery, 'cosine'), axis=1)[:, :3]
    want = np.bincount(nearest.ravel(), minlength=12)
    np.testing.assert_allclose(cell_votes(cells, gallery, 3), want)
    np.testing.assert_allclose(cell_votes(cells, gallery, 3, block=9), want)
    np.testing.assert_allclose(cell_votes(cells, gallery, 99), 70)
    hidden = rng(2).random((3, 20)) < .3
    explicit = [cell_votes(cells[:, ~h], gallery[:, ~h], 3) for h in hidden]
    np.testing.assert_allclose(cell_votes(cells, gallery, 3, hidden), explicit)
    np.testing.assert_allclose(cell_votes(cells, gallery, 3, hidden[1]), explicit[1])


def test_rows_that_tie_share_the_votes():
    cells, same = rng().normal(size=(50, 2000)), np.repeat(rng(1).normal(size=(1, 2000)), 210, axis=0)
    np.testing.assert_allclose(cell_votes(cells, same, 5), 50 * 5 / 210)
    np.testing.assert_allclose(cell_votes(0 * cells, rng(1).normal(size=(8, 2000)), 2), 50 * 2 / 8)


def test_votes_rank_the_true_perturbation_first():
    effects = screen(n_genes=200)
    question = pose(effects[5:], candidate_genes(effects.obs))
    votes = [cell_votes(x + rng(i).normal(size=(40, len(x))), effects.X, 1) for i, x in enumerate(effects[5:].X)]
    got = retrieval_scores(by_candidate(-np.array(votes), pd.Index(question.candidates).get_indexer(effects.obs['perturbation']), 15, np.add),
                           question.exact, question.relevant)
    assert (got['rank'] == 1).all()


# real screens

@pytest.mark.skipif(not DATA.exists(), reason='the shared data are not here')
@pytest.mark.parametrize('path, n, want', [('norman/norman_effects.h5ad', 5460, (.54, .85, .99, .67)), ('carpool/carpool_effects.h5ad', 406, (.19, .60, .87, .33))])
def test_additive_gallery_names_doubles_as_often_as_published_numbers_say(path, n, want):
    effects = ad.read_h5ad(DATA/path)
    effects.obs = table(['+'.join(sorted(c.split('+'))) for c in effects.obs['condition'].astype(str)])
    names = effects.obs['perturbation'].to_numpy()
    alone = {name: x for name, x in zip(names, np.asarray(effects.X)) if '+' not in name}
    candidates = candidate_genes(table(sorted(alone)), pairs=True)
    gallery = ad.AnnData(np.array([sum(alone[g] for g in genes) for genes in candidates.values()]), table(list(candidates)), effects.var[[]])
    question = pose(effects[['+' in name and name in candidates for name in names]], candidates)
    got = retrieval_scores(ask(question, gallery), question.exact, question.relevant).mean()
    assert len(candidates) == n
    np.testing.assert_allclose(got[['exact@1', 'exact@8', 'relevant@1', 'mrr']], want, atol=.02)


# other metrics, other counts, other bad input

@pytest.mark.parametrize('mask', MASKS)
def test_a_metric_is_the_explicit_cosine(mask):
    names = list('ABCDEF')
    queries, gallery = rng(3).normal(size=(4, 12)), rng(4).normal(size=(7, 12))
    hidden = hidden_genes(mask, [['A'], ['B', 'C'], ['D'], []], [['A'], ['B'], ['C'], ['D']], [*names, *(f'g{i}' for i in range(6))])
    left = rng(5).normal(size=(40, 12)) @ rng(6).normal(size=(12, 12))
    for metric, P in ((whitened(left), None), (leading_axes(left, 3), None)):
        P = metric.rest * np.eye(12) + (metric.V * metric.weight) @ metric.V.T
        got = distances(queries, gallery, metric, hidden)
        for i, q in enumerate(queries):
            gone = hidden if hidden.ndim == 1 else hidden[i]
            q0, c0 = np.where(gone, 0, q), np.where(gone, 0, gallery)
            np.testing.assert_allclose(got[i], 1 - (c0 @ P @ q0) / np.sqrt(np.einsum('cg,gh,ch->c', c0, P, c0) * (q0 @ P @ q0)), atol=1e-9)
    assert (distances(np.zeros((1, 12)), gallery, whitened(left)) == 1).all()


def test_whitening_is_learnt_from_training_alone_and_finds_what_the_gallery_missed():
    names = [f'{a}+{b}' for a, b in combinations('ABCDEFGH', 2)]
    known = ad.AnnData(rng(1).normal(size=(28, 15)), table(names))
    known.obs_names = names
    gallery = known.copy()
    gallery.X = known.X - rng(2).normal(size=(28, 15))
    np.testing.assert_allclose(leftover(known, gallery), known.X - gallery.X)
    np.testing.assert_allclose(leftover(known, gallery[:, :].copy()[5:]), (known.X - gallery.X)[5:])
    np.testing.assert_allclose(leftover(known), known.X - known.X.mean(0))
    np.testing.assert_allclose(leftover(known, known), known.X - known.X.mean(0))  # nothing is left over


def test_graded_and_gene_scores():
    names = {'A': ['A'], 'A+B': ['A', 'B'], 'B+C': ['B', 'C'], 'D': ['D']}
    holds = incidence(list(names.values()), list('ABCD'))
    exact, relevant = np.array([[False, True, False, False]]), np.array([[True, True, True, False]])
    best = graded_scores(np.array([[.2, .1, .3, .9]]), exact, relevant, holds, (1, 2, 3)).iloc[0]
    assert best['ndcg@10'] == pytest.approx(1) and best['map'] == 1
    assert [best[f'gene_recall@{k}'] for k in (1, 2, 3)] == [.5, 1, 1]  # A and B tie at the front: one of them is first
    blind = graded_scores(np.zeros((1, 4)), exact, relevant, holds, (1, 2, 4)).iloc[0]
    assert [blind[f'gene_recall@{k}'] for k in (1, 2, 4)] == [.25, .5, 1]
    nameless = graded_scores(np.zeros((1, 2)), np.array([[True, False]]), np.zeros((1, 2), dtype=bool), np.zeros((2, 0), dtype=bool))
    assert nameless['map'].isna().all() and 'gene_recall@1' not in nameless


def test_k_above_the_number_of_candidates_holds_everything():
    scores = retrieval_scores(np.array([[.1, .2, .3]]), np.array([[False, False, True]]), np.array([[False, False, True]]), (3, 20))
    assert (scores[['exact@3', 'exact@20', 'relevant@20']] == 1).all(axis=None)


def test_combinations_of_three_genes_are_asked_for_like_others():
    known = table(['A', 'B', 'C', 'A+B+C'])
    candidates = candidate_genes(known, pairs=True)
    assert candidates['A+B+C'] == ['A', 'B', 'C'] and len(candidates) == 7
    question = pose(ad.AnnData(np.ones((1, 3)), known[3:]), candidates)
    assert question.relevant[0].all() and question.exact.sum() == 1


def test_a_control_is_no_query():
    with pytest.raises(Problem, match="query '0[|]control': is a control"):
        pose(ad.AnnData(np.ones((1, 3)), table(['control'])), {'A': ['A'], 'B': ['B']})


def test_a_combination_named_twice_is_refused():
    with pytest.raises(Problem, match="candidates: 'A\\+B' and 'B\\+A' are one combination"):
        pose(ad.AnnData(np.ones((1, 3)), table(['A+B'])), {'A': ['A'], 'A+B': ['A', 'B'], 'B+A': ['A', 'B']})


# splits, files of galleries, seeds

class Halves:
    "A split of `screen()` in two contexts that holds out the pairs of A."
    kind, name, hash = 'doubles', 'doubles.s0', 'abc'

    def __init__(self): self.held = lambda effects: effects.obs['perturbation'].str.startswith('A+').to_numpy()
    def train(self, effects): return effects[~self.held(effects)].copy()
    def test(self, effects): return effects[self.held(effects)].copy()


def two_contexts():
    effects = ad.concat([screen(), screen(seed=1)[:3]], index_unique='-')
    effects.obs['context'] = ['x'] * 15 + ['y'] * 3
    return effects


def test_each_context_puts_its_own_question():
    effects, split = two_contexts(), Halves()
    (question, rows), = questions(split, effects)  # in y nothing is held out
    assert question.setting == ('x', 'CRISPRa') and len(question.candidates) == 15 and question.asked.n_obs == 4
    assert set(rows.obs['context']) == {'x'} and not rows.obs['perturbation'].str.startswith('A+').any()
    (question, _), = questions(split, effects, split.test(effects)[:2])
    assert question.asked.n_obs == 2


def test_galleries_are_found_by_model_and_seed_and_read_for_one_context(tmp_path):
    class Run:
        def results(self, *parts): return tmp_path.joinpath(*parts)
        def read(self, path): return path
    (tmp_path/'doubles.s0').mkdir()
    table = two_contexts()
    table.uns['split'] = 'abc'
    for name in ('my.s1.model.s10', 'my.s1.model.s2', 'additive.s0'): table.write_h5ad(tmp_path/'doubles.s0'/f'{name}.gallery.h5ad')
    (tmp_path/'doubles.s0'/'additive.s0.test.h5ad').write_bytes(b'')
    files = gallery_files(Run(), Halves())
    assert list(files) == [('additive', 0), ('my.s1.model', 2), ('my.s1.model', 10)]
    found = read_gallery(Run(), Halves(), files['additive', 0], 'y', 'CRISPRa')
    np.testing.assert_array_equal(found.X, table[15:].X)
    other = Halves()
    other.hash = 'else'
    with pytest.raises(Problem, match='additive.s0.gallery.h5ad: predicted for split abc, not for else'): read_gallery(Run(), other, files['additive', 0], 'y', 'CRISPRa')


def seeded(seeds, spread, n=40):
    "Scores of `n` perturbations by `seeds` fits that differ by `spread`."
    r, base = rng(3), rng(4).normal(size=n)
    fits = spread * r.normal(size=seeds)
    return pd.DataFrame([dict(route='predicted', model='m', query=f'P{i}|k|x', seed=s, metric='mrr', value=v + fits[s]) for i, v in enumerate(base) for s in range(seeds)])


def test_seeds_widen_the_interval_of_a_model_that_depends_on_them():
    width = lambda scores: float(np.diff(way_scores(scores, ('route', 'model'), rng(), 2000)[['low', 'high']].to_numpy()[0])[0])
    same, other = seeded(6, 0.), seeded(6, 1.)
    assert width(same) == pytest.approx(2 * 1.96 * same.groupby('query')['value'].first().std() / np.sqrt(40), rel=.1)
    assert width(other) > 1.8 * width(same)
    one = other[other['seed'] == 0]  # a single fit is taken as it is
    assert width(one) == pytest.approx(width(same), rel=.1)


def test_means_are_over_perturbations_and_chance_stands_beside():
    scores = pd.concat([seeded(3, .5), pd.DataFrame([dict(route='chance', model='', query='P0|k|x', seed=0, metric='exact@1', value=.25)])])
    table = way_scores(scores, ('route', 'model'), rng(), 50).set_index('route')
    assert table.loc['predicted', ['n', 'seeds']].tolist() == [40, 3] and len(table) == 2
    assert table.loc['predicted', 'value'] == pytest.approx(scores.loc[scores['metric'] == 'mrr', 'value'].mean())
    assert table.loc['predicted', 'median'] == pytest.approx(scores[scores['metric'] == 'mrr'].groupby('query')['value'].mean().median())
    assert table.loc['chance', ['metric', 'value']].tolist() == ['exact@1', .25]


# an effect of one's own

def test_a_metric_is_aligned_by_name_and_refused_without_names():
    known = screen()
    question = pose(known[5:9].copy(), candidate_genes(known.obs))
    shuffled = known[:, rng().permutation(known.n_vars)].copy()
    backwards = pose(shuffled[5:9].copy(), question.candidates)
    for metric in (whitened(leftover(known), known.var_names), leading_axes(known.X, 4, known.var_names)):
        for mask in MASKS: np.testing.assert_allclose(ask(backwards, known, metric, mask), ask(question, known, metric, mask), atol=1e-9)
        fewer = known[:, 3:].copy()
        np.testing.assert_allclose(ask(question, fewer, metric), distances(fewer[5:9].X, fewer.X, metric.over(fewer.var_names))[:, [list(known.obs['perturbation']).index(p) for p in question.candidates]], atol=1e-9)
    with pytest.raises(Problem, match='does not say which genes it is of'): ask(question, known, whitened(leftover(known)))
    with pytest.raises(Problem, match='the metric is of other genes, such as X0'): ask(question, known, whitened(leftover(known), [f'X{i}' for i in range(known.n_vars)]))


@pytest.mark.parametrize('distance', ['cosine', 'spearman', 'whitened'])
def test_the_cause_of_an_effect_of_ones_own_is_named(distance):
    gallery = screen(n_genes=60)
    mine = pd.DataFrame(gallery.X[[7, 12]] + .01 * rng(5).normal(size=(2, gallery.n_vars)), ['first', 'second'], gallery.var_names)
    found = name_causes(mine, gallery, distance, first=3)
    assert found['query'].tolist() == ['first'] * 3 + ['second'] * 3 and found['place'].tolist() == [1, 2, 3] * 2
    assert found.loc[found['place'] == 1, 'candidate'].tolist() == gallery.obs['perturbation'].iloc[[7, 12]].tolist()
    assert (found.groupby('query')['distance'].diff().dropna() >= 0).all()
    known = gallery[:, ::-1].copy()
    known.X = known.X + rng(6).normal(size=known.shape)
    assert (name_causes(mine, gallery, distance, first=1, known=known)['candidate'] == gallery.obs['perturbation'].iloc[[7, 12]].to_numpy()).all()
    with_nothing = name_causes(mine, gallery, distance, hide='candidates', first=99)
    assert len(with_nothing) == 2 * 15


def test_hidden_genes_have_no_say_in_naming():
    gallery = screen()
    mine = pd.DataFrame(gallery.X[:1], ['a'], gallery.var_names)
    usual = name_causes(mine, gallery, hide=['A', 'g3'])
    mine.loc[:, ['A', 'g3']] = 99.
    pd.testing.assert_frame_equal(name_causes(mine, gallery, hide=['A', 'g3']), usual)
    assert not name_causes(mine, gallery).equals(usual)


@pytest.mark.parametrize('spoil, said', [
    (lambda q, g: (pd.concat([q, q[['A']]], axis=1), g), "query: gene 'A' stands there twice"),
    (lambda q, g: (q.rename(columns=lambda c: f'ENSG{c}'), g), 'none of its 35 genes, such as A, B, C, is among the queries'),
    (lambda q, g: (q, ad.AnnData(g.X, g.obs.drop(columns='perturbation_type'), g.var)), "gallery: obs has no column 'perturbation_type'")])
def test_what_cannot_be_compared_is_one_line(spoil, said):
    gallery = screen()
    with pytest.raises(Problem, match=said) as caught: name_causes(*spoil(pd.DataFrame(gallery.X[:1], ['a'], gallery.var_names), gallery))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['non-targeting', 'NTC_1', 'DMSO', 'control'])
def test_a_control_under_any_of_its_names_is_no_query(name):
    asked = screen()[:2].copy()
    asked.obs['perturbation'] = ['A', name]
    with pytest.raises(Problem, match='is a control, and has no cause'): pose(asked, {'A': ['A'], 'B': ['B']})


def test_ks_are_numbers_of_candidates():
    with pytest.raises(Problem, match='ks: 0 is no number of candidates'): retrieval_scores(np.zeros((1, 3)), np.eye(3, dtype=bool)[:1], np.eye(3, dtype=bool)[:1], (1, 0))
