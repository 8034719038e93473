"""Evaluation from cells: seconds and peak memory on a synthetic screen of Norman's shape (91,000 cells x 5,000 genes, density .155, 236 perturbations) and a prediction of the same shape.

    python benchmarks/evaluation.py [PART ...]    every part, or those named, each in a process of its own. Limits: LIMITS below
    python benchmarks/evaluation.py peers         the same beside cell-eval on the same arrays, and ratios (about 10 minutes)

`SCREEN=20000,2000,40` makes another one: cells, genes, perturbations.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from perturb_research.core import generator, peak_memory_gb

LIMITS = {'whole effect panel, from cells': 2, 'Wilcoxon DE, fold changes and adjusted p, a side': 8}  # seconds
PEAK = 4    # GB, every part
RATIO = 15  # times faster than cell-eval
BULK = [f'cell_eval.{name}' for name in ('pearson_delta', 'mse', 'mae', 'mse_delta', 'mae_delta', 'pds_l1', 'pds_l2', 'pds_cosine')]


# ---------------------------------------------------------------- the screen

class Screen(NamedTuple):
    real: sp.csr_matrix       # (cells, genes) float32, log1p of counts scaled to 1e4
    predicted: sp.csr_matrix  # of the same shape and groups, drawn with other effects
    group: np.ndarray         # (cells,) index into conditions, -1 = control
    conditions: list
    targets: list
    genes: np.ndarray


def draw(cells, rates, effects, group, seed, side, step=1000):
    "Log-normalised CSR of Poisson counts: `rates` (g,) times exp(`effects` (n, g)) times a depth of each cell; in chunks, each with its own stream."
    def chunk(start):
        rng, of = generator(seed, side, start), group[start:start + step]
        fold = np.vstack([effects, np.ones_like(rates)])[of]  # -1: the last row
        counts = rng.poisson(rates * fold * rng.lognormal(0, .4, (len(of), 1))).astype(np.float32)
        return sp.csr_matrix(np.log1p(counts * (1e4 / counts.sum(1, keepdims=True).clip(min=1))))
    with ThreadPoolExecutor(2) as pool: return sp.vstack(list(pool.map(chunk, range(0, cells, step))), format='csr')


def make_screen(cells=91_000, genes=5_000, perturbations=236, density=.155, seed=0):
    "A `Screen` of that size: about 9 % controls, sizes of groups and abundances of genes spread as in real screens, half of the conditions pairs."
    rng = generator(seed, 'screen')
    share = rng.lognormal(0, .5, perturbations)
    group = np.repeat(np.arange(-1, perturbations), rng.multinomial(cells - 2 * perturbations - 2, np.r_[.088, .912 * share / share.sum()]) + 2)
    group = rng.permutation(np.r_[group][:cells])
    rates, low, high = rng.lognormal(0, 1.8, genes), -20., 20.
    for _ in range(60):  # the abundance at which the wanted share of counts is not zero
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-rates * np.exp(middle))).mean() < density else (low, middle)
    hit = rng.random((perturbations, genes)) < .05
    effects = (hit * rng.normal(0, .6, (perturbations, genes))).astype(np.float32)
    guess = (.6 * effects + (rng.random((perturbations, genes)) < .05) * rng.normal(0, .4, (perturbations, genes))).astype(np.float32)
    rates = (rates * np.exp(middle)).astype(np.float32)
    names = np.array([f'G{i:05d}' for i in range(genes)])
    targets = [tuple(sorted(rng.choice(names, 1 + i % 2, replace=False))) for i in range(perturbations)]
    sides = [draw(cells, rates, np.exp(e), group, seed, side) for side, e in (('real', effects), ('predicted', guess))]
    return Screen(*sides, group, [f'{"+".join(t)}:{i}' for i, t in enumerate(targets)], targets, names)


def keep(screen, folder):
    "Write `screen` into `folder`, for the processes that measure."
    for side in ('real', 'predicted'):
        for part in ('data', 'indices', 'indptr'): np.save(folder/f'{side}_{part}.npy', getattr(getattr(screen, side), part))
    np.save(folder/'group.npy', screen.group)
    (folder/'names.json').write_text(json.dumps([screen.conditions, screen.targets, screen.genes.tolist()]))


def load(folder):
    "The `Screen` in `folder`."
    folder = Path(folder)
    conditions, targets, genes = json.loads((folder/'names.json').read_text())
    group = np.load(folder/'group.npy')
    sides = [sp.csr_matrix(tuple(np.load(folder/f'{side}_{part}.npy') for part in ('data', 'indices', 'indptr')), shape=(len(group), len(genes))) for side in ('real', 'predicted')]
    for X in sides: X.has_sorted_indices = X.has_canonical_format = True
    return Screen(*sides, group, conditions, [tuple(t) for t in targets], np.array(genes))


def small():
    "A small screen, on which everything is compiled and imported before the clock starts."
    return make_screen(1200, 300, 8)


# ---------------------------------------------------------------- parts: what is measured of a screen, as {what: seconds}

def timed(work, repeats=3):
    "Median seconds of `work()`, and its last result; once only where it takes more than 10 s."
    seconds = []
    while len(seconds) < repeats and sum(seconds) < 10:
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def comparison(screen):
    from perturb_research.evaluate.panels import Cells, Comparison
    return Comparison.of_cells(Cells(screen.real, screen.group), Cells(screen.predicted, screen.group), screen.conditions, screen.targets, screen.genes)


def effects(screen):
    "From cells to everything that needs means alone."
    from perturb_research.evaluate.panels import FAMILIES, panel_scores
    names = [name for name, metric in FAMILIES.items() if metric.needs != 'cells']
    return {'whole effect panel, from cells': timed(lambda: panel_scores(comparison(screen), names))[0],
            'cell-eval bulk metrics, from cells': timed(lambda: panel_scores(comparison(screen), BULK))[0]}


def differential(screen):
    "DE of both sides, Welch's test, and the set metrics on the two tables."
    from perturb_research.evaluate import de
    given = dict(groups=screen.conditions, genes=screen.genes)
    seconds, tables = zip(*(timed(lambda X=X: de.differential_expression(X, screen.group, **given)) for X in (screen.real, screen.predicted)))
    welch, _ = timed(lambda: de.differential_expression(screen.real, screen.group, test='welch', fold_change='scanpy', **given))
    sets = (de.direction_match, de.spearman_n_significant, de.spearman_fold_change, de.significant_recall, de.pr_auc, de.roc_auc,
            de.direction_yield, de.direction_reach, de.significant_jaccard, de.fold_change_nmae, de.matthews, de.top_recall)
    def all_sets():
        for f in sets: f(*tables)
        for k in (None, 50, 100, 200, 500): de.overlap_at(*tables, k), de.precision_at(*tables, k)
    significant = [int(t.significant().sum()) for t in tables]
    return {'Wilcoxon DE, fold changes and adjusted p, a side': max(seconds), 'Wilcoxon DE, both sides': sum(seconds), "Welch's t, a side": welch,
            f'set metrics of two DE tables ({significant[0]:,} and {significant[1]:,} significant)': timed(all_sets)[0]}


def everything(screen):
    "All that cell-eval computes, from cells."
    from perturb_research.evaluate import cell_panels  # noqa: F401  registers what needs cells
    from perturb_research.evaluate.panels import panel_scores
    return {'everything that cell-eval computes': timed(lambda: panel_scores(comparison(screen), ['cell_eval']))[0]}


def cell_eval(screen):
    "cell-eval itself: bulk metrics, DE of both sides, and every metric, once each."
    import anndata as ad
    import pandas as pd
    from cell_eval import MetricsEvaluator
    label = pd.Categorical.from_codes(screen.group + 1, ['non-targeting', *screen.conditions])
    with tempfile.TemporaryDirectory() as out:
        def evaluator(**kwargs):
            real, predicted = (ad.AnnData(X, pd.DataFrame({'target': label}, index=np.arange(len(label)).astype(str)), pd.DataFrame(index=screen.genes)) for X in (screen.real, screen.predicted))
            return MetricsEvaluator(predicted, real, control_pert='non-targeting', pert_col='target', outdir=out, **kwargs)
        def bulk():
            done = evaluator(skip_de=True)
            return done.compute('anndata', skip_metrics=['pearson_edistance', 'clustering_agreement'], write_csv=False)
        bulk_seconds, _ = timed(bulk)
        de_seconds, with_de = timed(evaluator, 1)
        rest, _ = timed(lambda: with_de.compute('full', write_csv=False), 1)
    return {'cell-eval: bulk metrics, from cells': bulk_seconds, 'cell-eval: DE, both sides': de_seconds, 'cell-eval: everything': de_seconds + rest}


PARTS = {'effects': effects, 'differential': differential, 'everything': everything}
PEERS = {'cell_eval': cell_eval}
BESIDE = {'cell-eval bulk metrics, from cells': 'cell-eval: bulk metrics, from cells', 'Wilcoxon DE, both sides': 'cell-eval: DE, both sides',
          'everything that cell-eval computes': 'cell-eval: everything'}


# ---------------------------------------------------------------- parts: distances between clouds of cells

def distances(screen):
    "Components of the real cells, every effect's E-distance to control, and the whole panel of distances between predicted and real cells, on 50 components."
    from perturb_research.evaluate import distributions as d
    n, k, group, found = len(screen.conditions), min(50, screen.real.shape[1] - 1), screen.group, {}
    found['50 principal components of the real cells'], basis = timed(lambda: d.principal_components(screen.real, k), 1)
    found['project both sides'], (real, predicted) = timed(lambda: [d.project(X, basis) for X in (screen.real, screen.predicted)], 1)
    found['E-distance of every condition to control, 50 components'], _ = timed(lambda: d.energy_to_control(real, group, n))
    single = {f'  {name}': timed(lambda name=name: d.defined(name, predicted, group, real, group, n), 1)[0] for name in d.DEFINITIONS}
    return found | single | {'whole distributional panel': sum(found.values()) + sum(single.values())}


def energy(screen):
    "cell-eval's pearson_edistance: E-distances to control in genes, both sides, in the precision that their size asks for."
    from perturb_research.evaluate import distributions as d
    both = lambda: [d.energy_to_control(X, screen.group, len(screen.conditions)) for X in (screen.real, screen.predicted)]
    d.energy_to_control(screen.real[:200], screen.group[:200], len(screen.conditions), precision='float32')  # compiles the kernels of single precision
    return {'pearson_edistance in genes, both sides': timed(both, 1)[0]}


PARTS |= {'distances': distances, 'energy': energy}
LIMITS |= {'E-distance of every condition to control, 50 components': 3, 'whole distributional panel': 60}


# ---------------------------------------------------------------- each part in a process of its own

def measure(name, folder):
    "What one part says of the screen in `folder`, compiled on a small one first."
    part = (PARTS | PEERS)[name]
    part(small())
    result = part(load(folder))
    return dict(seconds=result, gb=peak_memory_gb())


def apart(*arguments):
    "`measure` in a new process (a child starts with its parent's peak memory; -P: no file beside this one stands for a package); None where it fails."
    done = subprocess.run([sys.executable, '-P', __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode: print(f"{arguments[1]}: failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}", flush=True)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else None


def main(names):
    "Make the screen, measure the parts called `names`, print seconds, peaks and limits; with cell-eval, ratios."
    shape = [int(word) for word in os.environ.get('SCREEN', '91000,5000,236').split(',')]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        apart('make', folder, *shape)
        print(f"{shape[0]:,} cells x {shape[1]:,} genes, {shape[2]} perturbations, two sides, made in {time.perf_counter() - start:.0f} s")
        print(f"{'':75} {'seconds':>9} {'limit':>6} {'peak GB':>8}")
        found = {}
        for name in names:
            result = apart('part', name, folder)
            for what, seconds in (result or dict(seconds={}))['seconds'].items():
                found[what] = seconds
                limit, gb = LIMITS.get(what), result['gb']
                over = ' over the limit' if (limit and seconds > limit) or (name in PARTS and gb > PEAK) else ''
                print(f"{what:75} {seconds:9.2f} {limit or '':>6} {gb:8.2f}{over}", flush=True)
        for ours, theirs in BESIDE.items():
            if ours in found and theirs in found:
                print(f"{theirs} / {ours}: {found[theirs] / found[ours]:.1f} times (asked: {RATIO})")


if __name__ == '__main__':
    if sys.argv[1:2] == ['make']: print(json.dumps(keep(make_screen(*map(int, sys.argv[3:])), Path(sys.argv[2]))))
    elif sys.argv[1:2] == ['part']: print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else: main([*PARTS, *PEERS] if sys.argv[1:] == ['peers'] else sys.argv[1:] or PARTS)
