"""The simulator: its equations against closed forms and sums, its sampling against its moments, its facts against public tables."""
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rdkit import Chem
from rdkit.Chem.MolStandardize import rdMolStandardize
from scipy.stats import nbinom

from perturb_research.core import Problem, effective, generator
from perturb_research.data import simulate as sim

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2]/'shared'/'data'
TAHOE, CHEMBL = SHARED/'tahoe'/'drug_metadata.parquet', SHARED/'drugs'/'chembl_mechanisms.tsv'


@pytest.fixture(scope='module')
def compounds(): return pd.read_csv(ROOT/'data'/'reference'/'drugs.csv', keep_default_na=False)

@pytest.fixture(scope='module')
def genes(): return sim.simulate_screen(sim.preset('sim', 'small'), 0)

@pytest.fixture(scope='module')
def drugs(compounds): return sim.simulate_drug_screen(sim.preset('sim_drugs', 'small'), compounds, 0)


# the facts

def skeleton(smiles):
    "First block of the InChIKey of the neutral parent: which atoms are joined to which."
    parent = rdMolStandardize.Uncharger().uncharge(rdMolStandardize.LargestFragmentChooser().choose(Chem.MolFromSmiles(smiles)))
    return Chem.MolToInchiKey(parent)[:14]

def test_compounds_are_whole_and_unique(compounds):
    assert list(compounds) == ['name', 'chembl_id', 'smiles', 'targets', 'mechanism', 'source'] and len(compounds) == 60
    assert compounds['name'].is_unique and compounds['smiles'].is_unique
    ids = compounds.loc[compounds['chembl_id'] != '', 'chembl_id']
    assert ids.is_unique and ids.str.fullmatch(r'CHEMBL\d+').all()
    assert (compounds['smiles'] == [Chem.MolToSmiles(Chem.MolFromSmiles(s)) for s in compounds['smiles']]).all()
    assert compounds['smiles'].map(skeleton).is_unique
    assert compounds['targets'].str.fullmatch(r'[A-Z][A-Z0-9]+(;[A-Z][A-Z0-9]+){0,4}').all()
    assert (compounds[['name', 'mechanism', 'source']] != '').all(axis=None)

@pytest.mark.skipif(not TAHOE.exists(), reason='Tahoe-100M drug metadata are not here')
def test_compounds_agree_with_tahoe(compounds):
    tahoe = pd.read_parquet(TAHOE)
    tahoe['key'] = tahoe['drug'].map(lambda name: re.sub(r'\s*\(.*\)', '', name).lower())
    listed = compounds[compounds['source'].str.contains('Tahoe')]
    assert len(listed) > 50
    for row in listed.itertuples():
        same = tahoe[tahoe['key'] == row.name.lower()]
        assert skeleton(row.smiles) in set(same['canonical_smiles'].map(skeleton)), row.name
        assert set(row.targets.split(';')) & set(', '.join(same['targets'].dropna()).split(', ')), row.name

@pytest.mark.skipif(not CHEMBL.exists(), reason='the ChEMBL mechanisms are not here')
def test_compounds_agree_with_chembl(compounds):
    chembl = pd.read_csv(CHEMBL, sep='\t')
    listed = compounds[compounds['chembl_id'] != '']
    assert len(listed) >= 59
    for row in listed.itertuples():
        same = chembl[chembl['parent_chembl_id'] == row.chembl_id]
        assert set(row.targets.split(';')) & set(same['gene_symbol']), row.name
        assert row.mechanism in set(same['mechanism_of_action']), row.name


# the equations

def test_steady_state_of_one_regulator_is_its_closed_form():
    "A lone regulator with no edge but one to a gene: both fold changes can be written down."
    net = sim.Network(expression=np.zeros(2), basal=np.array([-4., -2.]), occupancy=np.array([.5]), strength=np.ones(1), weights=np.zeros((1, 1)),
                      loadings=np.zeros((1, 2)), shared=np.zeros(2), exposure=np.zeros(1), direct=np.array([[0, 3.]]), lam=.25, zmax=1.3, indirect=.3)
    p = lambda x: 1 / (1 + np.exp(-x))
    own = np.log((.25 * p(-4) + .75 * p(-4 + 4)) / p(-4))
    change = .5 * np.exp(own) / (1 + .5 * np.exp(own)) - .5 / 1.5
    target = np.log((.25 * p(-2) + .75 * p(-2 + 3 * change)) / p(-2))
    np.testing.assert_allclose(sim.steady_state(net, np.array([[4.]]), np.zeros((1, 1)))[0], [own, target], atol=1e-6)

def test_activity_leaves_the_messenger_of_its_target_alone():
    p = sim.preset('sim_drugs', 'small')
    net = sim.network(p, generator(3, 'net'))
    net = dataclasses.replace(net, weights=0 * net.weights, exposure=0 * net.exposure)  # direct edges are left, none from a regulator to itself
    direct = net.direct.copy()
    direct[:, :p['regulators']] = 0
    a = np.zeros((1, p['regulators']))
    a[0, 5] = -3
    delta = sim.steady_state(dataclasses.replace(net, direct=direct), np.zeros_like(a), a)
    np.testing.assert_allclose(delta[0, :p['regulators']], 0, atol=1e-12)
    assert np.array_equal(np.abs(delta[0]) > 1e-12, direct[5] != 0)

@pytest.mark.parametrize('dataset', ['sim', 'sim_drugs'])
def test_feedback_is_scaled_and_the_iteration_converges(dataset):
    p = sim.preset(dataset)
    net = sim.network(p, generator(1, dataset))
    line = sim.further_line(net, p, generator(1, dataset, 'line'))
    drive = np.zeros((5, p['regulators']))
    drive[np.arange(5), np.arange(5)] = 3.7
    for one in (net, line):
        assert sim.feedback_radius(one) == pytest.approx(.5)
        np.testing.assert_allclose(sim.steady_state(one, drive, 0 * drive), sim.steady_state(one, drive, 0 * drive, steps=100), atol=.01)

@pytest.mark.parametrize('mean, dispersion, scale', [(.05, 2., 10.), (.8, .3, 5.), (12., .2, 1.), (150., .5, .3)])
def test_moments_of_counts_against_the_plain_sum(mean, dispersion, scale):
    p = sim.preset('sim_drugs', 'small') | dict(umi_med=1e4, umi_sd=0., response_sd=0., guide_sd=0.)
    net = dataclasses.replace(sim.network(p, generator(0, 'x')), expression=np.full(p['genes'], np.log(mean)))
    nothing = np.zeros(p['genes'])
    states = sim.CellStates(cycle=np.zeros((2, p['genes'])), growth=nothing, batch=nothing[None], dispersion=nothing + dispersion)
    composition = np.log(1 / scale / sim.panel_share(net, states))  # so that one count is `scale` per 10,000
    m1, m2 = sim.log1p_moments(p, net, states, shift=composition)(0, composition)
    x = np.arange(20_000)
    weight = nbinom.pmf(x, 1 / dispersion, 1 / (1 + dispersion * mean))
    assert m1[0, 0] == pytest.approx((weight * np.log1p(scale * x)).sum(), rel=.02)
    assert m2[0, 0] == pytest.approx((weight * np.log1p(scale * x) ** 2).sum(), rel=.02)

def test_counts_have_the_mean_and_variance_of_the_negative_binomial():
    p = sim.preset('sim', 'small')
    net, G = sim.network(p, generator(0, 'x')), p['genes']
    states = sim.CellStates(cycle=np.zeros((2, G)), growth=np.zeros(G), batch=np.zeros((1, G)), dispersion=np.full(G, .5))
    n = 6000
    X = sim.draw_counts(net, states, np.full((1, G), .4), np.zeros(n, int), np.ones(n), np.zeros(n, int), np.full(n, 1e4), generator(0, 'counts')).toarray()
    mean = np.exp(net.expression + .4)
    often = mean > .3
    np.testing.assert_allclose(X.mean(0)[often], mean[often], rtol=.12)
    np.testing.assert_allclose((X.var(0) / (mean + .5 * mean ** 2))[often].mean(), 1, atol=.05)


# the screens

def test_gene_screen_holds_what_it_promises(genes):
    screen, truth, net = genes
    p = sim.preset('sim', 'small')
    assert np.array_equal(screen.X.data, np.rint(screen.X.data)) and screen.X.data.min() >= 1
    measured = set(screen.obs['perturbation']) - {'control'}
    assert measured == set(truth.obs['perturbation'][truth.obs['measured']]) and len(measured) == p['singles'] + p['doubles']
    doubles = [c for c in truth.obs['perturbation'] if '+' in c]
    assert len(doubles) == p['grid'] * (p['grid'] - 1) // 2
    assert all(c.split('+') == sorted(c.split('+')) and set(c.split('+')) <= set(truth.var_names) for c in doubles)
    assert all(set(c.split('+')) <= measured for c in doubles)  # every single of the grid is measured
    assert screen.obs.groupby('perturbation')['batch'].nunique().min() == p['batches'] and screen.var_names.is_unique

def test_measured_effects_are_the_true_ones_plus_noise(genes):
    screen, truth, _ = genes
    X = screen.X.toarray()
    X = np.log1p(1e4 * X / X.sum(1, keepdims=True))
    labels = screen.obs['perturbation'].to_numpy()
    true = pd.DataFrame(truth.X, truth.obs['perturbation'].astype(str))
    conditions = [c for c in truth.obs['perturbation'][truth.obs['measured']]]
    seen = np.stack([X[labels == c].mean(0) - X[labels == 'control'].mean(0) for c in conditions])
    expected = true.loc[conditions].to_numpy()
    assert (seen * expected).sum() / (expected ** 2).sum() == pytest.approx(1, abs=.1)

def test_drug_screen_is_condition_level_with_independent_halves(drugs):
    screen, truth, cells, baseline, _ = drugs
    p = sim.preset('sim_drugs', 'small')
    assert screen.n_obs == p['drugs'] * p['lines'] * 3 and not screen.obs[['drug', 'cell_line', 'dose']].duplicated().any()
    assert not screen.obs['drug'].astype(str).str.contains('control|DMSO').any() and list(screen.obs_names) == list(truth.obs_names)
    noise = [screen.layers[h] - truth.X for h in ('half1', 'half2')]
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < .05
    assert np.corrcoef((noise[0] + noise[1]).ravel() / 2, (screen.X - truth.X).ravel())[0, 1] > .99
    assert (screen.X * truth.X).sum() / (truth.X ** 2).sum() == pytest.approx(1, abs=.05)
    assert baseline.n_obs == p['lines'] and set(cells.obs['drug']) - {'control'} <= set(screen.obs['drug'])
    assert cells.obs.groupby('cell_line')['drug'].agg(lambda d: 'control' in set(d)).all()

def test_cells_of_the_subset_agree_with_the_means(drugs):
    screen, truth, cells, *_ = drugs
    X = cells.X.toarray()
    X = np.log1p(1e4 * X / X.sum(1, keepdims=True))
    o, slopes = cells.obs, []
    for (drug, line), rows in o[o['dose'] == 5].groupby(['drug', 'cell_line']):
        effect = X[o.index.get_indexer(rows.index)].mean(0) - X[((o['drug'] == 'control') & (o['cell_line'] == line)).to_numpy()].mean(0)
        true = truth[f'{drug}|5|{line}'].X[0]
        slopes.append((effect @ true) / (true @ true))
    assert np.mean(slopes) == pytest.approx(1, abs=.15)

def test_analogues_are_molecules_that_nobody_has_twice(drugs):
    screen = drugs[0]
    table = screen.obs.drop_duplicates('drug')
    assert table['smiles'].is_unique and all(Chem.MolFromSmiles(s) for s in table['smiles'])
    assert set(table.loc[table['is_analogue'], 'parent']) <= set(table.loc[~table['is_analogue'], 'drug'])
    assert set(';'.join(table['targets']).split(';')) <= set(screen.var_names[screen.var['regulator']])

def test_targets_are_inherited_as_often_as_stated(compounds):
    p = sim.preset('sim_drugs')
    library = sim.drug_library(p, compounds, generator(0, 'library'))
    assert (len(library), (~library['is_analogue']).sum(), library['smiles'].nunique(), library['name'].nunique()) == (240, 60, 240, 240)
    parent = library.set_index('name')['targets']
    same = library['targets'] == library['parent'].map(parent)
    assert same[library['is_analogue']].mean() == pytest.approx(p['inherit'], abs=.08)

def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(genes, drugs, compounds):
    p = sim.preset('sim', 'small')
    again, other = sim.simulate_screen(p, 0)[0], sim.simulate_screen(p, 1)[0]
    assert (again.X != genes[0].X).nnz == 0 and again.obs.equals(genes[0].obs)
    assert other.shape != again.shape or (other.X != again.X).nnz
    assert np.array_equal(sim.simulate_drug_screen(sim.preset('sim_drugs', 'small'), compounds, 0)[0].X, drugs[0].X)

def test_origin_names_version_and_parameters(genes, drugs):
    for adata in (*genes[:2], *drugs[:4]):
        origin = json.loads(adata.uns['origin'])
        assert adata.uns['simulated'] and origin['version'] == sim.SIMULATOR_VERSION and origin['seed'] == 0 and origin['parameters']['lam'] == .25
    assert drugs[0].uns['effect_scale'] == 'mean_log1p' and drugs[0].uns['halves_share_controls'] is False


# the prior

def test_prior_has_the_stated_recall_and_precision(genes):
    screen, _, net = genes
    p = sim.preset('sim')
    net = sim.network(p, generator(0, 'net'))
    names = sim.gene_names(p, {})
    graph, sets, stated = sim.prior_knowledge(p, net, names, generator(0, 'prior'))
    true = set(map(tuple, sim.true_edges(net, names).query("kind == 'direct'")[['source', 'target']].to_numpy()))
    said = set(map(tuple, graph[['source', 'target']].to_numpy()))
    assert len(said & true) / len(true) == pytest.approx(p['graph_recall'], abs=.02)
    assert len(said & true) / len(said) == pytest.approx(p['graph_precision'], abs=.02)
    members = sum(len(m) for m in sets.values())
    assert stated['sets']['hits'] / members == pytest.approx(p['sets_precision'], abs=.02)
    assert stated['sets']['hits'] / stated['sets']['true_entries'] == pytest.approx(p['sets_recall'], abs=.02)

def test_no_other_data_set_is_simulated():
    with pytest.raises(Problem, match="'dataset' is 'norman'"): effective({'dataset': 'norman'}, dataset=tuple(sim.PRESETS))


def test_counts_do_not_hang_on_the_last_digit_of_a_processor():
    "The same screen, to the bit, from another BLAS kernel and without the vector instructions that round differently."
    program = ("import hashlib; from perturb_research.data import simulate as sim; s = sim.simulate_screen(sim.preset('sim'), 0)[0]; "
               "print(hashlib.sha256(s.X.data.tobytes() + s.X.indices.tobytes() + '|'.join(s.obs['perturbation']).encode()).hexdigest())")
    other = dict(OPENBLAS_CORETYPE="Prescott", NPY_DISABLE_CPU_FEATURES="AVX2 FMA3")
    runs = [subprocess.Popen([sys.executable, "-c", program], env=os.environ | more, stdout=subprocess.PIPE, text=True) for more in ({}, other)]
    (first, _), (second, _) = (run.communicate() for run in runs)
    assert len(first) == 65 and first == second
