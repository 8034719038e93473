# The order of work. Every notebook is one rule: it runs again when the notebook, a library module that it
# imports, an upstream result or a parameter changed. `perturb_research.launch` writes the request and calls this.
import json
import shlex
import sys
from pathlib import Path

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT))
from perturb_research.launch import ZOO, defaults, modules_of, steps

ALL = [(screen, step, before) for screen in config["screens"] for step, before in steps(screen["id"], config["models"]).items()]


def done(dataset, step):
    return f"data/results/{dataset}/done/{step}.json"


def parameters(screen, step):
    "What papermill passes: the data set, the profile and what SET says, as far as the notebook has them."
    given = {"dataset": screen["id"], "source": screen["source"], "profile": config["profile"]}
    known = defaults(ROOT / "nbs" / f"{step}.ipynb")
    return {k: v for k, v in given.items() if k in known} | config["changes"].get(step, {})


def escaped(paths):
    "Paths as Snakemake takes them, braces being wildcards."
    return [p.replace("{", "{{").replace("}", "}}") for p in paths if p]


def label(screen, step):
    "The line that says that a step begins; a download says where to watch it."
    watch = f"  (watch it: tail -f {Path.cwd()}/runs/{screen['id']}/{step}.log)" if step == "02_data.download" else ""
    return f"{screen['id']:>12}  {step}{watch}"


rule all:
    input: [done(screen["id"], step) for screen, step, _ in ALL]


for screen, step, before in ALL:
    rule:
        name: f"{screen['id']}__{step.replace('.', '_')}"
        priority: 2 if step not in ZOO else int(screen is config["screens"][0])  # the baselines' figures first; then one screen is searched while the next one's models train
        input:
            notebook=str(ROOT / "nbs" / f"{step}.ipynb"),
            modules=modules_of(ROOT / "nbs" / f"{step}.ipynb", ROOT),
            before=[done(screen["id"], b) for b in before],
            manifest=[str(ROOT / "data" / "manifest.csv")] if step == "02_data.download" else [],
            source=escaped([parameters(screen, step).get("source", ""), *shlex.split(parameters(screen, step).get("predictions", ""))]),
        output:
            done=done(screen["id"], step),
            figures=directory(f"data/results/{screen['id']}/figures/{step}"),
        log:
            notebook=f"runs/{screen['id']}/{step}.ipynb",
            words=f"runs/{screen['id']}/{step}.log",
        params:
            python=sys.executable,
            given=json.dumps(parameters(screen, step), sort_keys=True),
            label=label(screen, step),
            watch="--log-output" if step == "02_data.download" else "",
            cwd=str(ROOT / "nbs"),
        shell:
            "echo {params.label:q}; mkdir -p {output.figures:q}; "
            "{params.python:q} -m papermill {input.notebook:q} {log.notebook:q} -k python3 --cwd {params.cwd:q} "
            "-y {params.given:q} --no-progress-bar {params.watch} > {log.words:q} 2>&1"
