"""Forward models of drugs: `python benchmarks/response.py [drugs lines seeds] [--folder FOLDER] [--folds 5] [--epochs 30] [--seeds 1 2 3] [--kinds ...]`; a few minutes. No limits.

drugs and lines are of real L1000 profiles, seeds of the embedded screen of drugs.

drugs    HT115, 355 compounds (pert_id), mean of their wells less the plate's DMSO; compounds left out in folds: mean L2 over that of the training mean.
lines    14 drugs x 43 lines, line left out in folds: mean L2 over that of the drug's mean. The effect is treated - control, so the noise of a control predicts the effect
         that it was taken from. Each line's wells are therefore halved, and a half is predicted once with the profile of its own controls (shared noise) and once with the other
         half's (independent), in training and in the question; lines with one control are left out.
seeds    `sim_drugs` (`--effects` names another), as notebook 13 trains: L2 of the network over that of its start, fingerprint_line, on splits of other seeds than 0, whose test
         errors were looked at when its settings were chosen. A drug is averaged over its conditions in a split, then over the splits that ask for it; beside it seed 0 alone.
Intervals: 95 %, over compounds or lines; of `seeds` over drugs.
"""
import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from perturb_research.core import generator, project_root
from perturb_research.data.splits import make_split
from perturb_research.drugs.response import DrugMean, FingerprintLine, LineDrug, Response, ResponsePlain
from perturb_research.evaluate.calibration import bootstrap_ratio
from perturb_research.models.baselines import Mean, NoChange

FOLDER = Path(__file__).resolve().parents[2]/'shared'/'data'/'l1000'


def screen(X, controls, lines, **columns):
    "Effects as notebook 04 writes them."
    obs = pd.DataFrame(columns).assign(perturbation_type='drug', time_h=6.)
    obs.index = [f'{p}|{c}|{i}' for i, (p, c) in enumerate(zip(obs['perturbation'], obs['context']))]
    var = pd.DataFrame(index=[f'G{i}' for i in range(X.shape[1])])
    return ad.AnnData(X.astype('float32'), obs, var, uns=dict(control_mean=controls, control_contexts=np.array(lines)))


def held_out(effects, groups, models, folds, **changes):
    "L2 of each model for each row, its group left out with a fold of others; the next fold validates."
    names, found = sorted(set(groups)), pd.DataFrame(index=effects.obs_names, columns=[m.name for m in models], dtype=float)
    fold = pd.Series(generator(0, 'folds').permutation(len(names)) % folds, names)[groups].to_numpy()
    for f in range(folds):
        train, val, test = effects[(fold != f) & (fold != (f + 1) % folds)].copy(), effects[fold == (f + 1) % folds], effects[fold == f]
        for make in models:
            model = (make(**changes) if issubclass(make, Response) else make()).fit(train, val=val, rng=generator(0, make.name, f))
            found.loc[test.obs_names, make.name] = np.linalg.norm(model.predict(test.obs) - test.X, axis=1)
    return found


def said(found, reference, groups, what):
    mean = found.groupby(np.asarray(groups)).mean()
    for name in mean.columns.drop(reference):
        low, high = bootstrap_ratio(mean[name].to_numpy(), mean[reference].to_numpy(), generator(0, what, name))
        print(f'{what}: {name} {mean[name].mean() / mean[reference].mean():.3f} [{low:.3f}, {high:.3f}] of the error of {reference} (n = {len(mean)})', flush=True)


def drugs(folder, folds, **changes):
    given = ad.read_h5ad(folder/'l1000_ht115_355drugs.h5ad')
    control, plate, X = given.obs['control'].to_numpy() == 1, given.obs['rna_plate'].astype(str), np.asarray(given.X, dtype=float)
    X = X - pd.DataFrame(X[control]).groupby(plate[control].to_numpy()).mean().loc[plate].to_numpy()
    who = given.obs['pert_id'].astype(str).to_numpy()
    treated = given.obs[~control].assign(who=who[~control]).drop_duplicates('who').set_index('who').sort_index()
    means = pd.DataFrame(X[~control]).groupby(who[~control]).mean().loc[treated.index].to_numpy()
    effects = screen(means, np.asarray(given.X, dtype=float)[control].mean(0)[None], ['HT115'], perturbation=treated.index.to_numpy(), context='HT115',
                     dose=treated['pert_dose'].to_numpy(float), smiles=treated['SMILES'].astype(str).to_numpy())
    effects.obs.loc[effects.obs['dose'] <= 0, 'dose'] = np.nan
    said(held_out(effects, effects.obs['perturbation'], [NoChange, Mean, FingerprintLine, Response, ResponsePlain], folds, **changes), 'mean', effects.obs['perturbation'], 'unseen drug')


def lines(folder, folds, **changes):
    given = ad.read_h5ad(folder/'l1000_14drugs_43lines.h5ad')
    treated, control = (np.asarray(given.layers[k], dtype=float) for k in ('treated', 'control'))
    line = given.obs['cell'].astype(str).to_numpy()
    half, place = np.full(len(line), -1), {c: np.unique(control[line == c].round(4), axis=0, return_inverse=True)[1] for c in sorted(set(line))}
    for c, which in place.items():
        if len(set(which.ravel())) > 1: half[line == c] = which.ravel() % 2
    keep = half >= 0
    contexts = np.array([f'{c}.{h}' for c, h in zip(line[keep], half[keep])])
    names = sorted(set(contexts))
    mean = {c: control[keep][contexts == c].mean(0) for c in names}
    print(f'{keep.sum()} of {len(keep)} wells in {len(set(line[keep]))} lines with two controls')
    for what, profile in (('shared control', lambda c: mean[c]), ('independent control', lambda c: mean[c[:-1] + str(1 - int(c[-1]))])):
        effects = screen(treated[keep] - control[keep], np.array([profile(c) for c in names]), names, perturbation=given.obs['smiles'].astype(str).to_numpy()[keep], context=contexts,
                         dose=np.nan, smiles=given.obs['smiles'].astype(str).to_numpy()[keep])
        said(held_out(effects, line[keep], [NoChange, Mean, DrugMean, LineDrug, FingerprintLine, Response, ResponsePlain], folds, **changes), 'drug_mean', line[keep], f'unseen line, {what}')


KINDS = 'pairs', 'perturbation', 'scaffold', 'context', 'both'


def asked(effects, kind, seed):
    "Rows: drug, and the mean L2 of the network and of its start over the conditions that one split asks for."
    split = make_split(effects, kind, seed)
    model = Response().fit(split.train(effects), val=split.val(effects), rng=generator(0, Response.name, split.name))
    test = split.test(effects)
    error = {name: np.linalg.norm(X - test.X, axis=1) for name, X in (('response', model.predict(test.obs)), ('fingerprint_line', model.started(test.obs)))}
    print(f"  {split.name}: {error['response'].mean() / error['fingerprint_line'].mean():.4f}", flush=True)
    return pd.DataFrame(error).groupby(test.obs['perturbation'].astype(str).to_numpy()).mean()


def seeds(effects, kinds, fresh):
    for kind in kinds:
        for what, some in (('seed 0', [0]), (f"seeds {', '.join(map(str, fresh))}", fresh)):
            mean = pd.concat([asked(effects, kind, seed) for seed in some]).groupby(level=0).mean()
            low, high = bootstrap_ratio(mean['response'].to_numpy(), mean['fingerprint_line'].to_numpy(), generator(0, 'seeds', kind, what))
            print(f"{kind}, {what}: response {mean['response'].mean() / mean['fingerprint_line'].mean():.3f} [{low:.3f}, {high:.3f}] of the error of fingerprint_line (n = {len(mean)})", flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('parts', nargs='*', default=['drugs', 'lines'], choices=['drugs', 'lines', 'seeds'])
    parser.add_argument('--folder', type=Path, default=FOLDER)
    parser.add_argument('--folds', type=int, default=5)
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--effects', type=Path, default=project_root()/'data/processed/sim_drugs/effects.h5ad')
    parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    parser.add_argument('--kinds', nargs='+', default=KINDS, choices=KINDS)
    given = parser.parse_args()
    for part in given.parts:
        if part == 'seeds': seeds(ad.read_h5ad(given.effects), given.kinds, given.seeds)
        else: globals()[part](given.folder, given.folds, epochs=given.epochs)
