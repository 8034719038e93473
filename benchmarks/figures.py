"""The main job on the embedded screens, environment in place: seconds and peak memory of all its processes together; again with nothing
changed; again after an edit of one library module. Works on a copy of the tree. Limits on 2 cores: 5 min and 4 GB; 5 s; only its dependants.
`--profile small` for a quick look."""
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def measured(root, *arguments):
    "Run the launcher of `root`; seconds, peak resident GB of the process tree, and its lines."
    env = {k: v for k, v in os.environ.items() if k != "PERTURB_OUT"} | {"PYTHONPATH": str(root), "PERTURB_OUT": str(root)}
    start, peak = time.perf_counter(), 0
    run = subprocess.Popen([sys.executable, "-m", "perturb_research.launch", "figures", *arguments], cwd=root, env=env, stdout=subprocess.PIPE, text=True)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(run.stdout))
    reader.start()
    while run.poll() is None:
        total = 0
        for process in (top := psutil.Process(run.pid), *top.children(recursive=True)):
            try: total += process.memory_info().rss
            except psutil.NoSuchProcess: pass
        peak = max(peak, total)
        time.sleep(.2)
    reader.join()
    assert run.returncode == 0, "".join(lines)
    return time.perf_counter() - start, peak / 1e9, [line.strip() for line in lines]


def edit(notebook):
    "Add a line to the last exported function of a notebook: the module changes, what it does does not."
    content = json.loads(notebook.read_text())
    cell = [c for c in content["cells"] if c["cell_type"] == "code" and "".join(c["source"]).startswith("#| export\n") and "def " in "".join(c["source"])][-1]
    cell["source"] = ["".join(cell["source"]) + "\n# edited"]
    notebook.write_text(json.dumps(content))


with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "copy"
    subprocess.run(["git", "clone", "-q", ROOT, copy], check=True)
    seconds, memory, _ = measured(copy, *sys.argv[1:])
    print(f"make figures, {os.cpu_count()} cores: {seconds:.0f} s, peak {memory:.2f} GB over all processes", flush=True)
    seconds, _, lines = measured(copy, *sys.argv[1:])
    print(f"nothing changed: {seconds:.1f} s, {sum('  ' in line for line in lines)} steps ran", flush=True)
    edit(copy / "nbs/14_evaluate.retrieval.ipynb")
    seconds, _, lines = measured(copy, *sys.argv[1:])
    print(f"evaluate/retrieval.py edited: {seconds:.0f} s; ran: {', '.join(line for line in lines if '  ' in line)}")
