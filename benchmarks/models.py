"""Every model against the training mean, the additive rule and the kernel regression, forward and reverse, on screens of one's choice.

    python benchmarks/models.py sim ../shared/data/norman/norman_mcfaline_cells.h5ad ../shared/data/papalexi/papalexi_lowmoi.h5ad

Runs the main job on each (PROFILE=default; results stay under --out, so that a second call only prints) and prints, by stratum, the mean L2 of each model
relative to that of the three baselines on the same held-out conditions, with 95 % intervals over perturbations, and the reverse task: the cause ranked
first and its mean reciprocal rank, among all candidates.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from perturb_research.evaluate.trials import STRATA, in_order, verdicts
from perturb_research.launch import slug

BASELINES = ("mean", "additive", "kernel")


def forward(results, splits):
    "Ratios of the mean L2 to each baseline's as text: a row a stratum and model."
    scores = pd.concat([pd.read_parquet(f) for s in splits for f in sorted((results / s["name"]).glob("*.metrics.parquet"))], ignore_index=True)
    table = verdicts(scores, in_order(scores["model"]), BASELINES)
    table["text"] = [f"{r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]{'*' if r.verdict == 'better' else ''}" for r in table.itertuples()]
    wide = table.assign(stratum=table["stratum"].map(STRATA)).pivot_table(index=["stratum", "model"], columns="baseline", values="text", aggfunc="first", sort=False)
    return wide.join(table.assign(stratum=table["stratum"].map(STRATA)).groupby(["stratum", "model"])["n"].max()).reindex(columns=[*BASELINES, "n"]).fillna("")


def reverse(results):
    "Share of queries with the cause first and the mean reciprocal rank, by split, model and mask."
    board = pd.read_csv(results / "leaderboard.csv")
    board = board[board["stratum"].str.startswith("reverse") & board["measure"].isin(["exact@1", "mrr"])]
    text = board.assign(text=[f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in board.itertuples()])
    return text.pivot_table(index=["split", "model"], columns=["stratum", "measure"], values="text", aggfunc="first", sort=False).fillna("")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="*", default=["sim"])
    parser.add_argument("--out", default="runs/benchmark_models")
    parser.add_argument("--models", default="")
    parser.add_argument("--set", default="")
    asked = parser.parse_args()
    pd.set_option("display.width", 250, "display.max_rows", 1000, "display.max_columns", 30)
    for screen in asked.screens:
        command = [sys.executable, "-m", "perturb_research.launch", "figures", "--dataset", screen, "--models", asked.models, "--set", asked.set]
        subprocess.run(command, check=True, env=os.environ | {"PERTURB_OUT": str(Path(asked.out).resolve())})
        name = screen if screen in ("sim", "sim_drugs") else slug(Path(screen).stem)
        results = Path(asked.out, "data", "results", name)
        print(f"\n# {name}: mean L2 relative to {', '.join(BASELINES)} (* better: the interval lies below 1)\n{forward(results, json.loads((results / 'splits.json').read_text()))}")
        print(f"\n# {name}: the cause ranked first, and its mean reciprocal rank\n{reverse(results)}")
