"Drugs: names, structures, what each kind of source says, matching, and ChEMBL's REST interface against a real server on loopback."
import json
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SHARED, cells, needs_shared, run_here

from perturb_research.core import Problem
from perturb_research.data.chembl import (agreement, bare, chembl_session, drugs_in_screen, drugs_in_table, facts, fingerprints, normalise, pages, parent, read_rest, read_source,
                                          read_sqlite, read_table, resolve, with_structures)
from perturb_research.data.labels import describe

OSIMERTINIB = "C=CC(=O)Nc1cc(Nc2nccc(-c3cn(C)c4ccccc34)n2)c(OC)cc1N(C)CCN(C)C"
DEXAMETHASONE = "C[C@@H]1C[C@H]2[C@@H]3CCC4=CC(=O)C=C[C@]4(C)[C@@]3(F)[C@@H](O)C[C@]2(C)[C@@]1(O)C(=O)CO"
BETAMETHASONE = "C[C@H]1C[C@H]2[C@@H]3CCC4=CC(=O)C=C[C@]4(C)[C@@]3(F)[C@@H](O)C[C@]2(C)[C@@]1(O)C(=O)CO"
FLAT = "CC1CC2C3CCC4=CC(=O)C=CC4(C)C3(F)C(O)CC2(C)C1(O)C(=O)CO"


def asked(*names, **smiles):
    "Drugs as `with_structures` gives them."
    rows = [(n, "") for n in names] + [(n.replace("_", " "), s) for n, s in smiles.items()]
    return with_structures(pd.DataFrame(rows, columns=["name", "smiles"]))[0]


def table(*rows, columns=("name", "targets", "smiles", "synonyms"), source="mine"):
    return facts(pd.DataFrame([[*r, *[""] * (len(columns) - len(r))] for r in rows], columns=columns), source)


def targets(drugs, *given):
    found, _ = resolve(drugs, list(given))
    return found.set_index("drug")


# names

@pytest.mark.parametrize("name, short", [
    ("Crizotinib (hydrochloride)", "Crizotinib"), ("Elagolix sodium", "Elagolix"), ("ralimetinib dimesylate", "ralimetinib"), ("Niclosamide (olamine)", "Niclosamide"),
    ("L-Thyroxine (sodium salt pentahydrate)", "L-Thyroxine"), ("LY-2584702 (tosylate salt)", "LY-2584702"), ("S-Adenosyl-L-methionine (disulfate tosylate)", "S-Adenosyl-L-methionine"),
    ("Trametinib (DMSO_TF solvate)", "Trametinib"), ("Lapatinib ditosylate  ", "Lapatinib"), ("x-hydrochloride", "x"), ("curcumin #2", "curcumin"), ("imatinib free base", "imatinib"),
    ("Quinidine (15% dihydroquinidine)", "Quinidine (15% dihydroquinidine)"), ("Perindopril (erbumine)", "Perindopril"), ("(R)-Verapamil (hydrochloride)", "(R)-Verapamil"),
    ("L-arginine hydrochloride", "L-arginine"), ("ibuprofen [sodium]", "ibuprofen")])
def test_salts_and_solvates_leave_a_name(name, short):
    assert bare(name) == short


@pytest.mark.parametrize("name", ["Sodium Salicylate", "lithium chloride", "potassium iodide", "Dimethyl fumarate", "Lactate (calcium)", "Fumaric acid", "salt", "zinc chloride", "magnesium citrate",
                                  "Abiraterone acetate", "Methylprednisolone succinate", "estrone sulfate", "ammonium chloride", "(hydrochloride)", "calcium", "()", "a)", "vinyl chloride"])
def test_what_would_leave_nothing_or_another_drug_stays(name):
    assert bare(name) == name


def test_an_ester_is_a_salt_where_the_structure_shows_it():
    salt, ester = asked(Larotrectinib_sulfate="OC1CCN(C1)C(=O)Nc1cnn2ccc(nc12)N1CCCC1c1cc(F)ccc1F.OS(=O)(=O)O", Estrone_sulfate="CC12CCC3C(C1CCC2=O)CCC4=C3C=CC(=C4)OS(=O)(=O)[O-].[K+]").itertuples()
    assert bare(salt.drug, salt.acids) == "Larotrectinib" and bare(ester.drug, ester.acids) == "Estrone sulfate"


@pytest.mark.parametrize("one, other", [("18β-Glycyrrhetinic acid", "18beta-glycyrrhetinic acid"), ("NVP-BHG712", "nvp bhg712"), ("(±)-Verapamil", "verapamil"), ("dl-sotalol", "rac-Sotalol"),
                                        ("(R)-(-)-rolipram", "R(-)-Rolipram"), ("(+)-JQ1", "(+)-jq1 "), ("Riluzole hydrochloride", "riluzole"), ("betamethasone-dipropionate", "Betamethasone dipropionate"),
                                        ("(2R,3S)-x−ol", "(2R, 3S)-x-ol"), ("5‐FU", "5-FU"), ("(R,S)-x", "x"), ("(+/-)-x", "(RS)-x")])
def test_equal_names(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize("one, other", [("(S)-Crizotinib", "crizotinib"), ("(R)-rolipram", "(S)-rolipram"), ("(+)-JQ1", "(-)-JQ1"), ("sodium salicylate", "salicylic acid"), ("estrone sulfate", "estrone"),
                                        ("lithium chloride", "lithium carbonate"), ("α-tocopherol", "γ-tocopherol"), ("abiraterone acetate", "abiraterone")])
def test_different_names(one, other):
    assert normalise(one) != normalise(other)


def test_no_name_becomes_empty():
    names = ["", "()", "-", "阿司匹林", "(+)", "α", "hydrochloride", "(R)-"]
    assert all(normalise(n) for n in names[1:]) and len({normalise(n) for n in names}) == len(names)
    assert normalise("(S)-Crizotinib (hydrochloride)", stereo=False) == "crizotinib"
    for code in ("D-4476", "S-14506", "E-4031", "L-NAME"): assert "(" not in normalise(code)


# structures

@pytest.mark.parametrize("given, kept", [
    ("CC(=O)Oc1ccccc1C(=O)[O-].[Na+]", "CC(=O)Oc1ccccc1C(=O)O"), ("[Na]OC(=O)c1ccccc1O", "O=C(O)c1ccccc1O"), ("C[NH2+]C.[Cl-].O", "CNC"), (OSIMERTINIB + ".CS(=O)(=O)O", OSIMERTINIB),
    ("CN(C)Cc1ccccc1.OC(=O)c1cc2ccccc2c(Cc2c(O)c(cc3ccccc23)C(=O)O)c1O", "CN(C)Cc1ccccc1"),  # pamoic acid is the larger one
    ("[Li+].[Cl-]", "[Li+].[Cl-]"), ("[Li+].[Li+].[O-]C(=O)[O-]", "[Li+].[Li+].O=C(O)O"), ("NC(CCCNC(N)=N)C(=O)O.Cl", "NC(CCCNC(N)=N)C(=O)O"), ("OC(=O)C=CC(=O)O", "OC(=O)C=CC(=O)O"),
    ("C1CCC(C(C1)[NH-])[NH-].C(=O)(C(=O)[O-])[O-].[Pt+4]", "C1CCC(C(C1)[NH-])[NH-].C(=O)(C(=O)[O-])[O-].[Pt+4]"),  # oxaliplatin is not its ligand
    ("CCCCC(=O)N(Cc1ccc(cc1)-c1ccccc1)C(C(C)C)C(=O)O.CCOC(=O)C(C)CC(Cc1ccc(cc1)-c1ccccc1)NC(=O)CCC(=O)O", None)])  # a mixture of two drugs
def test_parents(given, kept):
    assert parent(given)["inchikey"] == parent(kept or given)["inchikey"]
    assert parent(kept or given)["smiles"].count(".") == (kept or given).count(".")


def test_bad_structures_are_listed():
    drugs, unreadable, several = with_structures(pd.DataFrame({"name": ["a", "b", "c", "c", "d"], "smiles": ["C(", "", "CC", "CCO", "[Xx]"]}))
    assert (unreadable, several) == (["a", "d"], ["c"]) and drugs["drug"].tolist() == list("abcd") and (drugs["smiles"] == "").all()  # c has two structures: none is taken
    assert (parent("x"), parent("")) == (None, None)


def test_reading_structures_is_quiet(capfd):
    parent("C1CC(")
    parent("CC(C)(C)(C)C")
    fingerprints(["C1CC("])
    assert capfd.readouterr() == ("", "")


def test_keys_scaffolds_and_fingerprints():
    dexa, flat = parent(DEXAMETHASONE), parent(FLAT)
    assert (dexa["open"], flat["open"]) == (False, True) and dexa["inchikey"][:14] == flat["inchikey"][:14] == parent(BETAMETHASONE)["inchikey"][:14]
    assert dexa["inchikey"] == "UREBDLICKHMUKA-CXSFZGCWSA-N" and dexa["scaffold"] == flat["scaffold"]
    assert parent("CCO")["scaffold"] == ""
    bits = fingerprints([OSIMERTINIB, OSIMERTINIB + " ", "bad"])
    assert bits.shape == (3, 2048) and bits.dtype == np.uint8 and bits[2].sum() == 0 and (bits[0] == bits[1]).all() and bits[0].sum() > 20


# tables

def test_columns_of_tables_are_found(tmp_path):
    (tmp_path / "hub.txt").write_text("!a comment\n!another\npert_iname\tclinical_phase\tmoa\ttarget\nosimertinib\tLaunched\tEGFR inhibitor\tEGFR|ERBB2\nx!y\tPhase 1\ta agonist|b antagonist\tDRD1|DRD2\nz\tPhase 1\t\t\n")
    rows = read_source(str(tmp_path / "hub.txt"), None)
    assert rows[["source", "name", "gene", "action"]].values.tolist() == [["hub", "osimertinib", "EGFR", "INHIBITOR"], ["hub", "osimertinib", "ERBB2", "INHIBITOR"], ["hub", "x!y", "DRD1", ""],
                                                                         ["hub", "x!y", "DRD2", ""], ["hub", "z", "", ""]]
    pd.DataFrame({"drug": ["Adagrasib  "], "targets": ["KRAS, HRAS"], "moa-fine": ["RAS inhibitor"], "canonical_smiles": [OSIMERTINIB], "pubchem_cid": [1.0]}).to_parquet(tmp_path / "t.parquet")
    assert read_source(str(tmp_path / "t.parquet"), None)[["name", "gene", "action", "smiles"]].values.tolist() == [["Adagrasib", g, "INHIBITOR", OSIMERTINIB] for g in ("KRAS", "HRAS")]


def test_targets_of_other_organisms_are_no_genes():
    rows = facts(pd.DataFrame({"pert_iname": ["a", "a", "a"], "gene_symbol": ["EGFR", "rpsA", ""], "organism": ["Homo sapiens", "Bacteria", "Homo sapiens"], "mechanism_of_action": ["EGFR inhibitor", "ribosome inhibitor", "DNA inhibitor"]}), "x")
    assert rows["gene"].tolist() == ["EGFR", "", ""] and rows["mechanism"].str.contains("ribosome").any()


@pytest.mark.parametrize("name, content, said", [
    ("a.csv", b"x,y\n1,2\n", "expected a column of names"), ("a.csv", b"name,y\n1,2\n", "one of targets"), ("a.parquet", b"no", "cannot be read as a table"), ("a.csv", b"", "cannot be read as a table"),
    ("a.xlsx", b"", "is no table"), ("a.csv.gz", b"plain", "cannot be read as a table"), ("a.tsv", b'name\ttarget\n"a\tb\nc\td\te\tf\n', "cannot be read as a table"), ("a.db", b"no", "ChEMBL SQLite dump")])
def test_bad_tables_are_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Problem, match=said) as e: read_source(str(tmp_path / name), asked("a"))
    assert "\n" not in str(e.value) and name in str(e.value) or "a:" in str(e.value)


def test_a_missing_table_is_one_line(tmp_path):
    with pytest.raises(Problem, match="no such file"): read_source(str(tmp_path / "gone.csv"), asked("a"))
    with pytest.raises(Problem, match="name_column='which'"): drugs_in_table(ROOT / "data/reference/drugs.csv", "which")


def test_latin_1_text(tmp_path):
    (tmp_path / "a.tsv").write_bytes("name\ttarget\nβ-x".encode("utf-8").replace("β".encode(), b"\xb5") + b"\tEGFR\n")
    assert read_table(tmp_path / "a.tsv")["name"].tolist() == ["µ-x"]


def test_the_drugs_of_a_screen_keep_their_labels():
    screen = cells(n=6, column="drug", targets=("DMSO_TF", "X (hydrochloride)", "Y+Z"), canonical_smiles=["", "CCN.Cl", ""] * 2, targets_=[""] * 6)
    rows = drugs_in_screen(screen, describe(screen)[0])
    assert rows[["name", "smiles", "gene"]].values.tolist() == [["X (hydrochloride)", "CCN.Cl", ""], ["Y+Z", "", ""]]
    genes = cells()
    assert drugs_in_screen(genes, describe(genes)[0]).empty


# matching

def test_levels_of_matching():
    drugs = asked("abc (hydrochloride)", "RAPA", "(R)-foo", "unknown", AZD9291=OSIMERTINIB + ".CS(=O)(=O)O", flatone=FLAT)
    found = targets(drugs, table(("osimertinib", "EGFR", OSIMERTINIB), ("ABC", "A1"), ("sirolimus", "MTOR", "", "rapamycin|rapa"), ("foo", "F1"), ("dexamethasone", "NR3C1", DEXAMETHASONE)))
    assert found["targets"].to_dict() == {"abc (hydrochloride)": "A1", "RAPA": "MTOR", "(R)-foo": "F1", "unknown": "", "AZD9291": "EGFR", "flatone": "NR3C1"}
    assert found["matched_by"].str.removeprefix("mine: ").tolist() == ["name", "synonym", "stereo-free name", "", "inchikey", "skeleton"]


def test_structure_comes_before_the_name():
    found = targets(asked(mine=OSIMERTINIB), table(("mine", "WRONG", "CCO"), ("other", "EGFR", OSIMERTINIB)))
    assert found.loc["mine", "targets"] == "EGFR" and found.loc["mine", "matched_by"] == "mine: inchikey"
    assert "mine: mine (LFQSCWFLJHTTHZ-UHFFFAOYSA-N)" in found.loc["mine", "ambiguous_with"]


def test_a_name_with_another_structure_is_listed_not_taken():
    found = targets(asked(x=OSIMERTINIB), table(("x", "EGFR", "CCO")))
    assert found.loc["x", "targets"] == "" and found.loc["x", "ambiguous_with"] == "mine: x (LFQSCWFLJHTTHZ-UHFFFAOYSA-N)"


def test_several_molecules_of_one_name_are_listed_not_guessed():
    given = facts(pd.DataFrame({"name": ["x", "x", "y"], "parent_chembl_id": ["CHEMBL1", "CHEMBL2", "CHEMBL3"], "target": ["A", "B", "C"]}), "mine")
    found = targets(asked("x", "y"), given)
    assert found["targets"].tolist() == ["", "C"] and found.loc["x", "ambiguous_with"] == "mine: x (CHEMBL1); mine: x (CHEMBL2)" and found.loc["x", "chembl_id"] == ""


def test_open_stereocentres_do_not_tell_isomers_apart():
    both = table(("dexamethasone", "D", DEXAMETHASONE), ("betamethasone", "B", BETAMETHASONE))
    found = targets(asked(Dexamethasone=FLAT, code=FLAT), both)
    assert found.loc["Dexamethasone", "targets"] == "D" and found.loc["code", "targets"] == "" and found.loc["code", "ambiguous_with"].count("mine:") == 2
    one = targets(asked(Epirubicin=FLAT, Doxorubicin=FLAT), table(("doxorubicin", "TOP2A", FLAT)))
    assert one["targets"].to_dict() == {"Epirubicin": "", "Doxorubicin": "TOP2A"}
    assert targets(asked(x=DEXAMETHASONE), table(("betamethasone", "B", BETAMETHASONE)))["targets"].tolist() == [""]


def test_enantiomers_beside_their_racemate_keep_their_own():
    given = table(("crizotinib", "ALK"), ("(S)-crizotinib", "NUDT1"))
    assert targets(asked("crizotinib", "(S)-Crizotinib", "(R)-crizotinib"), given)["targets"].tolist() == ["ALK", "NUDT1", ""]
    assert targets(asked("(S)-crizotinib", "Crizotinib (hydrochloride)"), table(("crizotinib", "ALK")))["targets"].tolist() == ["", "ALK"]


def test_an_ester_is_no_salt_and_is_said():
    found = targets(asked("Chloroquine phosphate"), table(("chloroquine", "TLR9")))
    assert found["targets"].tolist() == [""] and found["ambiguous_with"].tolist() == ["mine: chloroquine"]


def test_salts_of_one_parent_are_one_molecule():
    found = targets(asked("Bestatin (hydrochloride)", "Bestatin"), table(("Bestatin", "ANPEP", "CC(C)CC(C(=O)O)NC(=O)C(C(Cc1ccccc1)N)O"), ("Bestatin (hydrochloride)", "", "CC(C)CC(C(=O)O)NC(=O)C(C(Cc1ccccc1)N)O.Cl")))
    assert found["targets"].tolist() == ["ANPEP", "ANPEP"]


def test_names_of_one_source_help_in_another():
    chembl = table(("OSIMERTINIB", "", OSIMERTINIB), source="structures")
    hub = table(("osimertinib", "EGFR"), source="hub")
    found, edges = resolve(asked(AZD9291=OSIMERTINIB), [chembl, hub])
    assert found["matched_by"].tolist() == ["structures: inchikey; hub: synonym"] and edges[["gene", "source", "matched_by"]].values.tolist() == [["EGFR", "hub", "synonym"]]


def test_sources_that_mean_different_molecules_are_said():
    a, b = (facts(pd.DataFrame({"name": ["x"], "chembl_id": [i], "target": ["A"]}), s) for s, i in (("one", "CHEMBL1"), ("two", "CHEMBL2")))
    found = targets(asked("x"), a, b)
    assert found.loc["x", "chembl_id"] == "CHEMBL1" and found.loc["x", "ambiguous_with"] == "two: CHEMBL2"


def test_result_does_not_depend_on_the_order_of_rows():
    rows = [("osimertinib", "EGFR", OSIMERTINIB), ("ABC", "A1"), ("ABC", "A0"), ("sirolimus", "MTOR", "", "rapa")]
    drugs = asked("abc", "rapa", z=OSIMERTINIB)
    pd.testing.assert_frame_equal(resolve(drugs, [table(*rows)])[0], resolve(drugs, [table(*rows[::-1])])[0])


def test_nothing_to_say():
    found, edges = resolve(asked("x"), [table(("y", "A"))])
    assert found["targets"].tolist() == [""] and list(edges.columns) == ["drug", "gene", "action", "mechanism", "target_type", "source", "matched_by"] and edges.empty
    assert np.isnan(agreement(edges, ["a", "b"])["jaccard"]).all()


# a ChEMBL dump

@pytest.fixture
def dump(tmp_path):
    "A small file of ChEMBL's schema: osimertinib with a salt that carries the mechanism, a family, a bacterial target, a namesake."
    path = tmp_path / "chembl_99.db"
    db = sqlite3.connect(path)
    db.executescript("""
        CREATE TABLE molecule_dictionary (molregno INTEGER PRIMARY KEY, pref_name TEXT, chembl_id TEXT, max_phase NUMERIC);
        CREATE TABLE molecule_hierarchy (molregno INTEGER PRIMARY KEY, parent_molregno INTEGER, active_molregno INTEGER);
        CREATE TABLE molecule_synonyms (molregno INTEGER, syn_type TEXT, molsyn_id INTEGER PRIMARY KEY, res_stem_id INTEGER, synonyms TEXT);
        CREATE TABLE compound_structures (molregno INTEGER PRIMARY KEY, molfile TEXT, standard_inchi TEXT, standard_inchi_key TEXT UNIQUE, canonical_smiles TEXT);
        CREATE TABLE drug_mechanism (mec_id INTEGER PRIMARY KEY, record_id INTEGER, molregno INTEGER, mechanism_of_action TEXT, tid INTEGER, action_type TEXT, direct_interaction INTEGER);
        CREATE TABLE target_dictionary (tid INTEGER PRIMARY KEY, target_type TEXT, pref_name TEXT, tax_id INTEGER, organism TEXT, chembl_id TEXT);
        CREATE TABLE target_components (tid INTEGER, component_id INTEGER, targcomp_id INTEGER PRIMARY KEY, homologue INTEGER);
        CREATE TABLE component_sequences (component_id INTEGER PRIMARY KEY, component_type TEXT, accession TEXT, tax_id INTEGER, organism TEXT);
        CREATE TABLE component_synonyms (compsyn_id INTEGER PRIMARY KEY, component_id INTEGER, component_synonym TEXT, syn_type TEXT);
        INSERT INTO target_dictionary VALUES (1, 'SINGLE PROTEIN', 'EGFR', 9606, 'Homo sapiens', 'CHEMBL203'), (2, 'PROTEIN FAMILY', 'RAR', 9606, 'Homo sapiens', 'CHEMBL2'),
            (3, 'PROTEIN NUCLEIC-ACID COMPLEX', '70S ribosome', 2, 'Bacteria', 'CHEMBL3');
        INSERT INTO target_components VALUES (1, 11, 1, 0), (2, 21, 2, 0), (2, 22, 3, 0), (2, 23, 4, 1), (3, 31, 5, 0);
        INSERT INTO component_sequences VALUES (11, 'PROTEIN', 'P00533', 9606, 'Homo sapiens'), (21, 'PROTEIN', 'a', 9606, 'Homo sapiens'), (22, 'PROTEIN', 'b', 9606, 'Homo sapiens'),
            (23, 'PROTEIN', 'c', 10090, 'Mus musculus'), (31, 'PROTEIN', 'd', 2, 'Bacteria');
        INSERT INTO component_synonyms VALUES (1, 11, 'EGFR', 'GENE_SYMBOL'), (2, 11, 'ERBB1', 'GENE_SYMBOL_OTHER'), (3, 21, 'RARA', 'GENE_SYMBOL'), (4, 22, 'RARB', 'GENE_SYMBOL'),
            (5, 23, 'Rarg', 'GENE_SYMBOL'), (6, 31, 'rpsA', 'GENE_SYMBOL');""")
    molecules = [(1, "OSIMERTINIB", "CHEMBL3353410", 1, OSIMERTINIB), (2, "OSIMERTINIB MESYLATE", "CHEMBL3545063", 1, OSIMERTINIB + ".CS(=O)(=O)O"), (3, "TRETINOIN", "CHEMBL38", 3, None),
                 (4, "DOXYCYCLINE", "CHEMBL1433", 4, None), (5, "TWIN", "CHEMBL50", 5, "CCO"), (6, "TWIN", "CHEMBL51", 6, "CCCO"), (7, None, "CHEMBL7", 7, "CCCCO")]
    for molregno, name, chembl_id, up, smiles in molecules:
        db.execute("INSERT INTO molecule_dictionary VALUES (?,?,?,4)", (molregno, name, chembl_id))
        if molregno != 7: db.execute("INSERT INTO molecule_hierarchy VALUES (?,?,?)", (molregno, up, up))
        if smiles: db.execute("INSERT INTO compound_structures VALUES (?,'','',?,?)", (molregno, parent(smiles)["inchikey"] + ("x" if molregno == 2 else ""), smiles))
    db.executemany("INSERT INTO molecule_synonyms VALUES (?,?,?,1,?)", [(1, "RESEARCH_CODE", 1, "AZD-9291"), (3, "OTHER", 2, "retinoic acid"), (2, "TRADE_NAME", 3, "Tagrisso")])
    db.executemany("INSERT INTO drug_mechanism VALUES (?,1,?,?,?,?,1)", [(1, 2, "EGFR inhibitor", 1, "INHIBITOR"), (2, 3, "Retinoic acid receptor agonist", 2, "AGONIST"), (3, 4, "70S ribosome inhibitor", 3, "INHIBITOR")])
    db.commit()
    db.close()
    return path


def test_dump(dump):
    drugs = asked("azd 9291", "TAGRISSO", "Retinoic acid", "doxycycline (monohydrate)", "twin", x=OSIMERTINIB, nameless="CCCCO", twin2="CCO")
    before = dump.read_bytes()
    found, edges = resolve(drugs, [read_source(str(dump), drugs)])
    found = found.set_index("drug")
    assert found["targets"].to_dict() == {"azd 9291": "EGFR", "TAGRISSO": "EGFR", "Retinoic acid": "RARA;RARB", "doxycycline (monohydrate)": "", "twin": "", "x": "EGFR", "nameless": "", "twin2": ""}
    assert found.loc[["azd 9291", "TAGRISSO", "x"], "chembl_id"].eq("CHEMBL3353410").all() and found.loc["nameless", "chembl_id"] == "CHEMBL7" and found.loc["twin2", "chembl_id"] == "CHEMBL50"
    assert found.loc["twin", "ambiguous_with"].count("TWIN") == 2 and found.loc["doxycycline (monohydrate)", "mechanism"] == "70S ribosome inhibitor"
    assert found.loc["TAGRISSO", "inchikey"] == parent(OSIMERTINIB)["inchikey"]
    assert edges.loc[edges["drug"] == "Retinoic acid", ["gene", "action", "target_type"]].values.tolist() == [["RARA", "AGONIST", "PROTEIN FAMILY"], ["RARB", "AGONIST", "PROTEIN FAMILY"]]
    assert dump.read_bytes() == before and list(dump.parent.iterdir()) == [dump]


def test_a_file_that_is_no_dump(tmp_path):
    sqlite3.connect(tmp_path / "empty.db").execute("CREATE TABLE a (b)")
    with pytest.raises(Problem, match="no such table: molecule_.*expected its tables"): read_sqlite(tmp_path / "empty.db", asked("a"))
    (tmp_path / "cut.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    with pytest.raises(Problem, match="cannot be used as a ChEMBL SQLite dump"): read_sqlite(tmp_path / "cut.db", asked("a"))


# the REST interface

def molecule(chembl_id, name, up=None, smiles=None, synonyms=()):
    "A molecule in the shape that ChEMBL answers with."
    structures = smiles and {"canonical_smiles": smiles, "molfile": "", "standard_inchi": "", "standard_inchi_key": parent(smiles)["inchikey"]}
    up = up or chembl_id
    return {"molecule_chembl_id": chembl_id, "pref_name": name, "molecule_hierarchy": {"active_chembl_id": up, "molecule_chembl_id": chembl_id, "parent_chembl_id": up},
            "molecule_structures": structures, "molecule_synonyms": [{"molecule_synonym": s, "syn_type": "OTHER", "synonyms": s.upper()} for s in synonyms], "molecule_type": "Small molecule"}


MOLECULES = [molecule("CHEMBL3353410", "OSIMERTINIB", smiles=OSIMERTINIB, synonyms=["AZD-9291", "Osimertinib"]), molecule("CHEMBL3545063", "OSIMERTINIB MESYLATE", "CHEMBL3353410", synonyms=["Tagrisso"]),
             molecule("CHEMBL38", "TRETINOIN", synonyms=["Retinoic acid"]), molecule("CHEMBL384467", "DEXAMETHASONE", smiles=DEXAMETHASONE)]
MECHANISMS = [{"action_type": "INHIBITOR", "mechanism_of_action": "EGFR inhibitor", "molecule_chembl_id": "CHEMBL3545063", "parent_molecule_chembl_id": "CHEMBL3353410", "target_chembl_id": "CHEMBL203"},
              {"action_type": "AGONIST", "mechanism_of_action": "Retinoic acid receptor agonist", "molecule_chembl_id": "CHEMBL38", "parent_molecule_chembl_id": "CHEMBL38", "target_chembl_id": "CHEMBL2"},
              {"action_type": "INHIBITOR", "mechanism_of_action": "DNA inhibitor", "molecule_chembl_id": "CHEMBL38", "parent_molecule_chembl_id": "CHEMBL38", "target_chembl_id": None}]


def target(chembl_id, kind, *genes, organism="Homo sapiens"):
    components = [{"accession": g, "component_type": "PROTEIN", "target_component_synonyms": [{"component_synonym": g, "syn_type": "GENE_SYMBOL"}, {"component_synonym": g + "9", "syn_type": "GENE_SYMBOL_OTHER"}]} for g in genes]
    return {"target_chembl_id": chembl_id, "target_type": kind, "organism": organism, "target_components": components}


TARGETS = [target("CHEMBL203", "SINGLE PROTEIN", "EGFR"), target("CHEMBL2", "PROTEIN FAMILY", "RARA", "RARB", "RARG")]


class Chembl(BaseHTTPRequestHandler):
    "Answers filters and pages as ChEMBL does; `server.trouble` maps a request's number to what goes wrong."
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def send(self, body, status=200, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.seen.append(self.path)
        trouble = self.server.trouble.get(len(self.server.seen), self.server.trouble.get("always"))
        if trouble: return trouble(self)
        url, asked = urlsplit(self.path), {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        resource = url.path.rpartition("/")[2].removesuffix(".json")
        rows = {"molecule": MOLECULES, "mechanism": MECHANISMS, "target": TARGETS}[resource]
        limit, offset = min(int(asked.pop("limit", 20)), self.server.page), int(asked.pop("offset", 0))
        for field, value in asked.items(): rows = [r for r in rows if self.fits(r, field, value)]
        more = offset + limit < len(rows)
        query = "&".join([*(f"{k}={v.replace(' ', '%20')}" for k, v in asked.items()), f"limit={limit}", f"offset={offset + limit}"])
        meta = {"limit": limit, "offset": offset, "next": f"{url.path}?{query}" if more else None, "previous": None, "total_count": len(rows)}
        self.send({"page_meta": meta, resource + "s": rows[offset:offset + limit]})

    def fits(self, row, field, value):
        structures = row.get("molecule_structures") or {}
        if field == "molecule_structures__standard_inchi_key__in": return structures.get("standard_inchi_key") in value.split(",")
        if field == "molecule_synonyms__molecule_synonym__iexact": return value.casefold() in {s["molecule_synonym"].casefold() for s in row["molecule_synonyms"]}
        if field == "molecule_structures__canonical_smiles__connectivity": return parent(value)["inchikey"][:14] == structures.get("standard_inchi_key", "")[:14]
        if field == "pref_name__iexact": return value.casefold() == row["pref_name"].casefold()
        return row[field.removesuffix("__in")] in value.split(",")


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chembl)
    server.trouble, server.seen, server.page, server.daemon_threads = {}, [], 1000, True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/chembl/api/data"
    yield server
    server.shutdown()
    server.server_close()


def session(folder, **given): return chembl_session(folder / "cache", **{"per_second": 1000, "retries": 2, "backoff": 0.01, "timeout": 2} | given)


def test_rest(server, tmp_path):
    server.page = 1  # every list comes in pages
    drugs = asked("tagrisso", "Retinoic acid", "nobody", "Tretinoin", AZD9291=OSIMERTINIB + ".CS(=O)(=O)O", code=FLAT)
    rows = read_rest(server.url, drugs, session(tmp_path))
    found, edges = resolve(drugs, [rows])
    found = found.set_index("drug")
    assert found["chembl_id"].to_dict() == {"tagrisso": "CHEMBL3353410", "Retinoic acid": "CHEMBL38", "nobody": "", "Tretinoin": "CHEMBL38", "AZD9291": "CHEMBL3353410", "code": "CHEMBL384467"}
    assert found["targets"].tolist() == ["EGFR", "RARA;RARB;RARG", "", "RARA;RARB;RARG", "EGFR", ""]
    assert found["matched_by"].tolist() == ["chembl: synonym", "chembl: synonym", "", "chembl: name", "chembl: inchikey", "chembl: skeleton"]
    assert found.loc["Retinoic acid", "mechanism"] == "DNA inhibitor; Retinoic acid receptor agonist" and set(edges["target_type"]) == {"SINGLE PROTEIN", "PROTEIN FAMILY"}
    asked_first = len(server.seen)
    pd.testing.assert_frame_equal(read_rest(server.url, drugs, session(tmp_path)), rows)  # a new session: everything is kept
    assert len(server.seen) == asked_first
    kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".sqlite"]
    assert kept and all(p.suffix == ".json" and isinstance(json.loads(p.read_text()), dict) for p in kept)


def test_nothing_is_asked_for_nothing(server, tmp_path):
    assert read_rest(server.url, asked("nobody"), session(tmp_path)).empty
    assert not [p for p in server.seen if "mechanism" in p or "target." in p]


@pytest.mark.parametrize("trouble", [lambda h: h.send({}, 500), lambda h: h.send({}, 429, Retry_After=0), lambda h: h.send({}, 503), lambda h: h.connection.shutdown(2)],
                         ids=["500", "429", "503", "cut"])
def test_what_passes_is_asked_again(server, tmp_path, trouble):
    server.trouble = {1: trouble}
    assert len(pages(session(tmp_path), server.url, "molecule")) == 4 and len(server.seen) == 2


def test_the_server_names_the_time_to_wait(server, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waited.append)
    server.trouble = {1: lambda h: h.send({}, 429, Retry_After=7), 2: lambda h: h.send({}, 503, Retry_After=9)}
    assert len(pages(session(tmp_path), server.url, "molecule")) == 4 and [w for w in waited if w > 1] == [7, 9]


@pytest.mark.parametrize("trouble, said", [
    (lambda h: h.send({}, 404), "answered 404"), (lambda h: h.send({}, 429), "kept refusing"), (lambda h: h.send({}, 500), "kept refusing"),
    (lambda h: h.send(b"<html>maintenance</html>", kind="text/html"), "not JSON .text/html"), (lambda h: h.send(b'{"molecules": [{'), "not JSON"), (lambda h: h.send(["a"]), "no list with page_meta"),
    (lambda h: h.send({"molecules": []}), "no list with page_meta"), (lambda h: h.send({"page_meta": {"total_count": 0}}), "no list with page_meta"),
    (lambda h: h.server.gate.wait(5), "did not answer in time"),
    (lambda h: h.send({"page_meta": {"next": None, "total_count": 5}, "molecules": [1]}), "1 rows came, and 5 were announced"),
    (lambda h: h.send({"page_meta": {"next": "/chembl/api/data/molecule.json?offset=1", "total_count": 2}, "molecules": [1]}), "rows came, and 2"),
    (lambda h: h.send({"page_meta": {"next": "/chembl/api/data/molecule.json?offset=1", "total_count": 2}, "molecules": []}), "rows came, and 2"),
    (lambda h: h.send({"page_meta": {"next": "http://localhost:1/x", "total_count": 2}, "molecules": [1]}), "another server")],
    ids="404 429 500 html malformed array no-meta no-list time-out short endless empty elsewhere".split())
def test_errors_are_one_line_and_are_not_kept(server, tmp_path, trouble, said):
    server.trouble, server.gate = {"always": trouble}, threading.Event()
    with pytest.raises(Problem, match=said) as e: pages(session(tmp_path, timeout=0.2), server.url, "molecule")
    server.gate.set()
    assert "\n" not in str(e.value)
    server.trouble = {}
    assert len(pages(session(tmp_path), server.url, "molecule")) == 4


def test_a_missing_page_is_an_error(server, tmp_path):
    server.page, server.trouble = 2, {2: lambda h: h.send({}, 404)}
    with pytest.raises(Problem, match="answered 404"): pages(session(tmp_path), server.url, "molecule")
    assert len(pages(session(tmp_path), server.url, "molecule")) == 4 and len(server.seen) == 3  # the first page was kept


def test_no_server(tmp_path):
    with pytest.raises(Problem, match="cannot be reached"): pages(session(tmp_path), "http://127.0.0.1:1/data", "molecule")


def test_requests_are_paced(server, tmp_path, monkeypatch):
    slept, clock = [], [0.0]
    monkeypatch.setattr("perturb_research.data.chembl.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("perturb_research.data.chembl.time.sleep", lambda s: (slept.append(s), clock.__setitem__(0, clock[0] + s)))
    server.page = 1
    pages(session(tmp_path, per_second=2), server.url, "molecule")
    assert slept == pytest.approx([0, 0.5, 0.5, 0.5])


# the notebook

def test_notebook_on_a_screen_and_on_one_without_drugs(tmp_path):
    screen = cells(n=60, column="drug", targets=("DMSO", "Osimertinib (mesylate)", "nobody"), cell_line=["A549", "MCF7"] * 30)
    screen.write_h5ad(tmp_path / "drugs.h5ad")
    (tmp_path / "more.tsv").write_text("name\tsynonyms\tsmiles\ttarget\tmoa\nosimertinib\tAZD9291\t" + OSIMERTINIB + "\tEGFR;ERBB4\tEGFR inhibitor\n")
    run_here("03_data.chembl", tmp_path / "out", dataset="mine", source=str(tmp_path / "drugs.h5ad"), sources=str(tmp_path / "more.tsv"))
    written = pd.read_csv(tmp_path / "out/data/processed/mine/drugs.csv", keep_default_na=False).set_index("drug")
    assert written.loc["Osimertinib (mesylate)", ["targets", "sources"]].tolist() == ["EGFR;ERBB4", "more;reference"] and written.loc["nobody", "targets"] == ""
    assert {p.name for p in (tmp_path / "out/figures/mine").glob("*.csv")} == {f"{s}.csv" for s in ("drug_sources", "targets_per_drug", "drugs_per_target", "drug_scaffolds")}
    cells().write_h5ad(tmp_path / "genes.h5ad")
    run_here("03_data.chembl", tmp_path / "out", dataset="mine", source=str(tmp_path / "genes.h5ad"))
    assert not (tmp_path / "out/data/processed/mine/drugs.csv").exists() and len(list((tmp_path / "out/figures/mine").glob("*.note.txt"))) == 4


@needs_shared
def test_tahoes_drugs():
    own = drugs_in_table(SHARED / "tahoe/drug_metadata.parquet")
    drugs, unreadable, several = with_structures(own)
    tables = [read_source(str(SHARED / "drugs" / name), drugs) for name in ("chembl_mechanisms.tsv", "repurposing_hub_drugs.txt")]
    given = [own, *(facts(read_table(ROOT / f"data/reference/{name}.csv"), source) for name, source in (("drugs", "reference"), ("drug_synonyms", "synonyms"))), *tables]
    found, edges = resolve(drugs, given)
    assert len(found) == 379 and unreadable == several == []
    assert (found["targets"] != "").sum() >= 320 and (found.loc[found["targets"] != "", "sources"] != "").all()
    by = edges.groupby("source")["drug"].nunique()
    assert by["screen"] >= 264 and by["chembl_mechanisms"] >= 150 and by["repurposing_hub_drugs"] >= 250
    pair = agreement(edges, ["screen", "chembl_mechanisms"]).iloc[0]
    assert pair["drugs"] > 120 and pair["same"] < pair["jaccard"] < pair["overlapping"] and pair["overlapping"] > .85
    mine = edges[edges["drug"] == "Adagrasib"]
    assert set(mine["gene"]) == {"KRAS"} and set(mine["action"]) == {"INHIBITOR"} and "screen" in set(mine["source"]) and "chembl_mechanisms" not in set(mine["source"])
    found = found.set_index("drug")
    assert found.loc["(S)-Crizotinib", "targets"] == "NUDT1" and "ALK" in found.loc["Crizotinib (hydrochloride)", "targets"]
    assert found.loc["Rapamycin", "targets"] == "FKBP1A;MTOR" and "chembl_mechanisms: triamcinolone (CHEMBL1504)" in found.loc["Triamcinolone", "ambiguous_with"]


def test_a_screen_without_structures_gets_them_by_name(small, tmp_path):
    "03 finds what the names mean, 04 adds it to the effects and says so."
    import anndata
    screen = anndata.read_h5ad(small / "data/raw/sim_drugs/screen.h5ad")
    screen.obs = screen.obs.drop(columns=[c for c in screen.obs if c in ("smiles", "targets")])
    screen.uns.clear()
    screen.uns["effect_scale"] = "mean_log1p"
    screen.write_h5ad(tmp_path / "plain.h5ad")
    for name in ("03_data.chembl", "04_data.preprocess"): run_here(name, tmp_path / "out", dataset="plain", source=str(tmp_path / "plain.h5ad"), profile="small")
    drugs = pd.read_csv(tmp_path / "out/data/processed/plain/drugs.csv", keep_default_na=False).set_index("drug")
    obs = anndata.read_h5ad(tmp_path / "out/data/processed/plain/effects.h5ad").obs
    known = obs["perturbation"].isin(drugs.index[drugs["smiles"] != ""])
    assert known.any() and not known.all() and (obs["smiles"].astype(str) != "").equals(known)
    assert (obs.loc[known, "smiles"].astype(str) == drugs["smiles"].reindex(obs.loc[known, "perturbation"].astype(str)).to_numpy()).all()
    assert '"filled_from_drugs": {\n  "smiles": ' in (tmp_path / "out/data/processed/plain/preprocess.json").read_text()
