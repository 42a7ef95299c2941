"""Every measure against a value worked out by hand, and against an independent computation."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from unlearn_ext.distributed import ALONE
from unlearn_ext.evaluation.metrics import attacks
from unlearn_ext.evaluation.metrics.accuracy import accuracy
from unlearn_ext.evaluation.metrics.attacks import mia
from unlearn_ext.evaluation.metrics.distances import layer_distance
from unlearn_ext.evaluation.metrics.divergences import activation_distance, js_divergence, zrf
from unlearn_ext.evaluation.metrics.relearning import anamnesis_index, relearn_steps
from unlearn_ext.tasks import Classification


def fixed(*probabilities):
    """Data whose inputs are log-probabilities, so that the identity predicts them."""
    return [(torch.tensor(probabilities, dtype=torch.float64).log(),)]


class Swap(nn.Module):
    def forward(self, x):
        return x.flip(-1)


class Constant(nn.Module):
    def __init__(self, *probabilities):
        super().__init__()
        self.register_buffer("scores", torch.tensor(probabilities, dtype=torch.float64).log())

    def forward(self, x):
        return self.scores.expand(len(x), -1)


def entropy(p):
    return -sum(v * math.log2(v) for v in p if v)


# ---- divergences


def test_js_by_hand():
    # p = (3/4, 1/4), q = (1/4, 3/4): the mixture is uniform, so JS = 1 - H(1/4) bits.
    expected = 1 - entropy((0.25, 0.75))
    assert js_divergence(nn.Identity(), Swap(), fixed((0.75, 0.25))) == pytest.approx(expected, abs=1e-12)
    assert zrf(nn.Identity(), Swap(), fixed((0.75, 0.25))) == pytest.approx(1 - expected, abs=1e-12)


def test_js_against_scipy():
    distance = pytest.importorskip("scipy.spatial.distance")
    p = torch.rand(7, 5, dtype=torch.float64).softmax(-1)
    q = torch.rand(5, dtype=torch.float64).softmax(-1)
    expected = np.mean([distance.jensenshannon(row, q.numpy(), base=2) ** 2 for row in p.numpy()])
    assert js_divergence(nn.Identity(), Constant(*q.tolist()), [(p.log(),)]) == pytest.approx(expected)


def test_js_bounds():
    opposite = [(torch.tensor([[1e4, 0.0]], dtype=torch.float64),)]
    assert js_divergence(nn.Identity(), Swap(), opposite) == pytest.approx(1, abs=1e-12)
    assert js_divergence(nn.Identity(), nn.Identity(), opposite) == 0


def test_zrf_release_divides_by_the_number_of_classes():
    # KL(m || p) = KL(m || q) = ln(2) - ... with m uniform: (ln(1/2 / 3/4) + ln(1/2 / 1/4)) / 2 nats.
    divergence = (math.log(0.5 / 0.75) + math.log(0.5 / 0.25)) / 2
    got = zrf(nn.Identity(), Swap(), fixed((0.75, 0.25)), convention="release")
    assert got == pytest.approx(1 - divergence / 2, abs=1e-12)


@pytest.mark.filterwarnings("ignore:reduction")  # 'mean' is what the released code says
def test_zrf_release_against_the_functions_of_torch():
    p, q = torch.rand(6, 4).double().softmax(-1), torch.rand(4).double().softmax(-1)
    m = (p + q) / 2
    mean = nn.KLDivLoss(reduction="mean")
    expected = 1 - 0.5 * (mean(p.log(), m) + mean(q.expand_as(p).log(), m))
    got = zrf(nn.Identity(), Constant(*q.tolist()), [(p.log(),)], convention="release")
    assert got == pytest.approx(float(expected))


def test_activation_distance_by_hand():
    got = activation_distance(nn.Identity(), Swap(), fixed((0.75, 0.25), (0.5, 0.5)))
    assert got == pytest.approx((math.sqrt(0.5) + 0) / 2, abs=1e-12)


def test_means_are_over_samples_not_batches():
    p = torch.rand(5, 3).double().log()
    whole, parts = [(p,)], [(p[:4],), (p[4:],)]
    for measure in (js_divergence, activation_distance, zrf):
        assert measure(nn.Identity(), Swap(), whole) == pytest.approx(measure(nn.Identity(), Swap(), parts))


def test_classes_on_the_second_axis():
    scores, labels = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    flat = [(scores.movedim(1, -1).reshape(-1, 3),)]
    shift = nn.Module()
    shift.forward = lambda x: x * 2
    assert js_divergence(nn.Identity(), shift, [(scores, labels)]) == pytest.approx(
        js_divergence(nn.Identity(), shift, flat)
    )


@pytest.mark.parametrize("measure", [js_divergence, activation_distance, zrf])
def test_divergences_refuse_what_they_cannot_compare(measure):
    with pytest.raises(ValueError, match="at least one sample"):
        measure(nn.Identity(), nn.Identity(), [])
    with pytest.raises(ValueError, match="outputs of one shape"):
        measure(nn.Identity(), Constant(0.2, 0.3, 0.5), fixed((0.75, 0.25)))


@pytest.mark.parametrize("measure", [js_divergence, activation_distance, zrf])
@pytest.mark.parametrize("row", [[torch.inf, 0.0], [-torch.inf, -torch.inf]])
def test_divergences_refuse_outputs_without_probabilities(measure, row):
    outputs = torch.tensor([row, [1.0, 0.0]])
    with pytest.raises(FloatingPointError, match="outputs must leave probabilities, got infinite ones"):
        measure(nn.Identity(), nn.Identity(), [(outputs, torch.tensor([0, 1]))])
    assert math.isfinite(measure(nn.Identity(), nn.Identity(), [(outputs, torch.tensor([-100, 1]))]))


def test_zrf_refuses_an_unknown_convention():
    with pytest.raises(ValueError, match="convention must be paper or release"):
        zrf(nn.Identity(), nn.Identity(), fixed((0.5, 0.5)), convention="other")


# ---- distances of parameters


def test_layer_distance():
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[3.0, 4.0]]))
        b.weight.zero_()
        a.bias.fill_(2.0)
        b.bias.fill_(1.0)
    assert layer_distance(a, b, relative=False) == {"weight": 5.0, "bias": 1.0}
    assert layer_distance(b, a) == {"weight": 1.0, "bias": 0.5}
    assert layer_distance(a, b)["weight"] == math.inf
    with pytest.raises(ValueError, match="same parameters"):
        layer_distance(a, nn.Linear(3, 1))


# ---- relearning


def line(n=20):
    x = torch.linspace(-1, 1, n).unsqueeze(1)
    return [(x, (x[:, 0] > 0).long())]


def linear(weight):
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-weight], [weight]]))
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1.0)


def test_a_metric_shows_a_bar_of_its_name_where_it_is_asked_for(capsys):
    accuracy(linear(1.0), line())
    assert "accuracy" not in capsys.readouterr().err
    accuracy(linear(1.0), line(), progress=True)
    assert "accuracy" in capsys.readouterr().err


def test_relearn_steps_by_hand():
    # Two weights (a, b), b - a = d decides. The gradient of the mean loss at d moves d by 2 g(d), the sign
    # of d is what accuracy sees: count the steps until it turns.
    model, data = linear(-0.5), line()
    x = data[0][0][:, 0].double()
    y = (x > 0).double()
    d, steps = -1.0, 0
    while d <= 0:
        d -= 2 * float(((torch.sigmoid(d * x) - y) * x).mean())
        steps += 1
    assert relearn_steps(model, data, 1.0, optimizer=sgd) == steps > 1
    assert model.weight.tolist() == [[0.5], [-0.5]]  # a copy was trained


def test_relearning_a_single_sample_leaves_the_statistics_of_batch_normalisation():
    """Of one value per channel there is no variance; of more, layers are trained as always."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    x = torch.randn(1, 2)
    data = [(x, model(x).argmin(1))]
    by_hand, steps = copy.deepcopy(model), 0
    optimizer = sgd(by_hand)
    while by_hand(x).argmax(1) != data[0][1]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(x), data[0][1]).backward()
        optimizer.step()
        steps += 1
    assert relearn_steps(model, data, 1.0, optimizer=sgd) == steps > 0

    several = [(torch.randn(6, 2), torch.tensor([0, 1] * 3))]
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(module.training))
    relearn_steps(model, several, 2.0, most=1)
    assert True in seen


def test_relearn_steps_at_once_and_never():
    assert relearn_steps(linear(1.0), line(), 1.0) == 0
    assert relearn_steps(linear(-1.0), line(), 1.0, optimizer=sgd, most=1) == math.inf
    with pytest.raises(ValueError, match="must be positive"):
        relearn_steps(linear(1.0), line(), 1.0, every=0)


def test_relearn_steps_leaves_gradients_and_random_state_alone():
    model = linear(-1.0)
    model.weight.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.no_grad():
        relearn_steps(model, line(), 1.0, optimizer=sgd, most=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.weight.grad is None


def test_anamnesis_index_is_a_ratio_of_steps():
    data, original = line(), linear(2.0)
    ours, theirs = (relearn_steps(linear(w), data, 0.95, optimizer=sgd) for w in (-0.2, -0.8))
    got = anamnesis_index(linear(-0.2), original, linear(-0.8), data, data, optimizer=sgd)
    assert got == ours / theirs < 1
    with pytest.raises(ValueError, match="must relearn"):
        anamnesis_index(linear(-0.2), original, linear(1.0), data, data)


class Normalised(nn.Module):
    """A linear model behind BatchNorm, with an integer parameter."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(1), nn.Linear(1, 2)
        self.table = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        return self.linear(self.norm(x))


def test_relearning_with_a_last_batch_of_one_and_integer_parameters():
    x, y = line(9)[0]
    data = [(x[:8], y[:8]), (x[8:], y[8:])]
    torch.manual_seed(0)
    model = Normalised()
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    # By hand: as torch trains it, but for the batch of one, which is normalised by the running statistics.
    hand = Normalised()
    hand.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD([p for p in hand.parameters() if p.requires_grad], lr=1.0)
    steps = 0
    while accuracy(hand, data) < 1:
        batch = data[steps % 2]
        hand.train()
        hand.norm.train(len(batch[0]) > 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(hand(batch[0]), batch[1]).backward()
        optimizer.step()
        steps += 1

    def floating(copy):
        return torch.optim.SGD([p for p in copy.parameters() if p.is_floating_point()], lr=1.0)

    assert relearn_steps(model, data, 1.0, optimizer=floating) == steps > 1
    assert relearn_steps(model, data, 1.0) > 1  # with the optimizer of its own
    assert model.norm.num_batches_tracked == 0


def test_relearning_refuses_what_it_cannot_train():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.arange(2), requires_grad=False)

        def forward(self, x):
            return x.expand(-1, 2) * self.table

    with pytest.raises(ValueError, match="must have a floating-point parameter"):
        relearn_steps(Table(), line(), 1.0)
    with pytest.raises(FloatingPointError, match="the loss must be finite, got nan in step 1"):
        relearn_steps(
            linear(-1.0), line(), 1.0, loss_fn=lambda model, batch: model(batch[0])[:, 0] * math.nan
        )


def test_the_seed_of_relearning_decides_the_order_of_loaders():
    x, y = line(12)[0]
    own = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 3, shuffle=True, generator=own)
    seen = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear(-5.0)

        def forward(self, x):
            seen.append(x.flatten().tolist())
            return self.inner(x)

    state, orders = own.get_state(), []
    for seed in (0, 0, 1):
        seen.clear()
        relearn_steps(Watching(), loader, 1.0, most=8, every=8, seed=seed)
        orders.append(list(seen))
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(own.get_state(), state)


# ---- membership inference


def labelled(confidences):
    """Two-class data on which the identity has these probabilities for the label, which is 0."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return [(torch.stack([p, 1 - p], dim=1).log(), torch.zeros(len(p), dtype=torch.long))]


TRAINED = labelled(np.linspace(0.95, 0.999, 60))
UNSEEN = labelled(np.linspace(0.55, 0.9, 40))


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn")


@pytest.mark.parametrize(
    "forget, ssd, salun", [(labelled([0.97, 0.98, 0.99]), 1, 0), (labelled([0.6, 0.7]), 0, 1)]
)
def test_conventions_on_separable_sets(sklearn, forget, ssd, salun):
    assert mia(nn.Identity(), TRAINED, forget, UNSEEN, "ssd", bootstrap=0).score == ssd
    assert mia(nn.Identity(), TRAINED, forget, UNSEEN, "salun", bootstrap=0).score == salun


def test_scrub_is_one_for_what_can_be_told_and_half_for_what_cannot(sklearn):
    hopeless = labelled(np.linspace(1e-4, 1e-3, 60))
    assert mia(nn.Identity(), TRAINED, TRAINED, hopeless, "scrub", bootstrap=0).score == 1
    draws = np.random.default_rng(0)
    same = [labelled(draws.uniform(0.5, 1, 2000)) for _ in range(2)]
    assert mia(nn.Identity(), TRAINED, *same, "scrub", bootstrap=0).score == pytest.approx(0.5, abs=0.04)


def test_auc_and_tpr_by_hand(sklearn):
    # Members' probabilities 0.9 0.6 0.4, others' 0.8 0.5: pairs in order 2 + 1 + 0 of 6.
    attack = mia(nn.Identity(), TRAINED, labelled([0.9, 0.6, 0.4]), labelled([0.8, 0.5]), bootstrap=0)
    assert attack.auc == pytest.approx(0.5)
    assert attack.tpr == pytest.approx(1 / 3)  # no false positive allowed among two: above 0.8
    assert all(math.isnan(bound) for bound in (*attack.auc_interval, *attack.tpr_interval))


def test_auc_against_scikit_learn(sklearn):
    from sklearn.metrics import roc_auc_score, roc_curve

    draws = np.random.default_rng(0)
    members, others = draws.normal(1, 1, 300).round(1), draws.normal(0, 1, 500).round(1)  # with ties
    truth = np.repeat([1, 0], [300, 500])
    scores = np.concatenate([members, others])
    assert attacks.auc(members, others) == pytest.approx(roc_auc_score(truth, scores))
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert attacks._tpr(members, others) == pytest.approx(tpr[fpr <= 0.01].max())


def test_bootstrap_interval_covers_and_shrinks(sklearn):
    draws = np.random.default_rng(0)

    def width(n):
        a, b = (labelled(draws.uniform(0.5, 1, n)) for _ in range(2))
        attack = mia(nn.Identity(), TRAINED, a, b, bootstrap=300)
        assert attack.auc_interval.low < attack.auc < attack.auc_interval.high
        return attack.auc_interval.high - attack.auc_interval.low

    assert width(50) > 2 * width(800)


def test_over_unlearning_is_flagged(sklearn):
    draws = np.random.default_rng(0)
    ordinary = labelled(draws.uniform(0.5, 0.9, 200))
    unseen = labelled(draws.uniform(0.5, 0.9, 200))

    def verdict(forget):
        return mia(nn.Identity(), TRAINED, forget, unseen, reference=nn.Identity()).verdict

    assert verdict(ordinary) == "like the reference"

    class Shifted(nn.Module):  # what the model does to the forget set alone
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return x + torch.tensor([self.by, 0.0]) * (len(x) == 199)

    fewer = [(ordinary[0][0][:199], ordinary[0][1][:199])]
    for by, expected in ((3.0, "still recognised"), (-3.0, "over-unlearned")):
        attack = mia(Shifted(by), TRAINED, fewer, unseen, reference=nn.Identity())
        assert attack.verdict == expected
        assert attack.reference_score is not None
    assert mia(nn.Identity(), TRAINED, fewer, unseen).verdict == "no reference"


def test_mia_says_what_is_wrong(sklearn):
    with pytest.raises(ValueError, match="convention must be one of ssd, salun, scrub"):
        mia(nn.Identity(), TRAINED, TRAINED, UNSEEN, "other")
    with pytest.raises(ValueError, match="the forget set must hold at least one"):
        mia(nn.Identity(), TRAINED, [], UNSEEN)
    with pytest.raises(ValueError, match="at least 5 samples"):
        mia(nn.Identity(), TRAINED, labelled([0.5]), UNSEEN, "scrub")


def test_the_sets_of_the_attack_are_named_and_the_older_form_keeps_its_meaning(sklearn):
    forget = labelled([0.97, 0.6, 0.7])
    named = mia(nn.Identity(), forget=forget, retain=TRAINED, test=UNSEEN, convention="salun", bootstrap=0)
    older = mia(nn.Identity(), TRAINED, forget, UNSEEN, "salun", bootstrap=0)
    mixed = mia(nn.Identity(), TRAINED, forget, test=UNSEEN, convention="salun", bootstrap=0)
    assert (named.score, named.auc, named.tpr) == (older.score, older.auc, older.tpr)
    assert (named.score, named.auc, named.tpr) == (mixed.score, mixed.auc, mixed.tpr)
    other = mia(nn.Identity(), forget=TRAINED, retain=forget, test=UNSEEN, convention="salun", bootstrap=0)
    assert other.auc != named.auc
    with pytest.raises(ValueError, match="mia: test must be given"):
        mia(nn.Identity(), forget=forget, retain=TRAINED)
    with pytest.raises(TypeError, match="mia: retain must be given once"):
        mia(nn.Identity(), TRAINED, forget, UNSEEN, retain=TRAINED)
    with pytest.raises(TypeError, match="at most 4 arguments"):
        mia(nn.Identity(), TRAINED, forget, UNSEEN, "ssd", None)


def test_mia_without_scikit_learn(monkeypatch):
    import importlib

    real = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, *rest: (
            (_ for _ in ()).throw(ImportError(name)) if name.startswith("sklearn") else real(name, *rest)
        ),
    )
    with pytest.raises(ImportError, match="pip install"):
        mia(nn.Identity(), TRAINED, TRAINED, UNSEEN)


def test_sequences_count_as_one_sample(sklearn):
    scores = torch.randn(6, 4, 3)
    labels = torch.randint(3, (6, 4))
    labels[0, 1:] = -100
    data = [(scores, labels)]
    features = attacks._features(nn.Identity(), data, "forget", Classification(), "loss", ALONE)
    assert features.loss.shape == (6,)
    expected = nn.functional.cross_entropy(scores[0, :1].double(), labels[0, :1])
    assert features.loss[0] == pytest.approx(float(expected))


# ---- accuracy


def test_accuracy_is_over_samples():
    data = [(torch.eye(3), torch.tensor([0, 1, 0])), (torch.eye(3)[:1], torch.tensor([0]))]
    assert accuracy(nn.Identity(), data) == 0.75
    with pytest.raises(ValueError, match="at least one label"):
        accuracy(nn.Identity(), [])
