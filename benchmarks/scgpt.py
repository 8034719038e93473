"""scGPT-style model: time to a usable model on a synthetic screen of Norman's shape, its error on pairs of known genes, and what precision costs.

    python benchmarks/scgpt.py [full | small]      91,000 or 9,148 cells x 5,000 genes. Limits: LIMIT seconds, error at most that of the additive model

Every line is a model trained from scratch, pretraining included, in a process of its own: the default one in three precisions, and a larger one (d 128, 4 layers, both
decoders, 64 known and 256 read genes) for a fixed number of steps, where products of matrices are most of the work.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np

from perturb_research.core import generator, peak_memory_gb

LIMIT = 600  # seconds
LARGER = dict(d_model=128, d_hid=256, layers=4, readout='both', context=64, read=256, rows=32, pretrain=2, epochs=2, pretrain_lr=1e-3, lr=1e-3)
MODELS = {'default, 64-true': {}, 'default, 32-true': dict(precision='32-true'), 'default, bf16-mixed': dict(precision='bf16-mixed'),
          'larger, 32-true': LARGER | dict(precision='32-true'), 'larger, bf16-mixed': LARGER | dict(precision='bf16-mixed')}


def keep(name, folder):
    "Make the screen called `name`, and leave the training rows, their cells and the test rows of a split of its pairs in `folder`."
    from gears import norman_sized
    from perturb_research.data.splits import make_split
    cells, effects, *_ = norman_sized(name)
    split = make_split(effects, 'doubles', 0, n_genes=effects.n_vars)
    for part, data in dict(train=split.train(effects), test=split.test(effects), cells=split.train_cells(cells, effects)).items(): data.write_h5ad(Path(folder, f'{part}.h5ad'))
    return dict(cells=cells.n_obs, genes=cells.n_vars, conditions=effects.n_obs)


def measure(name, folder):
    "Seconds of the fit, of a step and of predicting the test rows, mean L2 relative to the additive model, and the peak memory."
    from perturb_research.models.baselines import Additive
    from perturb_research.models.scgpt import ScGPT
    train, test, cells = (ad.read_h5ad(Path(folder, f'{part}.h5ad')) for part in ('train', 'test', 'cells'))
    length = lambda model: np.linalg.norm(model.predict(test.obs) - test.X, axis=1).mean()
    start = time.perf_counter()
    model = ScGPT(**MODELS[name]).fit(train, cells=cells, rng=generator(0, 'scgpt'))
    fitted, asked = time.perf_counter() - start, time.perf_counter()
    error = length(model)
    steps = model.o.steps * (model.o.pretrain + model.hyperparameters['epochs_run'])
    return dict(seconds=fitted, step=fitted / steps, predict=time.perf_counter() - asked, error=float(error / length(Additive().fit(train))), gb=peak_memory_gb())


def apart(*arguments):
    "What a new process says, or None where it fails."
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode: print(f"{arguments}: failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}")
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else None


def main(size):
    with tempfile.TemporaryDirectory() as folder:
        shape = apart('keep', size, folder)
        print(f"{shape['cells']:,} cells x {shape['genes']:,} genes, {shape['conditions']} conditions")
        print(f"{'':22}{'fit, s':>9}{'a step, ms':>12}{'predict, s':>12}{'L2 / additive':>15}{'peak GB':>9}")
        for name in MODELS:
            if (r := apart('measure', name, folder)) is None: continue
            over = ' over the limit' if r['seconds'] > LIMIT or (name.startswith('default') and r['error'] > 1) else ''
            print(f"{name:22}{r['seconds']:9.1f}{1e3 * r['step']:12.1f}{r['predict']:12.2f}{r['error']:15.3f}{r['gb']:9.2f}{over}", flush=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['keep']: print(json.dumps(keep(*sys.argv[2:])))
    elif sys.argv[1:2] == ['measure']: print(json.dumps(measure(*sys.argv[2:])))
    else: main(sys.argv[1] if sys.argv[1:] else 'full')
