"""All steps of one screen, one after another, each in a fork of this process: what `make figures` does in kernels of their own, with the libraries loaded once and the examples on made-up data left out.
`python tests/chain.py dataset source models [last step]`, below `PERTURB_OUT`."""
import multiprocessing
import os
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import scanpy  # noqa: F401
import torch  # noqa: F401
from conftest import run_here

from perturb_research.launch import chosen, publish, steps

if __name__ == "__main__":
    out, (dataset, source, models, *last) = Path(os.environ["PERTURB_OUT"]), sys.argv[1:]
    os.environ["PERTURB_LAUNCHED"] = "1"  # figures lie with the steps that made them
    for step in steps(dataset, chosen(models)):
        work = multiprocessing.get_context("fork").Process(target=run_here, args=(step, out, False), kwargs=dict(dataset=dataset, source=source, profile="small"))
        work.start()
        work.join()
        if work.exitcode: sys.exit(f"{dataset}: {step} failed")
        if step in last: break
    publish(out, dataset)
