"Naming causes from effects: genes and drugs alike, what may be proposed, what calibration and sums are for, and that nothing but training rows is seen."
from itertools import combinations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

import perturb_research.drugs.candidate  # registers the network
from perturb_research.core import Problem, generator
from perturb_research.data.splits import entries_of, make_split, target_genes
from perturb_research.models import inverse
from perturb_research.models.inverse import INVERSE, best_in, causes, listed, membership, pseudo_pairs

GENES = [f'T{i}' for i in range(9)]
LEARNED = ['ridge', 'logistic', 'forest', 'boosting', 'dc']


def genes(seed=0, noise=.6, n=60, contexts=('x',)):
    "Nine genes and their 36 pairs, each pair four fifths of the sum of its genes."
    rng = generator(seed, 'genes')
    push, names = rng.normal(size=(9, n)), [*GENES, *(f'{a}+{b}' for a, b in combinations(GENES, 2))]
    obs = pd.DataFrame([(p, 'CRISPRa', c) for c in contexts for p in names], columns=['perturbation', 'perturbation_type', 'context']).assign(dose=np.nan, time_h=np.nan)
    obs.index = obs['perturbation'] + '|' + obs['context']
    X = np.array([push[[GENES.index(g) for g in p.split('+')]].sum(0) * (.8 if '+' in p else 1) for p in obs['perturbation']]) + noise * rng.normal(size=(len(obs), n))
    return ad.AnnData(X.astype('float32'), obs, pd.DataFrame(index=[f'G{i}' for i in range(n)]), uns=dict(dataset_id='toy'))


def drugs(**changes):
    "The same screen told as drugs with one or two targets, and three doses."
    effects = genes()
    obs = effects.obs.assign(targets=effects.obs['perturbation'].str.replace('+', ';'), perturbation_type='drug', perturbation=[f'drug{i:02}' for i in range(45)], dose=1., smiles='')
    return ad.AnnData(effects.X, obs.assign(**changes), effects.var)


def parts(effects, held=slice(10, None, 2)):
    asked = np.zeros(effects.n_obs, dtype=bool)
    asked[held] = True
    return effects[~asked].copy(), effects[asked].copy()


def fit(name, train, seed=0, **options):
    return INVERSE[name](**options).fit(train, rng=generator(seed, name))


def own(asked, candidates): return candidates.index.get_indexer(asked.obs['perturbation'].astype(str))


def place(distance, right):
    "Place of the right candidate, the middle one where equal."
    mine = distance[np.arange(len(right)), right][:, None]
    return (distance < mine).sum(1) + ((distance == mine).sum(1) - 1) / 2


# what it names

@pytest.mark.parametrize('make', [genes, drugs])
@pytest.mark.parametrize('name, most', [('ridge', 1), ('logistic', 1), ('boosting', 16), ('dc', 3), ('forest', 20)])
def test_causes_never_measured_are_named(make, name, most):
    "Held-out pairs, and held-out drugs with the same targets: mean place among 45 (22 by chance, pairs first 26)."
    train, test = parts(make())
    candidates = causes(make().obs)
    model = fit(name, train, **dict(epochs=15, components=30) if name == 'dc' else {})
    assert place(model.rank(test.X, candidates), own(test, candidates)).mean() < most
    Y = membership(candidates, model.target_names)[own(test, candidates)]
    scores = model.targets(test.X)
    assert scores.shape == (len(test), 9) and np.isfinite(scores).all()
    assert np.mean([s[y].min() > s[~y].max() for s, y in zip(scores, Y)]) > (.8 if name in ('ridge', 'logistic') else 0)


def test_singles_and_pairs_are_told_apart():
    "Queries of both kinds among both kinds of candidates: calibrated odds say how many genes there are."
    candidates = causes(genes().obs)
    train, again = parts(genes())[0], genes(seed=0)
    again.X = again.X + .3 * generator(1, 'again').normal(size=again.shape).astype('float32')
    nearest = candidates.index.to_numpy()[fit('ridge', train).rank(again.X, candidates).argmin(1)]
    plus = pd.Series(nearest).str.contains('+', regex=False).to_numpy()
    assert (plus == again.obs['perturbation'].str.contains('+', regex=False).to_numpy()).mean() > .9


def test_effects_of_another_size_are_the_same_question():
    train, test = parts(genes())
    candidates = causes(genes().obs)
    for name in ('nearest', 'ridge', 'logistic', 'forest', 'boosting'):
        model = fit(name, train)
        assert_allclose(model.rank(7.5 * np.asarray(test.X, float), candidates), model.rank(np.asarray(test.X, float), candidates), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize('name', LEARNED[:4])
def test_a_sum_of_log_odds_is_the_likelihood_of_independent_labels(name):
    train, test = parts(genes())
    model, candidates = fit(name, train), causes(genes().obs)
    odds = model.targets(test.X)
    p, Y = 1 / (1 + np.exp(-odds)), membership(candidates, model.target_names)
    likelihood = np.log(np.where(Y, p[:, None], 1 - p[:, None])).sum(2)
    distance = model.rank(test.X, candidates)
    assert_allclose(distance - distance[:, :1], -(likelihood - likelihood[:, :1]), atol=1e-6)


# what can be proposed

@pytest.mark.parametrize('name', ['popularity', 'ridge', 'logistic', 'forest', 'boosting', 'dc'])
def test_a_gene_never_seen_is_never_proposed(name):
    effects = genes()
    strange = effects.obs['perturbation'].str.contains('T8').to_numpy()
    model, candidates = fit(name, effects[~strange].copy()), causes(effects.obs)
    distance = pd.DataFrame(model.rank(effects.X[strange], candidates).T, candidates.index)
    held = candidates['targets'].str.contains('T8').to_numpy()
    assert np.isinf(distance.loc['T8']).all() and np.isfinite(distance[~held]).all(axis=None)
    for pair in candidates.index[held & (candidates.index != 'T8')]:  # half known: behind the known gene alone, at a distance that is the same for all
        behind = distance.loc[pair] - distance.loc[next(g for g in pair.split('+') if g != 'T8')]
        assert np.isinf(behind).all() if name == 'dc' else np.allclose(behind, 0 if name == 'popularity' else np.log(2 * len(model.Y) + 1))
    assert 'T8' not in model.target_names and model.targets(effects.X[:2]).shape == (2, 8)


@pytest.mark.parametrize('name', ['nearest', 'nearest_whitened'])
def test_a_neighbour_proposes_what_was_measured(name):
    train, test = parts(genes())
    candidates = causes(genes().obs)
    model = fit(name, train)
    distance = model.rank(train.X, candidates)
    assert np.isinf(distance[:, own(test, candidates)]).all() and (distance.argmin(1) == own(train, candidates)).all()
    assert np.isfinite(model.targets(test.X)).all()


def test_equal_candidates_tie_and_popularity_is_blind():
    train, test = parts(genes())
    model = fit('popularity', train)
    distance = model.rank(test.X, causes(genes().obs))
    assert (distance == distance[0]).all() and len(set(distance[0])) < 45
    twins = pd.DataFrame(dict(targets=['T1', 'T1', 'T2;T1', 'T1;T2']), index=list('abcd'))
    for name in LEARNED: 
        found = fit(name, train, **dict(epochs=1) if name == 'dc' else {}).rank(test.X, twins)
        assert (found[:, 0] == found[:, 1]).all() and (found[:, 2] == found[:, 3]).all()


# labels

def test_genes_and_drugs_have_one_rule_for_labels():
    obs = pd.DataFrame(dict(perturbation=['A+B', 'C', 'pill', 'IFN', 'water'], perturbation_type=['CRISPRi', 'knockout', 'drug', 'stimulus', 'drug'], targets=['X', np.nan, 'B; A|B', 'R', 'unknown']))
    assert target_genes(obs) == [['A', 'B'], ['C'], ['A', 'B'], ['R'], []]
    assert target_genes(obs.drop(columns='targets')) == [['A', 'B'], ['C'], [], [], []]
    assert entries_of(pd.Series(['b,a', None, 'none', 'a;a'])) == listed(pd.Series(['a;b', '', 'NaN', 'a'])) == [['a', 'b'], [], [], ['a']]
    assert causes(obs)['targets'].to_dict() == {'A+B': 'A;B', 'C': 'C', 'IFN': 'R', 'pill': 'A;B', 'water': ''}


def test_a_screen_of_genes_and_drugs_is_one_problem():
    "Drugs are named from what gene perturbations taught, and the reverse."
    both = ad.concat([genes()[:9], drugs()[9:]], join='outer', merge='same')
    model = fit('ridge', both)
    assert model.target_names == GENES
    asked = genes(seed=0)[9:]
    distance = model.rank(asked.X, causes(genes().obs))
    assert place(distance, own(asked, causes(genes().obs))).mean() < 2


# sums of singles

def test_sums_are_of_training_singles_of_one_kind_and_context():
    effects = genes(contexts=('x', 'y'))
    train = effects[np.r_[0:20, 45:54]].copy()  # context y has no pair
    pair = pseudo_pairs(train.obs)
    assert len(pair) == 36 and (train.obs['context'].to_numpy()[pair] == 'x').all() and (pair < 9).all()
    order = generator(0, 'order').permutation(train.n_obs)
    named = lambda obs, pair: {frozenset(two) for two in obs.index.to_numpy()[pair]}
    assert named(train.obs.iloc[order], pseudo_pairs(train.obs.iloc[order], 10)) == named(train.obs, pseudo_pairs(train.obs, 10))
    assert len(pseudo_pairs(drugs().obs)) == 0 and len(pseudo_pairs(train.obs[:9])) == 0
    twice = pd.concat([train.obs[:9], train.obs])
    assert all(a != b for a, b in twice['perturbation'].to_numpy()[pseudo_pairs(twice)])


def test_sums_help_where_pairs_are_rare(monkeypatch):
    effects = genes(noise=1.2)
    train, test = parts(effects, slice(12, None))
    candidates, found = causes(effects.obs), {}
    for pairs in (0, 1000):
        monkeypatch.setattr(inverse.LeastSquares, 'pairs', pairs)
        found[pairs] = place(fit('ridge', train).rank(test.X, candidates), own(test, candidates)).mean()
    assert found[1000] < .8 * found[0]


def test_calibration_leaves_whole_perturbations_out(monkeypatch):
    "No fit inside the calibration sees a row of a perturbation that it is judged on."
    train, _ = parts(genes(contexts=('x', 'y')))
    seen, judged = [], []
    class Watched(inverse.LeastSquares):
        name = 'watched'
        def trained(self, rows):
            seen.append(set(self.train['perturbation'].iloc[rows]))
            def read(query):
                judged.append({self.train['perturbation'].iloc[np.flatnonzero((self.X == q).all(1))[0]] for q in query})
                return np.zeros((len(query), len(self.target_names)))
            return read
    Watched().fit(train)
    assert len(judged) == 3 and all(not s & j for s, j in zip(seen, judged)) and set.union(*judged) == set(train.obs['perturbation'])
    assert len(seen) == 4 and seen[3] == set(train.obs['perturbation'])


def test_a_screen_of_singles_has_nothing_to_calibrate_on():
    singles = genes(contexts=('x', 'y'))[np.r_[0:9, 45:54]].copy()
    model = fit('logistic', singles)
    assert (model.slope, model.level) == model.usual
    assert (model.rank(singles.X, causes(singles.obs)).argmin(1) == own(singles, causes(singles.obs))).all()


# leakage

@pytest.mark.parametrize('name', list(INVERSE))
def test_rows_that_are_asked_for_reach_no_fit(name):
    "All values of the test rows changed: not a digit of the answers does."
    found = []
    for change in (lambda X: X, lambda X: 9 - 3 * X):
        effects = genes()
        split = make_split(effects, 'doubles', 0, n_genes=40)
        query = split.test(effects).X
        rows = effects.obs_names.get_indexer(split.ids['test'])
        effects.X[rows] = change(effects.X[rows])
        options = dict(epochs=2) if name == 'dc' else {}
        found.append(fit(name, split.train(effects), **options).rank(query, causes(effects.obs)))
    assert np.array_equal(*found)


@pytest.mark.parametrize('name', LEARNED[:4])
def test_order_of_rows_and_genes_does_not_matter(name):
    train, test = parts(genes())
    rows, columns = generator(0, 'rows').permutation(train.n_obs), generator(0, 'columns').permutation(train.n_vars)
    if name in ('forest', 'boosting'): rows = np.arange(train.n_obs)  # a forest draws rows by their place
    one, other = fit(name, train), fit(name, train[rows][:, columns].copy())
    assert_allclose(other.targets(test.X[:, columns]), one.targets(test.X), atol=1e-3)


@pytest.mark.parametrize('name', [n for n in INVERSE if n != 'dc'])
def test_same_seed_same_numbers(name):
    train, test = parts(genes())
    assert np.array_equal(fit(name, train).targets(test.X), fit(name, train).targets(test.X))


# bad input

@pytest.mark.parametrize('name', [n for n in INVERSE if n != 'dc'])
@pytest.mark.parametrize('bad, said', [(np.zeros((1, 60)), 'nothing changes in 1 of 1'), (np.ones((1, 7)), 'expected rows of the 60 training genes'), (np.full((1, 60), np.nan), 'NaN or infinite')])
def test_bad_queries_in_one_line(name, bad, said):
    model = fit(name, genes())
    for ask in (model.targets, lambda q: model.rank(q, causes(genes().obs))):
        with pytest.raises(Problem, match=said) as e: ask(bad)
        assert '\n' not in str(e.value)


def test_bad_screens_in_one_line():
    train = genes()
    with pytest.raises(Problem, match='not fitted yet'): INVERSE['ridge']().targets(train.X)
    with pytest.raises(Problem, match='no training condition has a known target gene'): fit('ridge', drugs(targets='unclear'))
    with pytest.raises(Problem, match='no training conditions'): fit('ridge', train[:0].copy())
    with pytest.raises(Problem, match='no column perturbation_type'): fit('ridge', ad.AnnData(train.X, train.obs.drop(columns='perturbation_type'), train.var))
    broken = train.copy()
    broken.X[0, 0] = np.nan
    with pytest.raises(Problem, match='hold NaN or inf'): fit('nearest', broken)
    for name in INVERSE:
        with pytest.raises(Problem, match="'T0' stands twice"): fit(name, train, **dict(epochs=1) if name == 'dc' else {}).rank(train.X, pd.concat([causes(train.obs)] * 2))


@pytest.mark.parametrize('name', LEARNED[:4])
def test_odd_screens_are_learned_all_the_same(name):
    "One target only; a target that every condition has; a perturbation without a known target."
    train = genes()
    one = fit(name, train[:1].copy())
    assert one.rank(train.X[:3], causes(train.obs)).shape == (3, 45) and one.target_names == ['T0']
    alike = drugs(targets='T1')
    assert np.isfinite(fit(name, alike).targets(alike.X[:2])).all()
    some = drugs()
    some.obs.loc[some.obs_names[:3], 'targets'] = ''
    assert np.isinf(fit(name, some).rank(some.X[:1], causes(some.obs))[0, :3]).all()


def test_groups_take_their_best():
    assert best_in(np.array([[.1, .9, .5, 1]]), np.array([0, 0, 2, -1]), 3).tolist() == [[.9, -np.inf, .5]]
