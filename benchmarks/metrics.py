"""Seconds for the metrics: `python benchmarks/metrics.py`. Limits, on 2 cores: 100 conditions x 2,000 genes x 10 models scored in 2 s; a panel of
200 conditions x 2,000 genes x 20 models with 1,000 bootstrap draws in 10 s."""
import time

from perturb_research.core import generator, peak_memory_gb
from perturb_research.evaluate.calibration import hierarchical_bootstrap
from perturb_research.evaluate.metrics import METRICS, score
from perturb_research.evaluate.panels import Comparison, families, panel_scores


def example(models, conditions, genes):
    "Predictions (models, conditions, genes) and the truth."
    rng = generator(0, 'benchmark', 'metrics')
    truth = rng.normal(size=(conditions, genes)).astype('float32')
    return truth + rng.normal(size=(models, conditions, genes)).astype('float32'), truth


def best_of(repeats, function):
    "Shortest of `repeats` timings, and what came out."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def seconds(models, conditions, genes, names=None, repeats=3):
    "Best of `repeats` timings of `score`, and its table."
    predicted, truth = example(models, conditions, genes)
    given = dict(train_mean=truth.mean(axis=0), conditions=[f'c{i}' for i in range(conditions)], names=names)
    return best_of(repeats, lambda: score(predicted, truth, **given))


def panel(models=20, conditions=200, genes=2000, draws=1000):
    "Seconds to score a panel and to put intervals on it; of the published families that need no cells, for one model."
    scoring, table = seconds(models, conditions, genes, repeats=2)
    drawing, intervals = best_of(2, lambda: hierarchical_bootstrap(table, generator(0, 'benchmark', 'bootstrap'), draws))
    assert len(intervals) == models * len(METRICS)
    (predicted,), truth = example(1, conditions, genes)
    names = [f'G{i}' for i in range(genes)]
    given = dict(conditions=names[:conditions], targets=[(name,) for name in names[:conditions]], genes=names, control=truth.mean(axis=0)**2)
    family, values = best_of(2, lambda: panel_scores(Comparison(real=truth + given['control'], predicted=predicted + given['control'], **given), list(of_effects)))
    assert values['metric'].nunique() == len(of_effects)
    return scoring, drawing, family


of_effects = {m.name: m for m in families() if m.needs in ('effects', 'means')}

if __name__ == '__main__':
    print('models conditions genes metrics  seconds     rows')
    for shape in ((10, 100, 2000), (1, 1000, 2000), (1, 6000, 2000)):
        best, table = seconds(*shape, repeats=3 if shape[1] < 5000 else 1)
        print(f'{shape[0]:6} {shape[1]:10} {shape[2]:5} {len(METRICS):7} {best:8.2f} {len(table):8}')
    scoring, drawing, family = panel()
    print(f'panel of 200 conditions x 2,000 genes x 20 models: {scoring:.2f} s to score, {drawing:.2f} s for 1,000 draws, {scoring + drawing:.2f} s together (limit 10 s)')
    print(f'{len(of_effects)} metrics of the published families on effects and means, one model: {family:.2f} s')
    for name in METRICS:
        print(f'{name:>24} {seconds(10, 100, 2000, [name])[0]:8.3f}')
    print(f'peak memory {peak_memory_gb():.2f} GB')
