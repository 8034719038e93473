"""Targets of drugs never seen, and drugs found by the other half of their cells, on `sim_drugs`; run by hand: `python benchmarks/candidates.py [effects.h5ad] [--seeds 0-19] [--models ...]`.

Splits by drug: recall@10 and NDCG@10 of targets over active conditions, averaged over the conditions of a drug in a split, then over its splits;
differences to popularity, nearest neighbour and logistic regression are paired by drug. The replicate query: half 2 of each active condition, half 1 trained on; `--no-replicate` leaves it out.
The settings of the network were compared on seed 0: `--seeds 1-5` are splits that no choice has seen.
"""
import argparse
import resource
import time

import anndata as ad
import numpy as np
import pandas as pd

from perturb_research.core import generator, project_root
from perturb_research.data.splits import make_split
from perturb_research.drugs.candidate import catalogue, telling
from perturb_research.evaluate.calibration import bootstrap_interval
from perturb_research.evaluate.ranking import ceiling_ranking, chance_ranking, ranking_scores
from perturb_research.models.inverse import INVERSE, listed, membership

MODELS = 'popularity', 'nearest', 'nearest_whitened', 'ridge', 'logistic', 'dc'


def several(text):
    "'1-3' or '0,4' as numbers."
    return [n for part in text.split(',') for n in (range(int(part.split('-')[0]), int(part.split('-')[1]) + 1) if '-' in part else [int(part)])]


def active(effects):
    "Names of the conditions whose halves agree beyond noise."
    one, two = (np.asarray(effects.layers[f'half{i}'], dtype=float) for i in (1, 2))
    return effects.obs_names[telling((one * two).sum(1) / np.maximum(np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1), 1e-12))]


def asked(split, effects, names, drugs, targets):
    "Active test rows, their drugs' targets, and which drug each is."
    test = split.test(effects)
    test = test[test.obs_names.isin(names)]
    drug = drugs.index.get_indexer(test.obs['perturbation'].astype(str))
    return test, membership(drugs, targets)[drug], drug


def trained(name, split, effects):
    "A fitted way of searching, and its seconds of processor time."
    start, val = time.process_time(), split.val(effects)
    model = INVERSE[name]().fit(split.train(effects), val=val if val.n_obs else None, rng=generator(0, split.name, name))
    return model, time.process_time() - start


def on_all(model, scores, targets):
    full = np.full((len(scores), len(targets)), -np.inf)
    full[:, np.searchsorted(targets, model.target_names)] = scores
    return full


def unseen(effects, names, drugs, targets, seeds, models):
    "Rows: split, drug, model, recall@10, ndcg@10, ap@10, hit@10 and hit@50 of the drug."
    rows, seconds = [], []
    for seed in seeds:
        split = make_split(effects, 'perturbation', seed)
        test, T, drug = asked(split, effects, names, drugs, targets)
        X, who = np.asarray(test.X, dtype=float), test.obs['perturbation'].astype(str).to_numpy()
        keep = lambda model, table: rows.append(table.groupby(who).mean().assign(split=seed, model=model).rename_axis('drug').reset_index())
        known = membership(catalogue(split.train(effects).obs)[0], targets).any(0)
        keep('ceiling', ceiling_ranking(T, known, (10,)))
        keep('chance', chance_ranking(len(targets), T.sum(1), (10,)))
        for name in models:
            model, took = trained(name, split, effects)
            found = ranking_scores(on_all(model, model.targets(X), targets), T, (10,))
            own = drug[:, None] == np.arange(len(drugs))
            keep(name, found.join(ranking_scores(-model.rank(X, drugs), own, (10, 50)).filter(like='hit').add_prefix('drug ')))
            if name == 'dc': seconds.append(took)
        print(f'split {seed}: {len(test)} active conditions of {len(set(who))} drugs; network trained in {seconds[-1] if seconds else np.nan:.1f} s', flush=True)
    return pd.concat(rows, ignore_index=True), seconds


def differences(table, metric, others=('popularity', 'nearest', 'nearest_whitened', 'ridge', 'logistic')):
    values = table.groupby(['drug', 'model'])[metric].mean().unstack()
    for other in [o for o in others if o in values]:
        gain = (values['dc'] - values[other]).dropna().to_numpy()
        low, high = bootstrap_interval(gain, generator(0, metric, other), 2000)
        print(f'{metric}: dc less {other:16} {gain.mean():+.4f} [{low:+.4f}, {high:+.4f}] over {len(gain)} drugs')


def replicate(effects, names, drugs, targets, models):
    split = make_split(effects, 'replicate', 0)
    test, _, drug = asked(split, effects, names, drugs, targets)
    for name in [m for m in models if m not in ('popularity', 'ridge', 'logistic')]:
        model, took = trained(name, split, effects)
        start = time.perf_counter()
        found = ranking_scores(-model.rank(np.asarray(test.X, dtype=float), drugs), drug[:, None] == np.arange(len(drugs)), (1, 10, 50))
        print(f"replicate, {name}: {len(test)} active conditions, drug in the first 1 / 10 / 50 of {len(drugs)}: "
              + ' / '.join(f"{found[f'hit@{k}'].mean():.3f}" for k in (1, 10, 50)) + f"; trained in {took:.1f} s, ranked in {time.perf_counter() - start:.2f} s")


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('effects', nargs='?', default=project_root()/'data/processed/sim_drugs/effects.h5ad')
    parser.add_argument('--seeds', type=several, default=list(range(20)))
    parser.add_argument('--models', nargs='+', default=MODELS, choices=list(INVERSE))
    parser.add_argument('--no-replicate', action='store_true')
    given = parser.parse_args()
    effects = ad.read_h5ad(given.effects)
    names, (drugs, _) = active(effects), catalogue(effects.obs)
    targets = sorted({t for mine in listed(drugs['targets']) for t in mine})
    print(f'{len(names)} of {effects.n_obs} conditions are active, {len(drugs)} drugs, {len(targets)} targets')
    if not given.no_replicate: replicate(effects, names, drugs, targets, given.models)
    table, seconds = unseen(effects, names, drugs, targets, given.seeds, given.models)
    print(table.groupby(['model', 'drug']).mean(numeric_only=True).groupby('model').mean().drop(columns='split').round(3).to_string())
    if 'dc' in given.models:
        for metric in ('recall@10', 'ndcg@10'): differences(table, metric)
        print(f'network trained in {np.mean(seconds):.1f} s of processor time on average; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB')
