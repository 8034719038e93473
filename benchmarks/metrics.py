"""Seconds for all metrics: `python benchmarks/metrics.py`. Limit: 100 conditions x 2,000 genes x 10 models in at most 2 s on 2 cores."""
import time

from perturb_research.core import generator, peak_memory_gb
from perturb_research.evaluate.metrics import METRICS, score


def seconds(models, conditions, genes, names=None, repeats=3):
    "Best of `repeats` timings, and the rows that came out."
    rng = generator(0, 'benchmark', 'metrics')
    truth = rng.normal(size=(conditions, genes)).astype('float32')
    predicted = truth + rng.normal(size=(models, conditions, genes)).astype('float32')
    given = dict(train_mean=truth.mean(axis=0), conditions=[f'c{i}' for i in range(conditions)], names=names)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        table = score(predicted, truth, **given)
        times.append(time.perf_counter() - start)
    return min(times), len(table)


if __name__ == '__main__':
    print('models conditions genes metrics  seconds     rows')
    for shape in ((10, 100, 2000), (1, 1000, 2000), (1, 6000, 2000)):
        best, rows = seconds(*shape, repeats=3 if shape[1] < 5000 else 1)
        print(f'{shape[0]:6} {shape[1]:10} {shape[2]:5} {len(METRICS):7} {best:8.2f} {rows:8}')
    for name in METRICS:
        print(f'{name:>24} {seconds(10, 100, 2000, [name])[0]:8.3f}')
    print(f'peak memory {peak_memory_gb():.2f} GB')
