"scGen-style latent arithmetic: what it learns, what it refuses, and that nothing but training cells reaches it."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from conftest import SHARED, needs_shared
from perturb_research.core import Problem, generator
from perturb_research.data.splits import make_split
from perturb_research.models.baselines import additive_weights
from perturb_research.models.scgen import ScGen, ScGenRandom, components, control_means, latent_effects

SMALL = dict(latent=12, hidden=8, most=20, batch=64, controls=30, epochs=3)


def screen(conditions, effects, n=30, noise=.3, seed=0, counts=None, batches=1, doses=None):
    "`(effects, cells)`: conditions (perturbation, context), log-like cells with `effects` (conditions, genes), and as many controls in each context."
    rng, g = generator(seed, "screen"), np.shape(effects)[1]
    obs = pd.DataFrame(conditions, columns=["perturbation", "context"]).assign(perturbation_type="CRISPRa", dose=doses or np.nan, time_h=np.nan)
    obs.index = pd.Index(obs["perturbation"] + "|" + obs["context"] + ("|" + obs["dose"].astype(str) if doses else ""), name="condition")
    kinds = sorted(set(obs["context"]))
    names, contexts = [*obs.index, *[""] * len(kinds)], [*obs["context"], *kinds]
    place = {c: rng.normal(0, .2, g) for c in kinds}
    level, mean = 3 + rng.random(g), np.vstack([effects, np.zeros((len(kinds), g))])
    size = [*(counts or [n] * len(obs)), *[n] * len(kinds)]
    blocks = [np.maximum(level + place[c] + m + rng.normal(0, noise, (k, g)), 0) for c, m, k in zip(contexts, mean, size)]
    table = pd.DataFrame(dict(condition=np.repeat(names, size), context=np.repeat(contexts, size)))
    table = table.assign(is_control=table["condition"] == "", batch=[str(i % batches) for i in range(len(table))])
    cells = ad.AnnData(sparse.csr_matrix(np.vstack(blocks).astype(np.float32)), table.set_index(table.index.astype(str)), pd.DataFrame(index=[f"G{i}" for i in range(g)]))
    control = dict(zip(kinds, blocks[len(obs):]))
    X = [b.mean(0) - control[c].mean(0) for b, c in zip(blocks, obs["context"])]
    return ad.AnnData(np.array(X, dtype=np.float32), obs, cells.var), cells


def genes(k=4, g=25, seed=1):
    rng = generator(seed, "genes")
    return rng.normal(0, 1, (k, g)) * (rng.random((k, g)) < .4)


def pairs(scale=.7):
    "A screen of four genes and four of their pairs, which do `scale` of the sum, and the two other pairs."
    alone, names = genes(), "ABCD"
    effect = lambda p: alone[names.index(p)] if len(p) == 1 else scale * sum(alone[names.index(x)] for x in p.split("+"))
    known, other = [*names, "A+B", "B+C", "C+D", "A+D"], ["A+C", "B+D"]
    train, cells = screen([(p, "x") for p in known], [effect(p) for p in known])
    asked = train.obs.iloc[[0, 0]].assign(perturbation=other)
    return train, cells, asked, np.array([effect(p) for p in other])


def with_other_test_rows():
    "A split of `pairs`, what its test asks for, and the screen `(effects, cells)` twice: as it is, and with other effects and cells in the test rows."
    train, cells, *_ = pairs()
    train.uns = dict(dataset_id="toy", effect_scale="mean_log1p")
    cells.obs["half"] = 1
    split = make_split(train, "doubles", 0)
    other, others = train.copy(), cells.copy()
    held = [train.obs_names.get_loc(c) for c in split.ids["test"]]
    assert held
    other.X[held] += 5
    others.X[np.flatnonzero(cells.obs["condition"].isin(split.ids["test"]))] *= 3
    return split, split.test(train).obs, ((train, cells), (other, others))


def fit(train, cells, model=ScGen, seed=0, **changes):
    return model(**SMALL | changes).fit(train, cells=cells, rng=generator(seed, "fit"))


def test_the_gain_of_pairs_is_learnt():
    train, cells, asked, truth = pairs()
    model = fit(train, cells)
    error = lambda y: np.linalg.norm(y - truth, axis=1).mean()
    assert model.gain == pytest.approx(.7, abs=.06)
    assert error(model.predict(asked)) < .5 * error(additive_weights(asked, train.obs) @ train.X)
    assert fit(train, cells, gain=False).gain == 1


def test_gradient_reaches_every_parameter():
    train, cells, *_ = pairs()
    model = fit(train, cells, epochs=1)
    model.network.train()(model.tensor(cells.X[:40].toarray()))["loss"].backward()
    assert [n for n, p in model.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_order_of_genes_does_not_matter():
    train, cells, asked, _ = pairs()
    order = generator(0, "order").permutation(train.n_vars)
    there, here = fit(train, cells).predict(asked), fit(train[:, order].copy(), cells[:, order].copy()).predict(asked)
    np.testing.assert_allclose(here, there[:, order], atol=1e-6)


def test_same_seed_same_numbers_other_seed_others():
    train, cells, asked, _ = pairs()
    first, again, other = (fit(train, cells, seed=s).predict(asked) for s in (0, 0, 1))
    assert (first == again).all() and not (first == other).all()


def test_checkpoint_round_trip(tmp_path):
    train, cells, asked, _ = pairs()
    fits = [ScGen(**SMALL).fit(train, cells=cells, rng=generator(0, "fit"), checkpoint=tmp_path/"c.pt") for _ in range(2)]
    assert (fits[0].predict(asked) == fits[1].predict(asked)).all()
    weights = torch.load(tmp_path/"c.pt", weights_only=True)["network"]
    assert all(torch.equal(weights[k], v) for k, v in fits[1].network.state_dict().items())


def test_unseen_gene_gets_the_mean_displacement():
    train, cells, asked, _ = pairs()
    model = fit(train, cells)
    np.testing.assert_allclose(model.shifts(asked.assign(perturbation=["Z", "Z"]))[0], model.delta[:4].mean(0))


def test_each_context_has_one_vote():
    alone = genes()
    train, cells = screen([("A", "x"), ("A", "y"), ("B", "x"), ("B", "y"), ("B", "z")], [alone[0], alone[1], *alone[2:3].repeat(3, 0)], counts=[60, 10, 20, 20, 20])
    model = fit(train, cells)
    asked = train.obs.iloc[[0]].assign(context="z")
    np.testing.assert_allclose(model.shifts(asked)[0], (model.delta[0] + model.delta[1]) / 2)
    error = np.linalg.norm(model.predict(asked)[0] - (alone[0] + alone[1]) / 2)
    assert error < .3 * np.linalg.norm(alone[0] + alone[1]) / 2


def test_controls_are_matched_by_batch():
    obs = pd.DataFrame(dict(context=list("xxxxyy"), batch=list("001101"), is_control=[True, False, True, False, True, False]))
    values = np.array([[1.], [5.], [3.], [9.], [7.], [8.]])
    cells = ad.AnnData(np.zeros((6, 1)), obs.set_index(obs.index.astype(str)))
    assert control_means(values, cells).ravel().tolist() == [1, 1, 3, 3, 7, 7]  # the last: no control in its batch, those of its context
    assert latent_effects(values, cells, np.array([-1, 0, -1, 0, -1, 1]), 3).ravel().tolist() == [5, 1, 0]


def test_test_rows_and_cells_change_nothing():
    split, asked, screens = with_other_test_rows()
    fits = [ScGen(**SMALL).fit(split.train(e), val=split.val(e), cells=split.train_cells(c, e), val_cells=split.val_cells(c, e), rng=generator(0, "fit")) for e, c in screens]
    assert (fits[0].predict(asked) == fits[1].predict(asked)).all()


def test_what_cannot_be_used_is_refused_in_one_line():
    train, cells, asked, _ = pairs()
    for wrong, words in ((None, "needs single cells"), (cells[:, 1:], "other genes"), (cells[~cells.obs["is_control"]], "no control cells"), (cells[cells.obs["is_control"]], "no cells of the training")):
        with pytest.raises(Problem, match=words) as caught: fit(train, wrong)
        assert "\n" not in str(caught.value)
    assert "nothing to add" in ScGen().applies(train[:4], asked.iloc[:0]) and ScGen().applies(train, asked) == ""


def test_dense_cells_and_a_random_start():
    train, cells, asked, truth = pairs()
    full = cells.copy()
    full.X = full.X.toarray()
    np.testing.assert_allclose(fit(train, full).predict(asked), fit(train, cells).predict(asked), atol=1e-5)
    assert fit(train, cells, ScGenRandom, epochs=8).predict(asked).shape == truth.shape


def test_components_hold_effects_first():
    train, cells, *_ = pairs()
    V, sd = components(train.X.astype(float), cells, 16, generator(0, "components"))
    np.testing.assert_allclose(V.T @ V, np.eye(V.shape[1]), atol=1e-8)
    np.testing.assert_allclose(train.X @ V[:, :8] @ V[:, :8].T, train.X, atol=1e-4)
    assert (sd > 0).all() and ((V**3).sum(0) > 0).all()


@needs_shared
def test_a_cell_type_left_out():
    given = ad.read_h5ad(SHARED/"kang"/"kang_pbmc_ifnb.h5ad")
    wanted = given.obs["cell_type"].isin(["B", "CD4T", "CD14+Mono", "NK"]).to_numpy()
    given = given[wanted]
    given = given[:, np.argsort(-np.asarray(given.X.mean(0)).ravel(), kind="stable")[:600]]
    context, control = given.obs["cell_type"].astype(str).to_numpy(), (given.obs["condition"] == "control").to_numpy()
    obs = pd.DataFrame(dict(perturbation="IFNB1", perturbation_type="stimulus", context=sorted(set(context)), dose=np.nan, time_h=np.nan))
    obs.index = "IFNB1|" + obs["context"]
    mean = lambda rows: np.asarray(given.X[rows].mean(0)).ravel()
    X = np.array([mean((context == c) & ~control) - mean((context == c) & control) for c in obs["context"]], dtype=np.float32)
    table = pd.DataFrame(dict(context=context, batch="0", is_control=control, condition=np.where(control, "", "IFNB1|" + pd.Series(context))), index=given.obs_names)
    effects, cells = ad.AnnData(X, obs, given.var[[]]), ad.AnnData(sparse.csr_matrix(given.X), table, given.var[[]])
    rest = effects[effects.obs["context"] != "B"].copy()
    model = ScGen(epochs=4, latent=32).fit(rest, cells=cells[cells.obs["is_control"] | (cells.obs["context"] != "B")].copy(), rng=generator(0, "kang"))
    truth, asked = effects.X[obs["context"] == "B"], effects.obs[obs["context"] == "B"]
    error = np.linalg.norm(model.predict(asked) - truth)
    assert error < .8 * np.linalg.norm(truth) and error < 1.05 * np.linalg.norm(rest.X.mean(0) - truth)
