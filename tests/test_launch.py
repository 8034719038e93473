"The launcher: what runs again when, kills, refusals, published figures."
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, cells, launch

from perturb_research.launch import STEPS, ZOO, Refused, _number, _refuse_early, chosen, claim, defaults, differences, figures, forget_incomplete, modules_of, overrides, public, publish, resolve, steps


def done_times(out, dataset):
    return {p.stem: p.stat().st_mtime_ns for p in (out / f"data/results/{dataset}/done").glob("*.json")}


def figure_bytes(out, dataset):
    return {p.name: p.read_bytes() for p in sorted((out / "figures" / dataset).iterdir())}


def test_every_figure_is_four_files_or_a_note(small):
    for dataset in ("sim", "sim_drugs"):
        names = {p.name for p in (small / "figures" / dataset).iterdir()}
        slugs = {n.split(".")[0] for n in names}
        assert {"screen_at_a_glance", "effect_map", "split_composition", "forward_error_by_stratum", "leaderboard", "metric_dynamic_range"} <= slugs
        for slug in slugs: assert {f"{slug}.{k}" for k in ("pdf", "png", "csv", "json")} <= names or f"{slug}.note.txt" in names, slug


def test_figure_records_hold_no_time_and_no_machine(small):
    for file in (small / "figures").rglob("*.json"):
        text = file.read_text()
        assert str(small) not in text and str(ROOT) not in text
        record = json.loads(text)
        assert record["caption"] and (record["inputs"] or record["notebook"] == "01_data.simulate") and record["parameters"]["dataset"] == file.parent.name


def test_report_holds_every_figure(small):
    for dataset in ("sim", "sim_drugs"):
        report = (small / "runs" / dataset / "report.html").read_text()
        for file in (small / "figures" / dataset).glob("*.png"): assert f'id="{file.stem}"' in report


def test_nothing_changed_nothing_runs(small):
    before = {d: done_times(small, d) for d in ("sim", "sim_drugs")}
    again = launch(small, "figures", "--profile", "small")
    assert again.returncode == 0 and {d: done_times(small, d) for d in before} == before


def planned(out):
    "The steps that Snakemake would take now for the launcher's last request, as `(data set, step)`."
    words = ["--snakefile", ROOT / "Snakefile", "--directory", out, "--configfile", out / "runs/.request.json", "--cores", "1", "--nolock", "--rerun-incomplete", "--dry-run", "--nocolor"]
    done = subprocess.run([sys.executable, "-m", "snakemake", *map(str, words)], cwd=ROOT, env=os.environ | {"PERTURB_OUT": str(out)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {tuple(rule.split("__")) for rule in re.findall(r"^ *rule (\w+__\w+):", done.stdout + done.stderr, re.M)}


@pytest.mark.slow
def test_what_is_lost_is_made_again_with_the_same_bytes(small, tmp_path):
    "Without its leaderboard, of `sim_drugs` the report alone; without its screen, the whole of `sim` is to be made."
    out = tmp_path / "out"
    shutil.copytree(small, out)
    before, times = ({d: what(out, d) for d in ("sim", "sim_drugs")} for what in (figure_bytes, done_times))
    (out / "data/results/sim_drugs/leaderboard.csv").unlink()
    shutil.rmtree(out / "figures")
    done = launch(out, "figures", "--profile", "small")
    assert done.returncode == 0, done.stderr[-3000:]
    after = {d: done_times(out, d) for d in before}
    assert {(d, s) for d in before for s in steps(d) if after[d][s] > times[d][s]} == {("sim_drugs", "15_report")}
    for dataset in before:
        made = figure_bytes(out, dataset)
        assert set(made) == set(before[dataset]) and not [n for n, b in before[dataset].items() if made[n] != b]
    assert planned(out) == set()
    (out / "data/raw/sim/screen.h5ad").unlink()
    forget_incomplete(out, "sim")
    assert planned(out) == {("sim", step.replace(".", "_")) for step in steps("sim")}


@pytest.mark.slow
def test_a_run_that_was_killed_and_one_that_was_not_make_the_same_bytes(small, tmp_path):
    "`small` was killed twice; here all of `sim` up to the comparison of models runs once more, in other processes. `test_predictions_and_parameters_join_the_figures` sees to the steps after it."
    last = "13a_drugs.search"
    done = subprocess.run([sys.executable, ROOT / "tests" / "chain.py", "sim", "", "", last], cwd=ROOT, env=os.environ | {"PERTURB_OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = ({p.stem: json.loads(p.read_text()) for p in (base / "data/results/sim/done").iterdir()} for base in (small, tmp_path))
    assert set(ours) == {s for s in steps("sim") if s <= last}
    assert not [s for s in ours if ours[s] != theirs[s]]  # with the hashes of all that went in and came out
    first, second = (figure_bytes(base, "sim") for base in (small, tmp_path))
    assert len(second) > 100 and not [n for n, b in second.items() if first[n] != b]


def test_a_second_call_is_refused_while_one_runs(tmp_path):
    from perturb_research.launch import lock
    handle = lock(tmp_path)
    second = launch(tmp_path, "figures")
    handle.close()
    assert second.returncode != 0 and "another run is at work" in second.stderr and len(second.stderr.strip().splitlines()) == 1


def test_a_module_reruns_only_what_imports_it():
    "By the same static walk that the Snakefile lists as inputs."
    needs = {step: {m.split("perturb_research/")[-1] for m in modules_of(ROOT / "nbs" / f"{step}.ipynb", ROOT)} for step in STEPS}
    assert {s for s in STEPS if "evaluate/retrieval.py" in needs[s]} == {"13a_drugs.search", "14_evaluate.retrieval", "14b_evaluate.causes", "15_report"}
    assert "models/baselines.py" not in needs["04_data.preprocess"] | needs["05_data.splits"]
    assert all("core.py" in needs[s] for s in STEPS)


@pytest.mark.parametrize("arguments, expected", [
    (["--dataset", "normann"], "no such screen; did you mean norman"),
    (["--dataset", "hallmark"], "is a table, not a screen; fetch it with"),
    (["--dataset", "/no/such/file.h5ad"], "no such file"),
    (["--set", "preprocess.min_cels=3"], "did you mean 'min_cells'"),
    (["--set", "preprocess.min_cells=many"], "expected int"),
    (["--set", "min_cells=3"], "not of the form"),
    (["--set", "retrievel.top_k=3"], "no notebook"),
    (["--profile", "tiny"], "expected small, default or full"),
    (["--models", "gaers"], "did you mean gears?"),
])
def test_a_bad_request_is_one_line_before_any_work(tmp_path, arguments, expected):
    done = launch(tmp_path / "out", "figures", *arguments)
    assert done.returncode != 0 and expected in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "data").exists()


def test_two_files_of_one_name_need_a_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        cells(n=90).write_h5ad(tmp_path / folder / "my_screen.h5ad")
    out = tmp_path / "out"
    first = launch(out, "figures", "--dataset", tmp_path / "a/my_screen.h5ad", "--set", "preprocess.min_cells=1000")
    second = launch(out, "figures", "--dataset", tmp_path / "b/my_screen.h5ad")
    assert "min_cells=1000" in first.stderr and "NAME=" in second.stderr


def test_a_file_and_a_public_screen_of_one_name_are_told_apart(tmp_path):
    file = tmp_path / "Kang.h5ad"
    file.touch()
    assert "choose another with NAME=" in launch(tmp_path / "out", "figures", "--dataset", file).stderr
    assert resolve(str(file), "mine", tmp_path) == ("mine", str(file)) and resolve("kang", "", tmp_path) == ("kang", "")
    claim("kang", str(file), tmp_path)  # from a time before the name stood in the manifest
    with pytest.raises(Refused, match="already stands for .*Kang.h5ad; .* NAME="): claim("kang", "", tmp_path)


@pytest.mark.parametrize("names, good", [(["matrix.mtx"], True), (["matrix.mtx.gz", "barcodes.tsv.gz"], True), (["data.npz", "meta.json"], True), (["data.npz"], False),
                                         (["a.parquet", "b.parquet"], True), (["notes.txt"], False)])
def test_a_folder_is_a_screen_by_what_it_holds(tmp_path, names, good):
    (tmp_path / "My Run").mkdir()
    for name in names: (tmp_path / "My Run" / name).touch()
    if good: assert resolve(f"{tmp_path}/My Run", "", tmp_path) == ("my_run", str(tmp_path / "My Run"))
    else:
        with pytest.raises(Refused, match="a folder without a screen"): resolve(f"{tmp_path}/My Run", "", tmp_path)


@pytest.mark.parametrize("suffix", [".h5ad", ".h5", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".parquet", ".gct", ".gctx", ".npz"])
def test_files_of_every_form_pass(tmp_path, suffix):
    (tmp_path / f"Run 1{suffix}").touch()
    assert resolve(f"{tmp_path}/Run 1{suffix}", "", tmp_path)[0] == "run_1"


def test_a_screen_is_simulated_or_downloaded_or_neither():
    first = {d: [s for s in steps(d) if s < "03"] for d in ("sim", "norman", "my_screen")}
    assert first == {"sim": ["01_data.simulate"], "norman": ["02_data.download"], "my_screen": []}
    assert {"norman", "papalexi", "tahoe_plate14"} <= set(public()) and not {"hallmark", "gene2go", "chembl_rest"} & set(public())


def test_some_models_only():
    assert set(ZOO) <= set(steps("sim")) and not set(ZOO) & set(steps("sim", chosen("baselines")))
    some = steps("sim", chosen("gears"))
    assert set(ZOO) & set(some) == {"09_models.gears"} and set(some["14_evaluate.retrieval"]) == {"08_models.baselines", "09_models.gears", "13b_evaluate.foreign"}


def test_a_download_whose_file_is_gone_runs_again(tmp_path):
    done, raw, file = tmp_path / "data/results/kang/done/02_data.download.json", tmp_path / "data/raw/kang/source.json", tmp_path / "elsewhere.h5ad"
    for path, text in ((done, {"outputs": {"data/raw/kang/source.json": ""}}), (raw, {"path": str(file)}), (file, "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(text))
    forget_incomplete(tmp_path, "kang")
    assert done.exists()
    file.unlink()
    forget_incomplete(tmp_path, "kang")
    assert not done.exists()


def test_golden_numbers(small):
    "The small profile's plotted numbers are the committed ones; `python tests/golden.py` writes them anew after a change that is meant."
    golden = ROOT / "tests" / "golden"
    names = {p.relative_to(golden) for p in golden.rglob("*.csv")}
    assert names == {p.relative_to(small / "figures") for p in (small / "figures").rglob("*.csv")}
    wrong = {str(n): differences(golden / n, small / "figures" / n)[:3] for n in sorted(names) if differences(golden / n, small / "figures" / n)}
    assert not wrong


def test_differences_sees_what_matters(tmp_path):
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    a.write_text("x,y\nm,1.0\n")
    for text, same in (("x,y\nm,1.00001\n", True), ("x,y\nm,1.001\n", False), ("x,y\nn,1.0\n", False), ("x,z\nm,1.0\n", False), ("x,y\nm,1.0\nm,1.0\n", False), ("x,y\nm,\n", False)):
        b.write_text(text)
        assert (differences(a, b) == []) == same, text
    assert _number("nan") is not None and steps("mine")


def test_what_is_said_about_columns_to_preprocess_goes_to_chembl_too():
    said = overrides("preprocess.perturbation=target preprocess.min_cells=5", ROOT)
    assert said == {"04_data.preprocess": {"perturbation": "target", "min_cells": 5}, "03_data.chembl": {"perturbation": "target"}}
    assert overrides("preprocess.kind=drug chembl.kind=stimulus", ROOT)["03_data.chembl"] == {"kind": "stimulus"}
    assert "03_data.chembl" not in overrides("preprocess.min_cells=5", ROOT)


@pytest.mark.parametrize("word, said", [
    ("causes.level=90", "causes: parameter 'level' is 90.0; expected a number from 0.01 to 0.999"), ("report.hidden=some", "report: parameter 'hidden' is 'some'; expected one of"),
    ("retrieval.top_k=0", "retrieval: parameter 'top_k' is 0; expected an integer from 1 to 1000")])
def test_a_value_out_of_range_is_refused_before_anything_runs(word, said):
    "A late notebook would say so after all others have run; a check with names of its own still does."
    with pytest.raises(Refused, match=re.escape(f"SET: {said}")): overrides(word, ROOT)


def test_every_default_is_taken_as_a_value():
    for step in STEPS:
        for name, value in defaults(ROOT / "nbs" / f"{step}.ipynb").items(): _refuse_early(ROOT / "nbs" / f"{step}.ipynb", name, value, step)


def executed_copy(out, dataset, step, **cell):
    "An executed notebook of one cell below `out`."
    file = out / "runs" / dataset / f"{step}.ipynb"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"cells": [cell]}))
    return file


def test_only_errors_of_this_call_are_said(tmp_path, monkeypatch):
    stopped = lambda words: dict(outputs=[dict(output_type="error", ename="Problem", evalue=words, traceback=[])])
    def work(root, out, *_):
        executed_copy(out, "mine", "04_data.preprocess", **stopped("kind is 'CRISPRx'"))
        return False
    executed_copy(tmp_path, "mine", "14_evaluate.retrieval", **stopped("distance is 'cosin'"))
    monkeypatch.setattr("perturb_research.launch._snakemake", work)
    assert figures(ROOT, tmp_path, [("mine", "")], "small", {}, 1) == ["mine, 04_data.preprocess: kind is 'CRISPRx'"]


def test_a_slug_has_its_figure_or_its_note(tmp_path):
    "Also while steps are still missing; a figure that this call does not make stays until all are done."
    made, shown, done = (tmp_path / name for name in ("data/results/mine/figures/13b_evaluate.foreign", "figures/mine", "data/results/mine/done/13b_evaluate.foreign.json"))
    for folder in (made, shown, done.parent): folder.mkdir(parents=True)
    done.touch()
    (shown / "other.png").touch()
    four = {f"foreign_error.{kind}" for kind in ("pdf", "png", "csv", "json")}
    for names in ({"foreign_error.note.txt"}, four, {"foreign_error.note.txt"}):
        for old in made.iterdir(): old.unlink()
        for name in names: (made / name).touch()
        publish(tmp_path, "mine", tidy=False)
        assert {p.name for p in shown.iterdir()} == {*names, "other.png"}


def test_executed_notebooks_show_their_own_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("perturb_research.launch._snakemake", lambda *_: True)
    executed = executed_copy(tmp_path, "mine", "12_drugs.candidate", source=["![a](../figures/sim/a.png)\n", "![](../figures/sim_drugs/b.png), ../figures/sim/c.png"], outputs=[])
    shown = []
    for _ in range(2):
        assert figures(ROOT, tmp_path, [("mine", "")], "small", {}, 1) == []
        shown.append((executed.read_bytes(), executed.stat().st_mtime_ns))
    assert json.loads(shown[0][0])["cells"][0]["source"] == ["![a](../../figures/mine/a.png)\n", "![](../../figures/mine/b.png), ../figures/sim/c.png"]
    assert shown[0] == shown[1]
