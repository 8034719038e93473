"Finding drugs from effects: the rules it must find, what must not matter to it, and what it refuses."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose

from perturb_research.core import Problem, generator
from perturb_research.drugs.candidate import Candidate, CandidateNet, agreement, align, alignment, best_of, catalogue, enrichment, lead, shortlist, target_loss, telling
from perturb_research.models.inverse import INVERSE, best_in, causes, listed, membership, positive_weight

FAST = dict(epochs=4, components=12, structure=8, latents=2, width=16, heads=2)
SMILES = ['CCO', 'CCCO', 'CC(C)O', 'c1ccccc1', 'Cc1ccccc1', 'CC(=O)O', 'CCN', 'CCCN', 'CCCCO', 'Clc1ccccc1', 'CCCCN', 'CC(N)=O', 'CCS', 'CCCS', 'CCCl', 'CCCCl', 'CCBr', 'CCF']
PAIRS = [(0,), (1,), (2,), (3,)] * 2 + [(i, j) for i in range(4) for j in range(i + 1, 4)] + [(0,), (1,), (2,), (3,)]


def screen(seed=0, genes=50, noise=1.):
    "18 drugs in three lines at two doses, half 1 and half 2 beside X: a target has a direction, a drug adds up those of its one or two."
    rng = generator(seed, 'screen')
    push = 3 * rng.normal(size=(4, genes))
    rows = [(d, c, a) for d in range(18) for c in range(3) for a in (1., 10.)]
    obs = pd.DataFrame([dict(perturbation=f'drug{d:02}', perturbation_type='drug', context=f'line{c}', dose=a, time_h=24., smiles=SMILES[d],
                             targets=';'.join(f'T{t}' for t in PAIRS[d])) for d, c, a in rows])
    obs.index = obs['perturbation'] + '|drug|' + obs['dose'].map('{:g}'.format) + '|24|' + obs['context']
    clean = np.array([push[list(PAIRS[d])].sum(0) * (.4 if a < 2 else 1.) * (1 + .1 * d / 18) + .3 * np.roll(push[0], d) for d, c, a in rows])
    one, two = (clean + noise * rng.normal(size=clean.shape) for _ in (1, 2))
    return ad.AnnData(((one + two) / 2).astype('float32'), obs, pd.DataFrame(index=[f'G{i}' for i in range(genes)]), layers=dict(half1=one, half2=two))


def parts(held=('drug08', 'drug13', 'drug17')):
    effects = screen()
    new = effects.obs['perturbation'].isin(held).to_numpy()
    return effects[~new].copy(), effects[new].copy()


def fit(train, seed=0, **changes): return Candidate(**FAST | changes).fit(train, rng=generator(seed, 'fit'))


@pytest.fixture(scope='module')
def model(): return fit(parts()[0])


def truth(model, rows): return membership(catalogue(rows.obs)[0].loc[rows.obs['perturbation'].astype(str)], model.target_names)


def test_a_planted_rule_is_learned(model):
    "Targets of drugs with pairs never seen together: both before the others; beyond popularity and chance."
    train, test = parts()
    both = truth(model, test)
    def hits(scores):
        order = np.argsort(-scores, axis=1, kind='stable')
        return np.mean([y[o[:y.sum()]].mean() for y, o in zip(both, order)])
    assert hits(model.targets(test.X)) > .9 > hits(INVERSE['popularity']().fit(train).targets(test.X))


def test_a_seen_drug_is_found_by_its_other_half(model):
    effects = screen(seed=0)
    train = effects.copy()
    train.X, query = effects.layers['half1'].astype('float32'), effects.layers['half2']
    fitted = fit(train)
    distance = fitted.rank(query, fitted.drugs)
    own = fitted.drugs.index.get_indexer(effects.obs['perturbation'])
    place = (distance < distance[np.arange(len(own)), own][:, None]).sum(1)
    assert (place < 5).mean() > .95


def test_a_drug_never_measured_can_be_proposed(model):
    train, test = parts()
    everything = catalogue(screen().obs)[0]
    distance = model.rank(test.X, everything)
    assert np.isfinite(distance).all()
    own = everything.index.get_indexer(test.obs['perturbation'])
    assert (distance < distance[np.arange(len(own)), own][:, None]).sum(1).mean() < 8  # of 18; 8.5 by chance
    nearest = INVERSE['nearest']().fit(train).rank(test.X, everything)
    assert np.isinf(nearest[:, everything.index.isin(test.obs['perturbation'])]).all() and np.isfinite(nearest).sum(1).min() == 15
    nothing = pd.DataFrame(dict(smiles=[''], targets=['']), index=['nobody'])
    assert np.isinf(model.rank(test.X, nothing)).all()  # neither effect nor structure nor target


def test_gradients_reach_every_parameter():
    rng = generator(0, 'gradient')
    torch.manual_seed(0)
    net = CandidateNet(rng.normal(size=(20, 6)), rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), latents=2, width=8, heads=2).double()
    drug, Y = torch.tensor(np.repeat(np.arange(6), 4)), torch.tensor(rng.random((6, 4)) < .5).double()
    Y[:4] += torch.eye(4)
    net.remember(torch.tensor(rng.normal(size=(24, 6))), Y.clamp(max=1), drug)
    net.structure, net.drawn = torch.tensor(rng.normal(size=(6, 3))), torch.ones(6).double()
    net.tail, net.losses = 'balanced', dict(bce=1., cosine=1., infonce=1., clip=1.)
    net.weight, net.prior = torch.ones(4).double(), torch.zeros(4).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=.05)
    for _ in range(3):  # last layers start at zero: what is before them moves from the second step on
        optimizer.zero_grad()
        losses = net(torch.tensor(rng.normal(size=(24, 20))), torch.tensor(rng.normal(size=(24, 1))), net.memory + .1, torch.arange(24), torch.arange(24) % 2 == 0)
        losses['loss'].backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert set(losses) == {'bce', 'cosine', 'infonce', 'clip', 'loss'}


def test_a_hidden_drug_is_not_seen():
    "What a training row may not see has no part in its odds."
    rng = generator(0, 'hidden')
    net = CandidateNet(rng.normal(size=(9, 5)), np.zeros((5, 3)), np.zeros((5, 2)), latents=2, width=8, heads=2).double()
    memory, drug, Y = torch.tensor(rng.normal(size=(6, 5))), torch.tensor([0, 0, 1, 1, 2, 2]), torch.eye(3).double()
    e, head, hidden = torch.nn.functional.normalize(memory[:1], dim=1), torch.zeros(1, 3).double(), (drug == 0)[None]
    net.remember(memory, Y, drug)
    before = net.log_odds(e, head, hidden)[0]
    changed = memory.clone()
    changed[:2] = torch.tensor(rng.normal(size=(2, 5)))
    net.remember(changed, Y, drug)
    assert torch.equal(net.log_odds(e, head, hidden)[0], before) and not torch.equal(net.log_odds(e, head)[0], before)


def test_same_seed_same_numbers_other_seed_others(model):
    train, test = parts()
    again, other = fit(train), fit(train, seed=1)
    assert (again.targets(test.X) == model.targets(test.X)).all() and (other.targets(test.X) != model.targets(test.X)).any()


def test_order_of_genes_rows_and_questions_does_not_matter(model):
    train, test = parts()
    order = generator(0, 'genes').permutation(train.n_vars)
    start = dict(epochs=1, lr=0.)  # gene vectors are drawn in the genes' order, so the start is compared
    one, other = fit(train, **start), fit(train[:, order].copy(), **start)
    assert_allclose(other.targets(test.X[:, order]), one.targets(test.X), atol=1e-6)
    assert_allclose(model.targets(test.X[::-1]), model.targets(test.X)[::-1], atol=1e-9)
    everything = catalogue(screen().obs)[0]
    assert_allclose(model.rank(test.X, everything.iloc[::-1])[:, ::-1], model.rank(test.X, everything), atol=1e-9)


def test_training_rows_are_all_that_counts():
    "Validation rows tell when to stop, nothing else; other halves and other columns of the training rows have no part."
    train, test = parts()
    changed = test.copy()
    changed.X = changed.X[::-1] * 2
    make = lambda val: Candidate(**FAST | dict(patience=0)).fit(train, val=val, rng=generator(0, 'fit')).targets(test.X)
    assert (make(test) == make(changed)).all() and (make(test) == make(None)).all()
    stopped = Candidate(**FAST | dict(epochs=12, patience=2)).fit(train, val=test, rng=generator(0, 'fit'))
    assert stopped.hyperparameters['epochs_run'] <= 12 and (stopped.history['what'] == 'val').any()
    assert stopped.target_names == ['T0', 'T1', 'T2', 'T3'] and set(stopped.drugs.index) == set(train.obs['perturbation'])


def test_a_checkpoint_gives_the_same_model(tmp_path):
    train, test = parts()
    one, again = (Candidate(**FAST | dict(epochs=2)).fit(train, rng=generator(0, 'fit'), checkpoint=tmp_path/'c.pt') for _ in range(2))
    assert (one.targets(test.X) == again.targets(test.X)).all() and len(again.history)


@pytest.mark.parametrize('name', [n for n in INVERSE if n != 'dc'])
def test_baselines_beat_chance_where_they_can(name):
    train, test = parts()
    fitted = INVERSE[name]().fit(train, rng=generator(0, name))
    scores, distance = fitted.targets(test.X), fitted.rank(test.X, fitted.causes)
    assert scores.shape == (len(test), 4) and distance.shape == (len(test), 15) and not np.isnan(distance).any()
    y = truth(fitted, test)
    wins = np.mean([(s[a] > s[b]) + .5 * (s[a] == s[b]) for s, mine in zip(scores, y) for a in np.flatnonzero(mine) for b in np.flatnonzero(~mine)])
    assert wins > (.8 if name != 'popularity' else 0)


def test_connectivity_is_the_running_sum():
    "Against the definition, gene by gene."
    rng = generator(0, 'ks')
    profiles, up = rng.normal(size=(5, 40)), np.array([rng.permutation(40)[:6] for _ in range(3)])
    for i, mine in enumerate(up):
        for j, r in enumerate(profiles):
            total, highest = 0., 0.
            for g in np.argsort(-r):
                total += abs(r[g]) / np.abs(r[mine]).sum() if g in mine else -1 / 34
                if abs(total) > abs(highest): highest = total
            assert enrichment(profiles, up)[i, j] == pytest.approx(highest)


def test_groups_take_their_best():
    rng = generator(0, 'groups')
    S, member = rng.random((4, 9)), rng.random((9, 5)) < .4
    member[:, 2] = False
    expected = np.where(member.any(0), np.array([[max(s[member[:, j]], default=-np.inf) for j in range(5)] for s in S]), -np.inf)
    assert_allclose(best_in(S, member, 5), expected)
    row, group = map(torch.tensor, np.nonzero(member))
    assert_allclose(best_of(torch.tensor(S), row, group, 5, -1.), np.maximum(expected, -1))


def test_losses_are_what_they_say():
    odds, Y = torch.tensor([[2., -1.], [0., 3.]]).double(), torch.tensor([[1., 0.], [0., 0.]]).double()
    plain = target_loss(odds, Y, 'plain', None, None)
    assert float(plain) == pytest.approx(np.mean(np.logaddexp(0, [-2, -1, 0, 3])))
    assert float(target_loss(odds, Y, 'balanced', torch.tensor([3., 1.]).double(), None) - plain) == pytest.approx(2 * np.logaddexp(0, -2) / 4)
    assert float(target_loss(odds, Y, 'asymmetric', None, None)) < float(plain)
    assert float(target_loss(odds, Y, 'adjusted', None, torch.zeros(2).double())) == pytest.approx(float(plain))
    eye, same = torch.eye(3).double(), torch.eye(3).bool()
    assert float(alignment(eye, eye, same, 100.)) < 1e-6 < float(alignment(eye, eye.roll(1, 0), same, 100.))
    assert (positive_weight(np.array([[1, 0], [1, 0], [1, 1.], [0, 0]])) >= 1).all()


def test_silent_rows_are_left_out():
    "Rows of noise do not agree with the other rows of their drug; a drug with one row is kept."
    rng = generator(0, 'silent')
    drug = np.repeat(np.arange(40), 5)
    X = rng.normal(size=(200, 60)) + np.where(drug < 20, 1., 0.)[:, None] * rng.normal(size=(40, 60))[drug]
    kept = telling(agreement(X, drug))
    assert kept[drug < 20].mean() > .8 and kept[drug >= 20].mean() < .1
    assert telling(agreement(X[:10], np.arange(10))).all()


def test_structures_may_come_from_a_table_or_be_read():
    train, test = parts()
    table = pd.DataFrame(generator(0, 'table').normal(size=(18, 5)), index=[f'drug{d:02}' for d in range(18)])
    for changes in (dict(embeddings=table), dict(molecules='smiles')):
        fitted = fit(train, epochs=2, **changes)
        assert np.isfinite(fitted.rank(test.X, catalogue(screen().obs)[0])).all()
    letters = fitted.molecules(pd.DataFrame(dict(smiles=['CCO', '', 'C%'])))
    assert (letters[0] > 1).sum() == 3 and not letters[1].any() and letters[2, 1] == 1  # a letter never seen
    assert len({k.split('.')[1] for k, _ in fitted.network.named_parameters() if k.startswith('molecule.')}) == 3  # letters, recurrence, out
    with pytest.raises(Problem, match='molecules'): fit(train, molecules='graph')


def test_signatures_are_aligned_by_name():
    row, said = align(pd.Series({'g1': 1., 'G0': 2., 'G0 ': 9.}), [f'G{i}' for i in range(5)])
    assert row.tolist() == [[2, 1, 0, 0, 0]] and '2 of 5 genes' in said and '1 genes of the signature' in said
    assert align({'A': np.nan, 'B': 1.}, ['A', 'B'])[0].tolist() == [[0, 1]]
    with pytest.raises(Problem, match='1 of the 10 genes.*expected 20%'): align({'G1': 1., 'x': 2.}, [f'G{i}' for i in range(10)])
    with pytest.raises(Problem, match='infinite'): align({'A': np.inf}, ['A'])


def test_odd_drugs_are_kept_and_named():
    table = pd.DataFrame(dict(perturbation=['a', 'b', 'c', 'd', 'd'], smiles=['CCN.Cl', 'C1CC', None, 'CCO', 'CCO'], targets=['T2; T1', None, 'unknown', 'T1', 'T1']))
    drugs, report = catalogue(table)
    assert drugs['smiles'].tolist() == ['CCN', '', '', 'CCO'] and listed(drugs['targets']) == [['T1', 'T2'], [], [], ['T1']]
    assert any('1 drug (b) have a SMILES that cannot be read' in line for line in report) and any('2 drugs (b, c) have no known target' in line for line in report)
    train, test = parts()
    train.obs['smiles'] = train.obs['smiles'].where(train.obs['perturbation'] != 'drug00', 'C1CC')
    train.obs['targets'] = train.obs['targets'].where(train.obs['perturbation'] != 'drug01', '')
    fitted = fit(train, epochs=1)
    assert any('drug00' in line for line in fitted.report) and np.isfinite(fitted.rank(test.X, fitted.drugs)).all()
    no_structures = train.copy()
    no_structures.obs['smiles'] = ''
    assert np.isfinite(fit(no_structures, epochs=1).rank(test.X, fitted.drugs)).all()


def test_the_list_and_its_set(model):
    _, test = parts()
    tables = shortlist(model, test.X[:2], model.drugs, k=5, conformal=1.)
    assert len(tables) == 2 and all(len(t) == 5 and t['distance'].is_monotonic_increasing and t['in_set'][0] for t in tables)
    assert shortlist(INVERSE['popularity']().fit(parts()[0]), test.X[:1], model.drugs, k=50)[0]['drug'].is_unique
    assert_allclose(lead(np.array([[3., 1, np.inf]])), [[2, 0, np.inf]])


@pytest.mark.parametrize('bad, said', [(np.zeros((1, 50)), 'nothing changes in 1 of 1'), (np.ones((1, 7)), 'expected rows of the 50 training genes'),
                                       (np.full((1, 50), np.nan), 'NaN or infinite')])
def test_bad_queries_in_one_line(model, bad, said):
    for ask in (model.targets, lambda q: model.rank(q, model.drugs)):
        with pytest.raises(Problem, match=said): ask(bad)


def test_bad_screens_and_settings_in_one_line(model):
    train, test = parts()
    with pytest.raises(Problem, match="did you mean 'latents'"): Candidate(latent=3)
    with pytest.raises(Problem, match='tail'): fit(train, tail='heavy')
    with pytest.raises(Problem, match='not fitted'): Candidate().targets(test.X)
    with pytest.raises(Problem, match='stands twice'): model.rank(test.X, pd.concat([model.drugs, model.drugs]))
    bare = train.copy()
    bare.obs['targets'] = ''
    with pytest.raises(Problem, match='no training condition has a known target gene'): fit(bare)


def pairs(seed=0, n=50):
    "Six genes and their pairs, each the sum of its genes."
    rng, names = generator(seed, 'pairs'), [f'T{i}' for i in range(6)]
    push, names = rng.normal(size=(6, n)), names + [f'{a}+{b}' for i, a in enumerate(names) for b in names[i + 1:]]
    X = np.array([push[[int(g[1:]) for g in name.split('+')]].sum(0) for name in names]) + .4 * rng.normal(size=(21, n))
    obs = pd.DataFrame(dict(perturbation=names, perturbation_type='CRISPRi', context='x', dose=np.nan, time_h=np.nan), index=names)
    return ad.AnnData(X.astype('float32'), obs, pd.DataFrame(index=[f'G{i}' for i in range(n)]))


def test_genes_without_structures_are_named_too():
    "Training singles are added up in its memory; no loss reaches the structure head; pairs never measured are found."
    effects = pairs()
    held = np.arange(21) % 3 == 2
    held[:6] = False
    model = fit(effects[~held].copy(), epochs=15)
    assert set(model.history['what']) >= {'bce', 'infonce'} and 'clip' not in set(model.history['what'])
    assert model.drugs['smiles'].eq('').all() and len(model.drugs) == 21 and len(model.causes) == 21 - held.sum() and len(model.cause) == len(effects[~held]) + 15
    distance, right = model.rank(effects.X[held], causes(effects.obs)), causes(effects.obs).index.get_indexer(effects.obs_names[held])
    assert (distance < distance[np.arange(held.sum()), right][:, None]).sum(1).mean() < 1
    bare = fit(effects[~held].copy(), epochs=2, sums=0)
    assert len(bare.cause) == 21 - held.sum() and np.isfinite(bare.rank(effects.X[held], causes(effects.obs))).all()
    assert len(fit(effects[~held].copy(), epochs=1, pairs=4).rows) == 21 - held.sum() + 4
