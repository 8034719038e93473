"""From a wanted state to drugs: places, two stages, what remains, measured conditions, and what is refused."""
import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturb_research.core import Problem
from perturb_research.drugs.search import Informed, conditions_of, dose_um, fuse, places, remaining, rerank, search, simulate, wanted

RNG = np.random.default_rng(0)
GENES = pd.Index([f'G{i}' for i in range(40)])
DRUGS = pd.DataFrame(dict(smiles='C', targets=[f'T{i // 2}' for i in range(12)]), index=[f'drug{i:02}' for i in range(12)])
EFFECT = pd.DataFrame(RNG.normal(size=(12, 40)), DRUGS.index, GENES)


class Inverse:
    "Cosine to the true effects, blurred; drugs in `mute` cannot be proposed."
    genes, mute = GENES, ()

    def __init__(self, noise=0., mute=()): self.known, self.mute = EFFECT + noise * np.random.default_rng(1).normal(size=EFFECT.shape), mute

    def rank(self, query, candidates):
        known = self.known.loc[candidates.index].to_numpy()
        distance = 1 - query @ known.T / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(known, axis=1)
        return np.where(candidates.index.isin(self.mute), np.inf, distance)


class Forward:
    "True effects times dose / (1 + dose); counts what it was asked for."
    genes = GENES

    def __init__(self): self.train, self.asked = pd.DataFrame(dict(context=['x'], time_h=[24.])), 0

    def predict(self, conditions, controls=None):
        self.asked += len(conditions)
        return EFFECT.loc[conditions['perturbation']].to_numpy() * (conditions[['dose']] / (1 + conditions[['dose']])).to_numpy()

    def var(self, conditions, controls=None): return np.full((len(conditions), 40), .04)


def query_of(drug, share=.5): return pd.Series(share * EFFECT.loc[drug], GENES)


def test_the_drug_and_its_dose_are_found():
    table = search(query_of('drug07', 10 / 11), Inverse(), Forward(), DRUGS, 'x', ['500 nM', 10, '0.1 mM'], k=5)
    assert table.loc[0, ['drug', 'dose', 'rank', 'dc_rank']].tolist() == ['drug07', 10, 1, 1]
    assert table['remaining'][0] == pytest.approx(0, abs=1e-9)
    assert table['sd'][0] == pytest.approx(np.sqrt(2 * 40 * .04**2 / (4 * 40 * .04)) / np.linalg.norm(query_of('drug07', 10 / 11)))
    assert table['remaining'].notna().sum() == 5 and sorted(table['drug']) == list(DRUGS.index) and table['rank'].tolist() == list(range(1, 13))


def test_simulation_mends_a_bad_first_stage_inside_the_shortlist_only():
    inverse, better = Inverse(noise=3.), 0
    for drug in DRUGS.index:
        table = search(query_of(drug), inverse, Forward(), DRUGS, 'x', 1, k=6)
        mine = table[table['drug'] == drug].iloc[0]
        if mine['dc_rank'] <= 6: assert mine['rank'] == 1
        else: assert mine['rank'] == mine['dc_rank'] and np.isnan(mine['remaining'])
        better += mine['rank'] < mine['dc_rank']
    assert better > 2


def test_no_more_is_simulated_than_asked_for():
    forward = Forward()
    search(query_of('drug01'), Inverse(), forward, DRUGS, 'x', [1, 5], k=4)
    assert forward.asked == 8


def test_more_places_than_candidates_means_all():
    table = search(query_of('drug01'), Inverse(), Forward(), DRUGS, 'x', 1, k=500)
    assert table['remaining'].notna().all() and 'there are 12 candidates; all are simulated' in table.attrs['said'][1]
    for k in (0, -1, np.nan):
        with pytest.raises(Problem, match='expected how many candidates'): search(query_of('drug01'), Inverse(), Forward(), DRUGS, 'x', 1, k=k)
    with pytest.raises(Problem, match='candidates: none'): search(query_of('drug01'), Inverse(), Forward(), DRUGS[:0], 'x', 1)


def test_what_cannot_be_proposed_stays_last():
    table = search(query_of('drug03'), Inverse(mute=['drug03', 'drug04']), Forward(), DRUGS, 'x', 1, k=12)
    assert set(table['drug'][-2:]) == {'drug03', 'drug04'} and np.isinf(table['rank'][-2:]).all() and table['remaining'][-2:].isna().all()
    nothing = search(query_of('drug03'), Inverse(mute=list(DRUGS.index)), Forward(), DRUGS, 'x', 1)
    assert np.isinf(nothing['rank']).all()


@pytest.mark.parametrize('dose', [0, -1, '0 nM', '-3 uM', '', None, 'high', np.nan, np.inf, [1, 0]])
def test_doses_that_are_none_are_refused(dose):
    with pytest.raises(Problem, match='expected a number above 0'): search(query_of('drug01'), Inverse(), Forward(), DRUGS, 'x', dose)


def test_units():
    assert [dose_um(d) for d in ('500 nM', '0.5 mM', '1e-6 M', '3', 2, '7 µM')] == pytest.approx([.5, 500, 1, 3, 2, 7])
    with pytest.raises(Problem, match="unknown unit 'mg/ml'"): dose_um('3 mg/ml')


def test_a_line_is_trained_on_or_brings_its_profile():
    arguments = query_of('drug01'), Inverse(), Forward(), DRUGS
    with pytest.raises(Problem, match="line 'y': not in training"): search(*arguments, 'y', 1)
    table = search(*arguments, 'y', 1, controls=pd.DataFrame(0., ['y'], GENES))
    assert table['drug'][0] == 'drug01'


def test_signatures_of_other_genes():
    signature = query_of('drug05')[GENES[:30]].sample(frac=1, random_state=0)
    signature['elsewhere'] = 5.
    table = search(signature, Inverse(), Forward(), DRUGS, 'x', 1, k=5)
    assert table['drug'][0] == 'drug05' and '30 of 40 genes' in table.attrs['said'][0] and '1 genes' in table.attrs['said'][0]
    with pytest.raises(Problem, match='5 of the 40 genes'): search(signature[:5], Inverse(), Forward(), DRUGS, 'x', 1)
    with pytest.raises(Problem, match='expected 40 changes'): search(np.ones(7), Inverse(), Forward(), DRUGS, 'x', 1)


def test_wanted_is_then_less_now_and_undoing_is_its_opposite():
    ill, well = pd.Series(RNG.normal(size=40), GENES), pd.Series(RNG.normal(size=40), GENES[::-1])
    pd.testing.assert_series_equal(wanted(ill, well), -wanted(well, ill), check_names=False)
    assert wanted(ill, well)['G3'] == well['G3'] - ill['G3']
    assert wanted(ill, pd.Series([1.], ['G7'])).index.tolist() == ['G7']


def test_remaining_is_a_distance_in_states():
    now, effects, query = RNG.normal(size=40), RNG.normal(size=(5, 40)), RNG.normal(size=40)
    share, sd = remaining(query, effects)
    np.testing.assert_allclose(share, np.linalg.norm((now + effects) - (now + query), axis=1) / np.linalg.norm(query))
    assert np.isnan(sd).all() and remaining(query, np.zeros((1, 40)))[0][0] == 1


def test_places_and_stages_do_not_hang_on_last_digits():
    distance = RNG.integers(0, 4, size=(20, 9)).astype(float)
    distance[RNG.random(distance.shape) < .2] = np.inf
    shaken = distance * (1 + 1e-13 * RNG.normal(size=distance.shape))
    assert (places(distance) == places(shaken)).all()
    assert (np.sort(places(distance)) == np.arange(9)).all()
    second = RNG.normal(size=distance.shape)
    for k in (1, 4, 9, 20):
        found = rerank(distance, second, k)
        assert (np.isinf(found) == np.isinf(distance)).all()
        for mine, first, other in zip(found, distance, second):
            finite = np.isfinite(mine)
            assert sorted(mine[finite]) == list(range(finite.sum()))
            inside = finite & (places(first[None])[0] < k)
            assert (np.argsort(mine[inside]) == np.argsort(other[inside])).all()


def test_fused_lists_hear_both():
    first, second = RNG.permuted(np.tile(np.arange(10.), (30, 1)), axis=1), RNG.permuted(np.tile(np.arange(10.), (30, 1)), axis=1)
    found = fuse(first, second, 10)
    both_first = (first == 0) & (second == 0)
    assert (found[both_first] == 0).all() and (np.sort(found) == np.arange(10)).all()
    better = (first[:, :, None] < first[:, None]) & (second[:, :, None] < second[:, None])
    assert (found[:, :, None] < found[:, None])[better].all()
    np.testing.assert_array_equal(fuse(first, second, 4) >= 4, first >= 4)
    table = search(query_of('drug02'), Inverse(noise=3.), Forward(), DRUGS, 'x', 1, k=12, fused=True)
    assert table['rank'].tolist() == list(range(1, 13))


def test_conditions_and_simulation_are_laid_out_alike():
    conditions = conditions_of(DRUGS[:3], 'x', [1., 5.], 24.)
    assert conditions['perturbation'].tolist() == [d for d in DRUGS.index[:3] for _ in range(2)] and conditions['dose'].tolist() == [1, 5] * 3
    asked, effects, var = simulate(Forward(), DRUGS[:3], 'x', {'drug01': ['2 uM'], '': [1., 5.]})
    assert asked['dose'].tolist() == [1, 5, 2, 1, 5] and effects.shape == var.shape == (5, 40)
    np.testing.assert_allclose(effects[2], EFFECT.iloc[1] * 2 / 3)
    with pytest.raises(Problem, match='dose: none for drug00, drug02'): conditions_of(DRUGS[:3], 'x', {'drug01': 1})


def informed(n_cells=25, seed=2):
    "A model that knows nothing, informed by noisy measurements of drug00 ... drug05 at 1 µM in x, and rows that do nothing."
    rng = np.random.default_rng(seed)
    names = [*DRUGS.index[:6], *(f'still{i}' for i in range(30))]
    truth = np.vstack([EFFECT.iloc[:6], np.zeros((30, 40))])
    obs = pd.DataFrame(dict(perturbation=names, context='x', dose=1., time_h=24., n_cells=n_cells), index=names)
    train = ad.AnnData(truth + rng.normal(size=truth.shape) / np.sqrt(n_cells), obs, pd.DataFrame(index=GENES))

    class Blank(Forward):
        def predict(self, conditions, controls=None): return np.zeros((len(conditions), 40))

    return Informed(Blank(), train), train, truth


def test_what_was_measured_informs_and_noise_does_not():
    model, train, truth = informed()
    predicted = model.predict(train.obs)
    assert model.c == pytest.approx(1, rel=.25)
    assert np.linalg.norm(predicted[:6] - truth[:6], axis=1).mean() < np.linalg.norm(truth[:6], axis=1).mean() / 4
    assert np.linalg.norm(predicted[6:]) < np.linalg.norm(train.X[6:]) / 2
    assert (model.var(train.obs)[:6] < .01).all() and (model.var(train.obs) <= .04).all()
    for other in (dict(dose=2.), dict(context='y'), dict(time_h=6.), dict(perturbation='drug11')): assert not model.predict(train.obs[:6].assign(**other)).any()


def test_measurements_help_the_search_for_measured_drugs_only():
    model, _, _ = informed()
    for drug in DRUGS.index[:6]: assert search(query_of(drug, 1.), Inverse(noise=2.), model, DRUGS, 'x', 1, k=12)['drug'][0] == drug
    unseen = search(query_of('drug08', 1.), Inverse(), model, DRUGS, 'x', 1, k=12).set_index('drug')
    assert unseen.loc[DRUGS.index[6:], 'remaining'].round(9).eq(1).all()
