"""Coverage of split-conformal sets on held-out perturbations, pooled over 20 splits: inside the beta-binomial interval of a valid method?

    python benchmarks/conformal_coverage.py [EFFECTS.h5ad ...]     default: data/processed/sim and sim_drugs, simulated into a temporary folder where missing

Each seed draws a split anew, fits one model on its training rows and calibrates on perturbations that were not trained on. The unit is the
perturbation. Calibrations: `val`, the split's validation part; `drawn`, 9, 19, 29 ... of all held-out perturbations at random (so many that
(n + 1) * level is whole and the promise is met exactly), the rest is covered. In-distribution splits: `doubles`, and `perturbation` on a screen
without combinations; given the training rows, which of the held-out perturbations calibrate is drawn uniformly, so scores are exchangeable.

The interval: for one split the number covered is beta-binomial(m; k, n + 1 - k), k = ceil((n + 1) level). Splits of one screen share its
perturbations, but are drawn independently, and given the screen the law holds for each draw; so the pooled number follows their convolution. It
is about this screen; another one is another sample. Scores of one model under two levels, or of two models, are not independent of one another.
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from perturb_research.core import generator, project_root
from perturb_research.data.labels import is_combo, parts_of
from perturb_research.data.splits import make_split
from perturb_research.evaluate.uncertainty import conformal_quantile, conformal_scores, coverage_band, density_ratio, not_exchangeable, per_unit, weighted_quantile
from perturb_research.models.baselines import MODELS

SEEDS, LEVELS = 20, (.8, .9)


def simulated(dataset, out):
    "Effects of an embedded screen, made by notebooks 01, 03 and 04 below `out`."
    nbs, env = project_root()/'nbs', os.environ | {'PERTURB_OUT': str(out)}
    for name in ('01_data.simulate', '03_data.chembl', '04_data.preprocess'):
        command = [sys.executable, '-m', 'papermill', str(nbs/f'{name}.ipynb'), str(Path(out)/f'{name}.ipynb'), '-k', 'python3', '--cwd', str(nbs), '--no-progress-bar', '-p', 'dataset', dataset]
        subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
    return ad.read_h5ad(Path(out)/'data'/'processed'/dataset/'effects.h5ad')


def held_out(effects, split, name):
    "Units, errors {score: (n, ...)} and features (n, 3) of the held-out perturbations, by part, under model `name` fitted on the training rows."
    train, val = split.train(effects), split.val(effects)
    model, spread = MODELS[name]().fit(train, val=val), np.asarray(train.X, float).std(0)
    alone, parts = {p[0] for p in parts_of(train.obs) if len(p) == 1}, {}
    for part, rows in (('val', val), ('test', split.test(effects))):
        if not rows.n_obs: continue
        predicted, who = model.predict(rows.obs), rows.obs['perturbation'].astype(str)
        errors = {score: per_unit(conformal_scores(predicted, rows.X, score, scale), who)[1]
                  for score, scale in (('ball', 1.), ('band', np.where(spread > 0, spread, spread.max())), ('gene', 1.))}
        known = pd.DataFrame([(len(p), sum(g not in alone for g in p)) for p in parts_of(rows.obs)], index=rows.obs_names).assign(size=np.log(np.maximum(np.linalg.norm(predicted, axis=1), 1e-9)))
        parts[part] = np.unique(who), errors, known.groupby(who).mean().to_numpy()
    return parts


def calibrations(parts, shifted, rng):
    "`(calibration, errors to calibrate on, errors to cover, weights or None)` for each way to calibrate; weights where the split is `shifted`."
    (_, val, of_val), (units, test, of_test) = parts['val'], parts['test']
    yield 'val', val, test, None
    if shifted: yield 'val, weighted', val, test, density_ratio(of_val, of_test)
    if set(parts['val'][0]) & set(units): return
    both, n = {score: np.concatenate([val[score], test[score]]) for score in val}, (len(of_val) + len(of_test)) // 10 * 10 - 11
    if n < 9: return
    order = rng.permutation(len(both['ball']))
    yield 'drawn', {s: e[order[:n]] for s, e in both.items()}, {s: e[order[n:]] for s, e in both.items()}, None


def measure(effects, kind, model):
    "Long table of a screen: a row for each seed, calibration, score and level."
    rows = []
    for seed in range(SEEDS):
        split = make_split(effects, kind, seed)
        if isinstance(split, str) or not split.ids['val']: return pd.DataFrame()
        parts = held_out(effects, split, model)
        reason = not_exchangeable(kind, *([split.strata[c] for c in split.ids[part]] for part in ('val', 'test')), shared=len(set(parts['val'][0]) & set(parts['test'][0])))
        for calibration, known, asked, weights in calibrations(parts, bool(reason), generator(seed, 'coverage', kind)):
            for score in known:
                for level in LEVELS:
                    if weights and score == 'gene': continue
                    q = weighted_quantile(known[score], *weights, level) if weights else conformal_quantile(known[score], level)
                    inside = asked[score] <= q
                    rows.append(dict(split=kind, calibration=calibration, valid=calibration == 'drawn' or not reason, model=model, score=score, level=level, seed=seed,
                                     n=len(known[score]), m=len(asked[score]), covered=inside.mean(-1).sum() if inside.ndim > 1 else inside.sum(), infinite=np.isinf(q).mean()))
    return pd.DataFrame(rows)


def table(rows):
    "A row for each split, calibration, score and level: pooled coverage and the interval of a valid method."
    lines = []
    for key, of in rows.groupby(['split', 'calibration', 'valid', 'model', 'score', 'level'], sort=False):
        low, high = coverage_band(list(zip(of['n'], of['m'])), key[-1])
        coverage = of['covered'].sum() / of['m'].sum()
        lines.append((*key, f"{of['n'].min()}-{of['n'].max()}", of['m'].sum(), of['infinite'].mean(), coverage, low, high, low <= coverage <= high))
    return pd.DataFrame(lines, columns=['split', 'calibration', 'promise', 'model', 'score', 'level', 'n', 'asked', 'infinite', 'coverage', 'low', 'high', 'inside'])


if __name__ == '__main__':
    files = [Path(f) for f in sys.argv[1:]] or [project_root()/'data'/'processed'/d/'effects.h5ad' for d in ('sim', 'sim_drugs')]
    for file in files:
        start = time.perf_counter()
        if file.exists(): effects = ad.read_h5ad(file)
        else:
            with tempfile.TemporaryDirectory() as out: effects = simulated(file.parent.name, out)
        for kind, model in (('doubles', 'kernel'), ('combination', 'kernel')) if is_combo(effects.obs).any() else (('perturbation', 'ridge'),):
            rows = measure(effects, kind, model)
            print(f"\n{file.parent.name}, {kind}: " + (f"{SEEDS} seeds" if len(rows) else "no split with a validation part"))
            if len(rows): print(table(rows).round(3).to_string(index=False))
        print(f"{time.perf_counter() - start:.0f} s")
