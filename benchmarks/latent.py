"""Latent models of cells: seconds an epoch and peak memory on a small Norman-shaped screen (9,148 cells x 5,000 genes, density .27), and their home task.

    python benchmarks/latent.py [scgen cpa]     each in a process of its own, single precision, every cell in every epoch. Limits: LIMITS below
    python benchmarks/latent.py kang [FILE]     stimulated blood cells, one cell type left out at a time: error beside the mean and the additive rule
"""
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from perturb_research.core import generator, peak_memory_gb
from perturb_research.models.baselines import Additive, Mean, NoChange
from perturb_research.models.cpa import CPA
from perturb_research.models.scgen import ScGen

LIMITS = {'cpa': 7, 'scgen': 6}  # seconds an epoch
MODELS = {'cpa': CPA, 'scgen': ScGen}
KANG = Path(__file__).resolve().parents[2]/'shared'/'data'/'kang'/'kang_pbmc_ifnb.h5ad'


def described(names, context='x', kind='CRISPRa'):
    "A table of conditions."
    obs = pd.DataFrame(dict(perturbation=names, perturbation_type=kind, context=context, dose=np.nan, time_h=np.nan))
    return obs.set_index(obs['perturbation'] + '|' + obs['context'])


def made_screen():
    "`(effects, cells)` of the small screen: 236 perturbations, half of them pairs."
    from evaluation import make_screen
    screen = make_screen(9_148, 5_000, 236, .27)
    names = [f'G{i:05d}' if i % 2 else f'G{i + 1:05d}+G{(i + 3) % 236:05d}' for i in range(236)]
    obs, var = described(names), pd.DataFrame(index=screen.genes)
    table = pd.DataFrame(dict(context='x', batch='0', is_control=screen.group < 0, condition=np.array([*obs.index, ''])[screen.group]))
    indicator = (screen.group[None] == np.arange(-1, len(obs))[:, None]).astype(np.float32)
    means = (indicator @ screen.real) / indicator.sum(1, keepdims=True)
    return ad.AnnData(means[1:] - means[0], obs, var), ad.AnnData(screen.real, table.set_index(table.index.astype(str)), var)


def epochs(name):
    "Seconds an epoch: what three epochs take beyond one, halved; the rest of the fit; and the peak memory, screen included."
    train, cells = made_screen()
    before, seconds = peak_memory_gb(), {}
    for n in (1, 3):
        start = time.perf_counter()
        model = MODELS[name](epochs=n, most=10**9, precision='32-true', patience=0).fit(train, cells=cells, rng=generator(0, name))
        seconds[n] = time.perf_counter() - start
    epoch = (seconds[3] - seconds[1]) / 2
    share = cells.X.nnz / np.prod(cells.shape)
    print(f'{name}: {epoch:.1f} s an epoch of {cells.n_obs:,} cells x {cells.n_vars:,} genes (density {share:.2f}; limit {LIMITS[name]} s), {seconds[1] - epoch:.1f} s before and after, '
          f"peak {peak_memory_gb():.1f} GB ({before:.1f} GB before training), {model.hyperparameters['parameters']:,} parameters")
    return epoch <= LIMITS[name]


def read_kang(path):
    "`(effects, cells)`: a condition a cell type."
    given = ad.read_h5ad(path)
    context, control = given.obs['cell_type'].astype(str), (given.obs['condition'] == 'control').to_numpy()
    obs = described(['IFNB1'] * context.nunique(), sorted(context.unique()), 'stimulus')
    table = pd.DataFrame(dict(context=context.to_numpy(), batch='0', is_control=control, condition=np.where(control, '', 'IFNB1|' + context)), index=given.obs_names)
    cells = ad.AnnData(given.X.astype(np.float32), table, pd.DataFrame(index=given.var_names))
    mean = lambda rows: np.asarray(cells.X[rows].mean(0)).ravel()
    X = [mean(((context == c) & ~control).to_numpy()) - mean(((context == c) & control).to_numpy()) for c in obs['context']]
    return ad.AnnData(np.array(X, dtype=np.float32), obs, cells.var), cells


def leave_one_out(effects, cells, held, genes=2_000, models=(ScGen, CPA)):
    "L2 of each model for context `held`, learnt from the others and all controls, on the genes that move most in the others."
    rest, truth = effects[effects.obs['context'] != held], effects[effects.obs['context'] == held]
    chosen = np.sort(np.argsort(-(rest.X**2).mean(0), kind='stable')[:genes])
    known = cells[cells.obs['is_control'] | (cells.obs['context'] != held), chosen].copy()
    rest, truth = rest[:, chosen].copy(), truth[:, chosen]
    fitted = [m().fit(rest, cells=known, rng=generator(0, m.name)) for m in (NoChange, Mean, Additive, *models)]
    return {m.name: float(np.linalg.norm(m.predict(truth.obs) - truth.X)) for m in fitted}


def kang(path=KANG):
    "Prints a table: error for each left-out cell type, and the mean."
    effects, cells = read_kang(path)
    table = pd.DataFrame({c: leave_one_out(effects, cells, c) for c in effects.obs['context']}).T
    table.insert(0, 'cells', cells.obs['context'].value_counts())
    print(table.round(2).to_string())
    print('mean L2 relative to additive:', (table.mean() / table['additive'].mean()).drop('cells').round(3).to_dict())


if __name__ == '__main__':
    asked = sys.argv[1:] or list(MODELS)
    if asked[0] == 'kang': kang(*asked[1:])
    elif len(asked) == 1: sys.exit(not epochs(asked[0]))
    else: sys.exit(max([subprocess.run([sys.executable, __file__, name]).returncode for name in asked]))
