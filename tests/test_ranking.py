"Ranked lists with several right answers: against every order of ties, against scikit-learn, and against simulation."
from itertools import permutations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.metrics import average_precision_score, ndcg_score

from perturb_research.core import Problem, generator
from perturb_research.evaluate.ranking import ceiling_ranking, chance_ranking, ranking_scores, tie_groups

KS = 1, 2, 3, 5


def plain(grades, ks=KS):
    "The metrics of one list in a fixed order, written as they are defined."
    right, found = [g > 0 for g in grades], {}
    n_right, ideal = sum(right), sorted(grades, reverse=True)
    for k in ks:
        top = right[:k]
        dcg = lambda gains: sum(g / np.log2(j + 2) for j, g in enumerate(gains[:k]))
        found |= {f'precision@{k}': sum(top) / k, f'recall@{k}': sum(top) / n_right, f'ndcg@{k}': dcg(grades) / dcg(ideal), f'hit@{k}': any(top),
                  f'ap@{k}': sum(sum(right[:j + 1]) / (j + 1) for j, r in enumerate(top) if r) / min(k, n_right)}
    return found | dict(mrr=1 / (right.index(True) + 1), rank=right.index(True) + 1)


def over_all_orders(score, grades, ks=KS):
    "Mean of `plain` over every order in which scores do not rise."
    orders = [o for o in permutations(range(len(score))) if all(score[a] >= score[b] for a, b in zip(o, o[1:]))]
    tables = [plain([grades[i] for i in o], ks) for o in orders]
    return {name: np.mean([t[name] for t in tables]) for name in tables[0]}


@pytest.mark.parametrize('seed', range(12))
def test_ties_are_means_over_all_their_orders(seed):
    rng = generator(seed, 'ties')
    score, grades = rng.integers(0, 3, 6).astype(float), rng.integers(0, 3 if seed % 2 else 2, 6)
    grades[rng.integers(6)] = 1
    if seed % 3 == 0: score[score == 0] = -np.inf  # cannot be proposed
    mine, expected = ranking_scores(score[None], grades[None], KS).iloc[0], over_all_orders(score, grades)
    assert set(mine.index) == set(expected)
    for name, value in expected.items(): assert mine[name] == pytest.approx(value, abs=1e-12), name


def test_many_queries_at_once_are_the_same_as_one_by_one():
    rng = generator(0, 'rows')
    score, relevant = rng.integers(0, 5, (40, 30)).astype(float), rng.random((40, 30)) < .1
    relevant[:, 0] |= ~relevant.any(1)
    together = ranking_scores(score, relevant)
    for i in range(40): assert_allclose(ranking_scores(score[i:i + 1], relevant[i:i + 1]).iloc[0], together.iloc[i], atol=1e-12)
    order = rng.permutation(30)  # where an entry stands in the file does not matter
    assert_allclose(ranking_scores(score[:, order], relevant[:, order]), together, atol=1e-12)


def test_agrees_with_scikit_learn():
    rng = generator(1, 'sklearn')
    score, relevant = rng.random((20, 25)), rng.random((20, 25)) < .2
    relevant[:, 3] = True
    mine = ranking_scores(score, relevant, (5, 25))
    for i in range(20):
        for k in (5, 25): assert mine[f'ndcg@{k}'][i] == pytest.approx(ndcg_score(relevant[i:i + 1], score[i:i + 1], k=k))
        assert mine['ap@25'][i] == pytest.approx(average_precision_score(relevant[i], score[i]))
    grades, tied = rng.integers(0, 3, (20, 25)), rng.integers(0, 4, (20, 25)).astype(float)
    grades[:, 0] = 1
    assert_allclose(ranking_scores(tied, grades, (5,))['ndcg@5'].mean(), ndcg_score(grades, tied, k=5))  # with grades, and ties


def test_chance_is_what_random_orders_get():
    rng = generator(2, 'chance')
    n, m, draws = 20, 4, 4000
    relevant = np.broadcast_to(np.arange(n) < m, (draws, n))
    drawn, exact = ranking_scores(rng.random((draws, n)), relevant, (1, 5, 10)), chance_ranking(n, [m], (1, 5, 10)).iloc[0]
    for name in exact.index: assert abs(drawn[name].mean() - exact[name]) < 5 * drawn[name].std() / np.sqrt(draws) + 1e-9, name
    assert exact['recall@5'] == pytest.approx(5 / n) and exact['precision@5'] == pytest.approx(m / n)
    assert exact['rank'] == pytest.approx((n + 1) / (m + 1))


def test_the_ceiling_is_what_knowing_all_gets():
    relevant = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=bool)
    known = np.array([True, True, True, False, False])
    best = ceiling_ranking(relevant, known, (1, 2, 3))
    assert_allclose(best['recall@3'], [1, 1 / 3, 0])
    assert_allclose(best['recall@1'], [1 / 2, 1 / 3, 0])
    rng = generator(3, 'ceiling')
    for _ in range(50):  # no order of the known, with the others last, does better
        score = np.where(known, rng.random((3, 5)), -1)
        assert (ranking_scores(score, relevant, (1, 2, 3)).filter(like='recall') <= best.filter(like='recall') + 1e-12).all(axis=None)


def test_nothing_right_is_nan_and_rounding_is_a_tie():
    assert ranking_scores([[1., 0.]], [[0, 0]]).isna().all(axis=None)
    one, other = (ranking_scores([[.3, x]], [[0, 1]], (1,)) for x in (.3, .1 + .2))
    assert one.equals(other) and one['hit@1'][0] == .5
    assert tie_groups(np.zeros((1, 3)))[2].tolist() == [[3, 3, 3]]
    far = ranking_scores([[1., 0.]], [[0, 1]], (1, 50))  # more places than entries
    assert far['recall@50'][0] == 1 and far['precision@50'][0] == 1 / 50


@pytest.mark.parametrize('score, relevant, said', [([[np.nan, 1]], [[1, 0]], 'NaN or infinite'), ([[1., 2, 3]], [[1, 0]], 'expected both'), ([[1., 2]], [[1, -1]], 'negative')])
def test_bad_input_in_one_line(score, relevant, said):
    with pytest.raises(Problem, match=said): ranking_scores(score, relevant)
