"""Held-out doubles whose singles were both trained on: error relative to the additive model.

    python benchmarks/doubles.py [FILE.h5ad ...]     default: the Norman and CaRPool effects beside the project, if they are there

Each repeat trains on all singles and a random half of the doubles. The ratio is the mean L2 distance of a model over that of the
additive model on the same held-out doubles, all genes; a condition is averaged over its repeats and the 95 % interval is a bootstrap
over conditions. Pearson correlations of effects, averaged likewise. Hyper-parameters are chosen inside the training half.
"""
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from perturb_research.core import generator
from perturb_research.data.labels import describe
from perturb_research.data.preprocess import read_effects
from perturb_research.data.read import read_screen
from perturb_research.models.baselines import MODELS

NAMES = 'mean', 'additive', 'scaled_additive', 'latent_shift', 'nearest', 'kernel'
DATA = Path(__file__).resolve().parents[2]/'shared'/'data'
DEFAULT = DATA/'norman'/'norman_effects.h5ad', DATA/'carpool'/'carpool_effects.h5ad'


def read(path):
    "Effects of the singles, and of the doubles with both singles, in a file with one row a condition."
    screen = read_screen(path)
    effects = read_effects(screen, *describe(screen))
    singles = {p for p in effects.obs['perturbation'] if '+' not in p}
    return effects[[p.count('+') < 2 and set(p.split('+')) <= singles for p in effects.obs['perturbation']]].copy()


def halves(effects, repeats=10, seed=0):
    "`(training rows, held-out doubles)` of each repeat, as boolean arrays."
    double = np.flatnonzero(effects.obs['perturbation'].str.contains('+', regex=False))
    for repeat in range(repeats):
        held = np.zeros(effects.n_obs, dtype=bool)
        held[generator(seed, 'doubles', repeat).permutation(double)[:len(double) - len(double) // 2]] = True
        yield ~held, held


def measure(effects, names=NAMES):
    "Long table: model, condition, error (L2), r (Pearson), seconds a fit and prediction."
    rows = []
    for train, held in halves(effects):
        truth = effects[held].X
        for name in names:
            start = time.perf_counter()
            predicted = MODELS[name]().fit(effects[train]).predict(effects.obs[held])
            seconds = time.perf_counter() - start
            error = np.linalg.norm(predicted - truth, axis=1)
            rows += [dict(model=name, condition=c, error=e, r=np.corrcoef(p, t)[0, 1], seconds=seconds)
                     for c, e, p, t in zip(effects.obs_names[held], error, predicted, truth)]
    return pd.DataFrame(rows)


def table(rows, draws=2000, seed=0):
    "A row a model: ratio to additive with its interval, mean Pearson, seconds."
    names = list(rows['model'].unique())
    error = rows.groupby(['condition', 'model'])['error'].mean().unstack()[names]
    drawn = generator(seed, 'bootstrap').integers(len(error), size=(draws, len(error)))
    means = error.to_numpy()[drawn].mean(1)
    low, high = np.quantile(means / means[:, [names.index('additive')]], [.025, .975], axis=0)
    r = rows.groupby(['condition', 'model'])['r'].mean().unstack()[names].mean()
    return pd.DataFrame({'L2 / additive': error.mean() / error['additive'].mean(), 'low': low, 'high': high, 'Pearson': r,
                         'seconds': rows.groupby('model')['seconds'].mean()[names]}).round(3)


if __name__ == '__main__':
    files = [Path(f) for f in sys.argv[1:]] or [f for f in DEFAULT if f.exists()]
    if not files: sys.exit(f"no effects files: give some, as in `python benchmarks/doubles.py FILE.h5ad` (looked for {DEFAULT[0]})")
    for path in files:
        effects = read(path)
        print(f"\n{path.name}: {effects.n_obs} conditions, {effects.n_vars} genes, 10 random halves of the doubles held out")
        print(table(measure(effects)).to_string())
