"Causes: hidden neighbours, the densest genes, answer sets, near misses; and the notebook's questions on small screens."
import re
from itertools import combinations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import SHARED as DATA, run_here

from perturb_research.core import Problem
from perturb_research.evaluate.causes import answer_sets, carries_driver, densest, driver_table, hide_around, hide_blindly, miss, nearness, neighbours
from perturb_research.evaluate.retrieval import incidence


def rng(seed=0): return np.random.default_rng(seed)


# genes around a target

def test_neighbours_are_those_that_follow_the_gene_in_either_direction():
    X = rng().normal(size=(60, 6))
    X[:, 1], X[:, 2] = X[:, 0] + .1 * X[:, 1], -X[:, 0] + .3 * X[:, 2]
    known = ad.AnnData(X, var=pd.DataFrame(index=list('ABCDEF')))
    r = np.abs(np.corrcoef(X.T)) - 2 * np.eye(6)
    assert neighbours(known, ['A', 'D'], 5).tolist() == np.argsort(-r[[0, 3]], axis=1)[:, :5].tolist()
    assert neighbours(known, ['A'], 2).tolist() == [[1, 2]]


def test_a_gene_without_variation_or_measurement_hides_nothing_by_chance():
    known = ad.AnnData(np.zeros((5, 3)), var=pd.DataFrame(index=list('ABC')))
    assert neighbours(known, ['Z'], 2).tolist() == [[-1, -1]]
    assert neighbours(known, ['A'], 9).tolist() == [[1, 2]]  # all alike: by position, and no more than there are


def test_hidden_genes_grow_with_k_and_hold_the_own_ones():
    genes, near = list('ABCDEF'), np.array([[1, 2, 3], [4, 5, 0]])
    own = incidence([['A'], ['A', 'B'], ['Z']], genes)
    for k, want in enumerate((['A', 'AB', ''], ['AB', 'ABE', ''], ['ABC', 'ABCEF', ''], ['ABCD', 'ABCDEF', ''])):
        hidden = hide_around(own, [['A'], ['A', 'B'], ['Z']], ['A', 'B'], near, k)
        assert [''.join(g for g, h in zip(genes, row) if h) for row in hidden] == want
    assert own.sum() == 3  # the given mask is not written into


def test_as_many_are_hidden_blindly_as_around_the_targets():
    base, orders = rng().random((6, 40)) < .1, np.array([rng(i).permutation(40) for i in range(6)])
    around = base | (rng(1).random((6, 40)) < .3)
    around[0] = base[0]
    blind = hide_blindly(base, around, orders)
    assert (blind.sum(1) == around.sum(1)).all() and (blind >= base).all() and (blind[0] == base[0]).all() and (blind != around).any()
    more = hide_blindly(base, around | (rng(2).random((6, 40)) < .3), orders)
    assert (more >= blind).all()  # a longer list holds the shorter one


# the densest genes

def test_densest_finds_a_planted_clique():
    names, clique = [f'g{i:02}' for i in range(30)], [f'g{i:02}' for i in range(3, 18, 3)]
    noise = [tuple(rng(1).choice(names, 2, replace=False)) for _ in range(1)]
    pairs = [*combinations(clique, 2), *[tuple(sorted(p)) for p in zip(names, names[7:])], *noise]
    assert densest(pairs, 5) == clique


@pytest.mark.parametrize('seed', range(5))
def test_densest_is_as_good_as_trying_all(seed):
    names = list('ABCDEFGHI')
    pairs = [p for p in combinations(names, 2) if rng(seed * 100 + ord(p[0]) * 9 + ord(p[1])).random() < .4]
    inside = lambda genes: sum(set(p) <= set(genes) for p in pairs)
    assert inside(densest(pairs, 5)) == max(inside(c) for c in combinations(names, 5))


def test_densest_takes_what_there_is():
    assert densest([], 3) == []
    assert densest([('B', 'A'), ('A', 'B')], 20) == ['A', 'B']


# answer sets

def distances_with_truth(n, seed=0, candidates=40):
    d = rng(seed).normal(size=(n, candidates))
    exact = np.zeros((n, candidates), dtype=bool)
    exact[np.arange(n), rng(seed + 1).integers(candidates, size=n)] = True
    return np.where(exact, d - 1.5, d), exact


@pytest.mark.parametrize('level', [.5, .8, .9])
def test_sets_hold_what_they_promise_and_hardly_more(level):
    covered = [answer_sets(*distances_with_truth(60, seed), np.arange(60).astype(str), level)['covered'].mean() for seed in range(0, 60, 2)]
    assert level - .02 < np.mean(covered) < level + .05


def test_no_query_cuts_its_own_set():
    d, exact = distances_with_truth(30)
    units = np.arange(30).astype(str)
    usual = answer_sets(d, exact, units)
    worse = d.copy()
    worse[0, exact[0]] = 99.
    changed = answer_sets(worse, exact, units)
    assert changed['cut'][0] == usual['cut'][0] and not changed['covered'][0]


def test_queries_of_one_perturbation_count_once_and_never_for_one_another():
    d, exact = distances_with_truth(40)
    units = np.repeat(np.arange(20), 2).astype(str)
    sets = answer_sets(d, exact, units, .9)
    above = d - d.min(1, keepdims=True)
    own = np.where(exact, above, -np.inf).max(1).reshape(20, 2).max(1)
    assert sets['cut'][0] == np.sort(np.delete(own, 0))[int(np.ceil(20 * .9)) - 1]


def test_what_cannot_be_proposed_is_covered_by_the_whole_catalogue_alone():
    d, exact = distances_with_truth(20)
    d[exact] = np.inf
    sets = answer_sets(d, exact, np.arange(20).astype(str))
    assert (sets['size'] == 40).all() and sets['covered'].all()


def test_ties_are_all_inside():
    sets = answer_sets(np.zeros((30, 7)), np.eye(30, 7, dtype=bool) | (np.arange(7) == 0) & (np.arange(30)[:, None] >= 7), np.arange(30).astype(str))
    assert (sets['size'] == 7).all() and sets['covered'].all()


# near misses

def test_miss_and_nearness():
    assert miss(['A', 'B'], ['A', 'B']) == ([], [])
    assert miss(['A'], ['B', 'C']) == (['A'], ['B', 'C'])
    K = np.array([[1, .2, .7], [.2, 1, 0], [.7, 0, 1]])
    assert nearness([([0], [1, 2])], K) == .7
    assert nearness([([0], [1])], K, np.array([0, 2, 1])) == .7  # who is who is shuffled


# drivers of lines

def test_a_driver_among_the_targets_counts_in_its_own_line_alone(tmp_path):
    file = tmp_path/'lines.csv'
    pd.DataFrame({'cell_name': ['HT-29', 'HT-29', 'A549', 'MCF7'], 'Driver_Gene_Symbol': ['BRAF', 'APC', 'KRAS', None]}).to_csv(file, index=False)
    drivers = driver_table(file)
    assert drivers == {'ht29': {'BRAF', 'APC'}, 'a549': {'KRAS'}, 'mcf7': set()}
    targets = [['BRAF', 'RAF1'], ['KRAS'], ['KRAS'], ['KRAS'], ['KRAS'], []]
    assert carries_driver(drivers, ['ht 29', 'HT29', 'A549', 'MCF-7', 'K562', 'A549'], targets).tolist() == ['driver among targets', 'no driver', 'driver among targets', 'no driver', '', 'no driver']


def test_tahoe_lines_are_read_as_they_come():
    file = DATA/'tahoe'/'cell_line_metadata.parquet'
    if not file.is_file(): pytest.skip('the real screens are not here')
    drivers = driver_table(file)
    assert {'KRAS', 'CDKN2A'} <= drivers['a549'] and len(drivers) >= 50


@pytest.mark.parametrize('content, said', [(None, 'lines: no file '), ('cell_name\nA549\n', "has no column 'Driver_Gene_Symbol'; expected a row a driver"), ('', 'cannot be read as .parquet or .csv')])
def test_a_table_of_lines_that_is_none_is_one_line(tmp_path, content, said):
    file = tmp_path/'lines.csv'
    if content is not None: file.write_text(content)
    with pytest.raises(Problem, match=re.escape(said)) as caught: driver_table(file)
    assert '\n' not in str(caught.value)


# the notebook

@pytest.mark.parametrize('given, said', [(dict(distances_shown='cosine manhattan'), "distances_shown: 'manhattan' is unknown; expected cosine, pearson, euclidean or whitened"),
                                         (dict(level=1.), "parameter 'level' is 1.0"), (dict(), 'make figures')])
def test_bad_parameters_and_missing_files_are_one_line(tmp_path, given, said):
    with pytest.raises(Problem, match=re.escape(said)) as caught: run_here('14b_evaluate.causes', tmp_path, dataset='nothing', **given)
    assert '\n' not in str(caught.value) and not list(tmp_path.rglob('*.parquet'))


def test_an_inverse_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(Problem, match="inverse: no model 'oracle'; there are: popularity, "): run_here('14_evaluate.retrieval', tmp_path, dataset='nothing', inverse='ridge oracle')
