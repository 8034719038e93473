"""Transport and latent additive models: seconds an epoch and peak memory on synthetic screens of Norman's shape.

    python benchmarks/transport.py                      9,148 cells x 5,000 genes, 236 perturbations (half of them pairs), each model in a process of its own
    SCREEN=91000,5000,236 python benchmarks/transport.py   another size: cells,genes,perturbations

Limits (LIMITS) are those of the other models of cells: seconds an epoch on the small screen, GB.
"""
import json
import os
import subprocess
import sys
import time

import numpy as np

LIMITS = {'flow_matching': (6., 1.5), 'latent_additive': (.5, 1.)}
EPOCHS = 5


def screen(cells, genes, perturbations):
    "`(cells, effects)` (AnnData): every second perturbation is a pair of the others; the counts are those of benchmarks/evaluation.py."
    import anndata as ad
    import pandas as pd

    from evaluation import make_screen
    from perturb_research.data.labels import condition_ids
    from perturb_research.models.transport import relative
    made = make_screen(cells, genes, perturbations)
    names = made.genes[:perturbations]
    label = np.array([names[i] if i % 2 == 0 else '+'.join(sorted((names[i - 1], names[(i + 1) % perturbations]))) for i in range(perturbations)])
    obs = pd.DataFrame(dict(perturbation=label, perturbation_type='CRISPRa', context='x', dose=np.nan, time_h=np.nan))
    obs.index = condition_ids(obs)
    table = obs.assign(condition=obs.index).reset_index(drop=True).reindex(made.group)
    control = made.group < 0
    table = table.assign(perturbation=np.where(control, 'control', table['perturbation']), context='x', batch='0', is_control=control, condition=np.where(control, '', table['condition']))
    known = ad.AnnData(made.real, table.set_index(np.arange(len(table)).astype(str)), pd.DataFrame(index=made.genes))
    count = np.bincount(made.group[~control], minlength=perturbations)
    member = np.zeros((perturbations, len(control)))
    member[made.group[~control], np.flatnonzero(~control)] = 1 / count[made.group[~control]]
    effects = (relative(known).T @ member.T).T
    return known, ad.AnnData(effects.astype(np.float32), obs.assign(n_cells=count), known.var)


def measure(name, *shape):
    "Seconds an epoch, of getting ready and of predicting everything, and the peak memory of the model called `name`."
    from perturb_research.core import generator, peak_memory_gb
    from perturb_research.models.latent_additive import LatentAdditive
    from perturb_research.models.transport import FlowMatching
    cells, effects = screen(*shape)
    made_gb = peak_memory_gb()
    model = {m.name: m for m in (FlowMatching, LatentAdditive)}[name]
    fit = lambda epochs: model(epochs=epochs).fit(effects, cells=cells if 'cells' in model.needs else None, rng=generator(0, 'benchmark'))
    seconds = []
    for epochs in (1, 1 + EPOCHS):  # the first also compiles and imports
        start = time.perf_counter()
        fitted = fit(epochs)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    fit(1)
    again = time.perf_counter() - start
    start = time.perf_counter()
    fitted.predict(effects.obs)
    return dict(epoch=max(0., seconds[1] - again) / EPOCHS, ready=again, predict=time.perf_counter() - start, gb=peak_memory_gb(), screen_gb=made_gb)


def main():
    shape = os.environ.get('SCREEN', '9148,5000,236').split(',')
    print(f"{int(shape[0]):,} cells x {int(shape[1]):,} genes, {shape[2]} perturbations")
    print(f"{'':18} {'s an epoch':>11} {'limit':>6} {'s to get ready, one epoch':>26} {'s to predict all':>17} {'peak GB':>8} {'limit':>6} {'screen alone, GB':>17}")
    for name, (limit, most) in LIMITS.items():
        done = subprocess.run([sys.executable, '-P', __file__, 'part', name, *shape], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': os.path.dirname(os.path.abspath(__file__))})
        if done.returncode:
            print(f"{name:18} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}")
            continue
        m = json.loads(done.stdout.splitlines()[-1])
        over = ' over the limit' if m['epoch'] > limit or m['gb'] > most else ''
        print(f"{name:18} {m['epoch']:11.2f} {limit:6} {m['ready']:26.1f} {m['predict']:17.2f} {m['gb']:8.2f} {most:6} {m['screen_gb']:17.2f}{over}", flush=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['part']: print(json.dumps(measure(sys.argv[2], *map(int, sys.argv[3:]))))
    else: main()
