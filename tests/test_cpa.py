"CPA-style composition: what it learns, that the basal state holds no effect, and that nothing but training cells reaches it."
import numpy as np
import pytest
import torch

from perturb_research.core import Problem, generator
from perturb_research.models.baselines import additive_weights
from perturb_research.models.cpa import CPA, CPANoAdversary, Dose, Reversed, class_means, erasure, reversal
from test_scgen import genes, pairs, screen, with_other_test_rows

SMALL = dict(latent=12, hidden=8, most=20, batch=64, controls=30, epochs=4)


def fit(train, cells, model=CPA, seed=0, val=None, **changes):
    return model(**SMALL | changes).fit(train, val=val, cells=cells, rng=generator(seed, "fit"))


def test_pairs_that_do_less_than_their_sum():
    train, cells, asked, truth = pairs()
    model = fit(train, cells)
    error = lambda y: np.linalg.norm(y - truth, axis=1).mean()
    assert model.network.gain.item() == pytest.approx(.7, abs=.06)
    assert error(model.predict(asked)) < .5 * error(additive_weights(asked, train.obs) @ train.X)


def test_an_activated_gene_is_not_one_knocked_out_elsewhere():
    "Genes activated in one line and repressed in another, to the opposite effect; one pair was seen, which says little of others."
    alone = genes()
    asked = [("A", "x"), ("B", "x"), ("C", "x"), ("D", "x"), ("C+D", "x"), ("A", "y"), ("B", "y")]
    truth = np.array([*alone, .2 * (alone[2] + alone[3]), -alone[0], -alone[1]])
    train, cells = screen(asked, truth)
    train.obs["perturbation_type"] = np.where(train.obs["context"] == "x", "CRISPRa", "CRISPRi")
    model = fit(train, cells, epochs=1)
    assert len(model.parts) == 6 and .5 < model.network.gain.item() < .75
    found = model.predict(train.obs)
    for row in (0, 1, 5, 6): assert np.linalg.norm(found[row] - truth[row]) < .6 * np.linalg.norm(truth[row])


def test_an_interaction_that_the_decoder_can_hold():
    "Ten genes act on two programmes, a pair does 0.7 of the sum on each, and where both programmes are up, other genes follow."
    rng, names = generator(0, "rule"), "ABCDEFGHIJ"
    strength, programmes, both = abs(rng.normal(0, 1.2, (10, 2))), rng.normal(0, .5, (2, 30)), rng.normal(0, .5, 30)
    every = [f"{a}+{b}" for i, a in enumerate(names) for b in names[i + 1:]]
    known, asked = every[::2], every[1::2]
    def effect(p):
        z = sum(strength[names.index(x)] for x in p.split("+")) * (.7 if "+" in p else 1)
        return z @ programmes + .4 * z[0] * z[1] * both
    train, cells = screen([(p, "x") for p in [*names, *known]], [effect(p) for p in [*names, *known]])
    val, _ = screen([(p, "x") for p in asked[:6]], [effect(p) for p in asked[:6]], seed=3)
    model = CPA(latent=6, hidden=16, most=30, batch=64, controls=30, patience=40, lr=1e-2, epochs=40, adversary=.01).fit(train, val=val, cells=cells, rng=generator(0, "x"))
    new, truth = train.obs.iloc[[0] * len(asked[6:])].assign(perturbation=asked[6:]), np.array([effect(p) for p in asked[6:]])
    added = np.array([sum(effect(x) for x in p.split("+")) for p in asked[6:]])
    best = (added * truth).sum() / (added**2).sum()  # a scale that has seen the answers
    error = lambda y: np.linalg.norm(y - truth, axis=1).mean()
    assert error(model.predict(new)) < .8 * error(best * added) < error(added)


def test_gradient_reaches_every_parameter():
    alone = genes()
    train, cells = screen([("A", "x"), ("B", "x"), ("A+B", "x"), ("A", "y")], [alone[0], alone[1], alone[0] + alone[1], alone[0]], doses=[.1, 1., 1., 10.])
    model = fit(train, cells, epochs=1)
    model.network.pull = 1.
    model.network.train()(*model.batch(np.arange(cells.n_obs)))["loss"].backward()
    assert [n for n, p in model.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert {"w", "gain", "dose.slope", "judge.0.weight"} <= dict(model.network.named_parameters()).keys()


def test_pairs_do_not_bend_the_vectors_of_genes_measured_alone():
    train, cells, *_ = pairs()
    model = fit(train, cells, epochs=1)
    model.network(*model.batch(np.flatnonzero(model.code >= 4)))["loss"].backward()  # rows 4 to 7 are pairs
    assert model.network.v.grad.abs().sum() == 0 and model.network.gain.grad.abs().sum() > 0


def test_the_sign_turns_between_adversary_and_encoder():
    train, cells, *_ = pairs()
    model = fit(train, cells, epochs=1)
    net, batch = model.network, model.batch(np.arange(0, cells.n_obs, 3))
    gradients = {}
    for pull in (0., 1.):
        net.zero_grad()
        net.pull = pull
        net(*batch)["loss"].backward()
        gradients[pull] = net.f[2].weight.grad.clone(), net.judge[0].weight.grad.clone()
    assert torch.equal(gradients[0.][1], gradients[1.][1]) and not torch.equal(gradients[0.][0], gradients[1.][0])
    x = torch.ones(2, requires_grad=True)
    Reversed.apply(x, 2.).sum().backward()
    assert x.grad.tolist() == [-2, -2] and reversal(0) == 0 and reversal(1) == pytest.approx(1, abs=1e-3)


def test_the_projection_leaves_no_class_means_and_little_else():
    rng, label = generator(0, "erasure"), np.repeat(np.arange(3), 40)
    H = rng.normal(size=(120, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=(3, 6))[label]
    keep = erasure(H, label, 6)
    assert abs(class_means((H - H.mean(0)) @ keep.T, label)[0]).max() < 1e-9
    np.testing.assert_allclose(keep @ keep, keep, atol=1e-8)
    assert np.linalg.matrix_rank(erasure(H, label, 1)) == 5


def test_the_basal_state_starts_without_effects():
    train, cells, *_ = pairs()
    difference = lambda model: abs(class_means(np.asarray(cells.X @ model.array(model.network.inward)), model.label)[0] - np.asarray(cells.X @ model.array(model.network.inward)).mean(0)).max()
    assert difference(fit(train, cells, epochs=1)) < 1e-4 < .1 < difference(fit(train, cells, CPANoAdversary, epochs=1))


def test_doses_between_and_contexts_unseen():
    alone, strength = genes(2), np.array([.1, 1., 10.])
    share = strength / (strength + .5)
    train, cells = screen([("A", "x")] * 3 + [("B", "x")] * 3 + [("A", "y")], np.r_[np.outer(share, alone[0]), np.outer(share, alone[1]), share[1:2, None] * alone[:1]], doses=[*strength, *strength, 1.])
    model = fit(train, cells)
    made = model.predict(train.obs.iloc[[3] * 4].assign(dose=[.3, 3., 30., 1.], context=["x", "x", "x", "y"]))
    size = np.linalg.norm(made, axis=1)
    assert size[0] < size[1] < size[2] and np.linalg.norm(made[3] - share[1] * alone[1]) < .5 * np.linalg.norm(share[1] * alone[1])
    curve = Dose(1, .1)(torch.tensor([0., 1., 1e9, float("nan")])).ravel().tolist()
    assert curve[0] == 0 and 0 < curve[1] < curve[2] <= 1 and curve[3] == 1


def test_order_of_genes_does_not_matter():
    train, cells, asked, _ = pairs()
    order = generator(0, "order").permutation(train.n_vars)
    there, here = fit(train, cells).predict(asked), fit(train[:, order].copy(), cells[:, order].copy()).predict(asked)
    np.testing.assert_allclose(here, there[:, order], atol=1e-6)


def test_same_seed_same_numbers_and_checkpoint(tmp_path):
    train, cells, asked, _ = pairs()
    fits = [CPA(**SMALL).fit(train, cells=cells, rng=generator(0, "fit"), checkpoint=path) for path in (None, tmp_path/"c.pt", tmp_path/"c.pt")]
    first, *others = [m.predict(asked) for m in fits]
    assert all((first == y).all() for y in others) and not (fit(train, cells, seed=1).predict(asked) == first).all()
    assert torch.load(tmp_path/"c.pt", weights_only=True)["finished"]


def test_unseen_gene_gets_the_mean_vector():
    train, cells, asked, _ = pairs()
    model = fit(train, cells)
    with model.asking(): made = model.array(model.shifts(asked.assign(perturbation=["Z", "A+Z"])))
    v, gain = model.array(model.network.v), model.network.gain.item()
    np.testing.assert_allclose(made, [v.mean(0), gain * (v[0] + v.mean(0))])


def test_test_rows_and_cells_change_nothing():
    split, asked, screens = with_other_test_rows()
    fits = [fit(split.train(e), split.train_cells(c, e), val=split.val(e)) for e, c in screens]
    assert (fits[0].predict(asked) == fits[1].predict(asked)).all()


def test_what_cannot_be_used_is_refused_in_one_line():
    train, cells, asked, _ = pairs()
    for wrong, words in ((None, "needs single cells"), (cells[~cells.obs["is_control"]], "no control cells")):
        with pytest.raises(Problem, match=words): fit(train, wrong)
    with pytest.raises(Problem, match="did you mean 'adversary'"): CPA(adversry=1.)
    assert "nothing to add" in CPA().applies(train[:4], asked.iloc[:0])
