"""Models with adapters of PEFT: which parameters a call is about, and what is measured and changed then."""

import copy
import warnings

import pytest
import torch
from language_models import batch_for, decoder_batch, make, packed_batch, tokens
from torch import nn

import unlearn_ext as ux

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(kind="LoRA", name="Llama", dtype=torch.float32, **settings):
    """A model whose adapters have an effect, and the frozen weights as they are after loading."""
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **KINDS[kind], **settings}
    model = peft.get_peft_model(make(name), peft.LoraConfig(**options)).to(dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key or "modules_to_save" in key:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return model.eval()


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def plainly(name):
    """The name that a parameter has when the adapters have been merged."""
    return (
        name.removeprefix("base_model.model.")
        .replace(".base_layer", "")
        .replace(".modules_to_save.default", "")
    )


def by_hand(model, batch, names):
    """Squared gradients of single samples, of any parameters."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    task, n = ux.tasks.CausalLM(), len(batch["labels"])
    totals = {name: 0.0 for name in names}
    for sample in range(n):
        one = {key: value[sample : sample + 1] for key, value in batch.items()}
        grads = torch.autograd.grad(task.loss(model, one).sum(), [parameters[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            totals[name] = totals[name] + grad.square() / n
    return totals


def largest_error(found, expected):
    assert set(found) == set(expected)
    return max(float((found[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_importances_of_adapters(kind):
    model, batch = adapted(kind), decoder_batch()
    before = flags(model)
    found = ux.fisher_diagonal(model, [batch], params="adapters")
    wanted = [name for name, trained in before.items() if trained]
    assert list(found) == wanted
    assert any("modules_to_save" in name for name in found) == (kind == "head")
    assert set(found.coverage.values()) == {"fused"}
    assert largest_error(found, by_hand(model, batch, wanted)) < 1e-5
    assert flags(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_importances_of_frozen_weights(kind):
    model, batch = adapted(kind), decoder_batch()
    before = flags(model)
    found = ux.fisher_diagonal(model, [batch], params="base")
    wanted = [name for name, trained in before.items() if not trained and "original_module" not in name]
    assert list(found) == wanted
    assert set(found.coverage.values()) == {"fused"}
    assert largest_error(found, by_hand(model, batch, wanted)) < 1e-5
    assert flags(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "kind, dtype, tolerance",
    [
        ("LoRA", torch.float64, 1e-12),
        ("LoRA", torch.float32, 5e-6),
        ("rsLoRA", torch.float64, 1e-12),
        ("head", torch.float64, 1e-12),
    ],
)
def test_frozen_weights_matter_as_merged_ones(kind, dtype, tolerance):
    model, batch = adapted(kind, dtype=dtype), decoder_batch()
    found = ux.fisher_diagonal(model, [batch], params="base")
    trained = ux.fisher_diagonal(model, [batch], params="adapters")
    found = dict(found) | {name: value for name, value in trained.items() if "modules_to_save" in name}
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    inside = ux.fisher_diagonal(merged, [batch], params="base")
    inside = dict(inside) | {name: value for name, value in found.items() if "modules_to_save" in name}
    assert largest_error(found, inside) < tolerance
    unloaded = ux.fisher_diagonal(model.merge_and_unload(), [batch], params="base")
    assert largest_error({plainly(name): value for name, value in found.items()}, unloaded) < tolerance


def test_several_adapters():
    model, batch = adapted(), decoder_batch()
    torch.manual_seed(1)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    first = ux.fisher_diagonal(model, [batch], params="adapters")
    assert all(".default." in name for name in first)
    model.set_adapter("other")
    second = ux.fisher_diagonal(model, [batch], params="adapters")
    assert list(second) == [name for name, _ in model.named_parameters() if ".other." in name]
    base = ux.fisher_diagonal(model, [batch], params="base")
    assert not any("lora" in name for name in base)


def test_adapters_without_the_wrapper():
    model, batch = make("GPT2"), batch_for("GPT2")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(config, model).eval()
    found = ux.fisher_diagonal(model, [batch], params="adapters")
    assert list(found) == [name for name, _ in model.named_parameters() if "lora" in name]
    assert len(found) == 4
    assert len(ux.fisher_diagonal(model, [batch], params="base")) == len(
        dict(make("GPT2").named_parameters())
    )


def test_prompts_are_adapters():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(make("Llama"), config).eval()
    model.config.use_cache = False

    def loss(model, batch):
        return ux.tasks.CausalLM().losses(model(batch["input_ids"]).logits[:, 2:], batch)

    batch = {"input_ids": tokens(3, 5), "labels": tokens(3, 5)}
    found = ux.fisher_diagonal(model, [batch], loss_fn=loss, params="adapters")
    assert [tuple(value.shape) for value in found.values()] == [(2, 16)]
    assert float(next(iter(found.values())).sum()) > 0


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    "make_model, params, message",
    [
        (lambda: merged(adapted()), "adapters", r"q_proj, which is merged; call unmerge_adapter\(\) first"),
        (lambda: disabled(adapted()), "adapters", "q_proj, which is disabled; enable the adapters first"),
        (lambda: make("Llama"), "adapters", "must find adapters of PEFT in the model, got none"),
        (lambda: adapted(), ["base_model.model.lm_head.weight"], "must name trainable parameters"),
        (lambda: adapted(), [], "must name at least one parameter"),
    ],
)
def test_what_cannot_be_chosen(make_model, params, message):
    model = make_model()
    before = flags(model)
    with pytest.raises(ValueError, match=message):
        ux.fisher_diagonal(model, [decoder_batch()], params=params)
    with pytest.raises(ValueError, match=message):
        ux.ssd(model, [decoder_batch()], [packed_batch()], alpha=1.0, params=params)
    assert flags(model) == before


def test_a_parameter_of_that_name():
    model = nn.Module()
    model.base = nn.Parameter(torch.ones(2, 3))
    model.forward = lambda x: x @ model.base.T
    batch = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"could be meant just as well; pass \['base'\]"):
        ux.fisher_diagonal(model, [batch], params="base")
    assert list(ux.fisher_diagonal(model, [batch], params=["base"])) == ["base"]


def test_quantised_weights_are_refused_by_name():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    layer.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"gate_proj.weight must be floating point, got torch.uint8.*quantised"
    ):
        ux.fisher_diagonal(model, [decoder_batch()], params="base")
    with pytest.raises(TypeError, match=r"gate_proj.weight must be floating point"):
        ux.plan_ssd(model, [decoder_batch()], [packed_batch()], alpha=1.0, params="base")


def test_a_model_that_is_not_in_memory_is_refused_by_name():
    model = adapted()
    model.base_model.model.model.layers[0].mlp.gate_proj.to("meta")
    with pytest.raises(NotImplementedError, match=r"gate_proj.weight.*meta"):
        ux.fisher_diagonal(model, [decoder_batch()], params="base")


# Methods: what they change, and that nothing else does.

FORGET = [{k: v for k, v in decoder_batch().items() if k != "position_ids"}]
RETAIN = [{"input_ids": tokens(6, 8, seed=5), "labels": tokens(6, 8, seed=5)}]


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def values_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_adapter(name):
    return "lora" in name or "modules_to_save" in name


@pytest.mark.parametrize("params", ["adapters", "base"])
def test_ssd_keeps_to_a_part(params):
    model = adapted("head")
    before, flagged = values_of(model), flags(model)
    plan = ux.plan_ssd(model, FORGET, RETAIN, alpha=1.0, params=params)
    assert flags(model) == flagged
    result = plan.apply()
    assert result.hyperparameters["params"] == params
    touched = changed(model, before)
    assert touched
    assert all(is_adapter(name) == (params == "adapters") for name in touched)
    plan.revert()
    assert not changed(model, before)


def test_ssd_on_frozen_weights_is_ssd_on_merged_ones_importance_for_importance():
    model = adapted(dtype=torch.float64)
    plan = ux.plan_ssd(model, FORGET, RETAIN, alpha=1.0, params="base")
    other = ux.plan_ssd(copy.deepcopy(model).merge_and_unload(), FORGET, RETAIN, alpha=1.0, params="base")
    for mine, theirs in (
        (plan.importance_forget, other.importance_forget),
        (plan.importance_full, other.importance_full),
    ):
        assert largest_error({plainly(k): v for k, v in mine.items()}, theirs) < 1e-12


def test_ssd_shrinks_the_factors_of_a_product_by_themselves():
    model = adapted()
    before = values_of(model)
    ux.ssd(model, FORGET, RETAIN, alpha=0.5, params="adapters", include="lora_A.default")
    touched = changed(model, before)
    assert touched
    assert all("lora_A" in name for name in touched)


def test_patterns():
    model = make("Llama")
    names = list(dict(model.named_parameters()))
    found = ux.fisher_diagonal(model, FORGET, include=["q_proj", "lm_head"])
    assert list(found) == [name for name in names if "q_proj" in name or "lm_head" in name]
    found = ux.fisher_diagonal(model, FORGET, include=r"model\.layers\.1\..*", exclude="*norm.weight")
    assert list(found) == [name for name in names if "layers.1." in name and "norm" not in name]
    whole = ux.fisher_diagonal(model, FORGET)
    assert all(torch.allclose(found[name], whole[name], rtol=1e-4, atol=1e-9) for name in found)
    with pytest.raises(ValueError, match="include and exclude must leave a parameter"):
        ux.fisher_diagonal(model, FORGET, include="nothing")
    scores = ux.saliency(model, FORGET, score="fisher", params=names[:3], exclude=names[0])
    assert list(scores) == names[1:3]


def test_stored_importances_are_cut_down():
    model = make("Llama")
    stored = ux.fisher_diagonal(model, [*FORGET, *RETAIN])
    before = values_of(model)
    ux.ssd(model, FORGET, importance=stored, alpha=1.0, include="q_proj")
    touched = changed(model, before)
    assert touched
    assert all("q_proj" in name for name in touched)
    part = ux.fisher_diagonal(model, [*FORGET, *RETAIN], include="q_proj")
    with pytest.raises(ValueError, match=r"importance must hold importances of .* got none of .*lm_head"):
        ux.plan_ssd(model, FORGET, importance=part, alpha=1.0, include=["q_proj", "lm_head"])


def test_saliency_of_frozen_weights():
    model = adapted()
    flagged = flags(model)
    scores = ux.saliency(model, FORGET, RETAIN, params="base", include="down_proj.base_layer")
    assert len(scores) == 2
    assert flags(model) == flagged
    scores = ux.saliency(model, FORGET, score="taylor", params="adapters")
    assert list(scores) == [name for name, trained in flagged.items() if trained]


def newton(model, **settings):
    """``ux.newton`` with a goal that any step reaches, whatever it costs."""
    asked = iter([False])  # before the first step
    budgets = dict.fromkeys(("budget", "validation_budget", "class_budget"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ux.newton(
            model,
            FORGET,
            RETAIN,
            validation=RETAIN,
            until=lambda _: next(asked, True),
            loss_fn=ux.losses.cross_entropy,
            **budgets,
            **settings,
        )


@pytest.mark.parametrize("params", ["adapters", "base"])
def test_newton_keeps_to_a_part(params):
    model = adapted()
    before, flagged = values_of(model), flags(model)
    newton(model, params=params)
    touched = changed(model, before)
    assert touched
    assert all(is_adapter(name) == (params == "adapters") for name in touched)
    assert flags(model) == flagged


def test_newton_takes_chosen_layers_of_stored_factors():
    model = make("Llama")
    before, factors = values_of(model), ux.kfac_factors(model, RETAIN)
    newton(model, factors=factors, include=["gate_proj", "up_proj"])
    assert {name.split(".")[-2] for name in changed(model, before)} == {"gate_proj", "up_proj"}
    with pytest.raises(ValueError, match="must leave a whole layer with factors"):
        newton(make("Llama"), factors=factors, include="norm")


@pytest.mark.parametrize("params, is_frozen", [("adapters", False), ("base", False), ("base", True)])
def test_pgu_keeps_to_a_part(params, is_frozen):
    """Adapters that were loaded for inference are frozen, like all else: the base can be chosen still."""
    model = adapted()
    if is_frozen:
        model.requires_grad_(False)
    before, flagged = values_of(model), flags(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ux.pgu(model, FORGET, RETAIN, epochs=1, until=None, energy=0.5, params=params, exclude="embed_tokens")
    touched = changed(model, before)
    assert touched
    assert all(is_adapter(name) == (params == "adapters") for name in touched)
    assert flags(model) == flagged


def test_msg_keeps_to_a_part():
    model = adapted()
    before, flagged = values_of(model), flags(model)
    ux.methods.msg(model, FORGET, RETAIN, epochs=1, params="adapters", exclude="down_proj.*")
    ux.methods.msg(model, FORGET, RETAIN, epochs=1, params="adapters", include=r".*lora_A.*")
    touched = changed(model, before)
    assert touched
    assert all("lora" in name for name in touched)
    assert flags(model) == flagged
