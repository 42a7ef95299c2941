"""Calls to be disturbed: every method, every pass, every writer."""

from fault_models import POINTS, Marked, sets

import unlearn_ext as ux

QUICK = {
    "ssd": {},
    "gradient_masking": {"epochs": 1},
    "salun": {"epochs": 1},
    "pgu": {"epochs": 1},
    "unsir": {"noise_batch": 4, "noise_steps": 2, "repair_steps_min": 2},
    "finetune": {"epochs": 1},
    "gradient_ascent": {"epochs": 1},
    "neg_grad_plus": {"epochs": 1},
    "random_label": {"epochs": 1},
    "bad_teacher": {"epochs": 1},
    "scrub": {"epochs": 1},
    "fisher_forgetting": {},
    "newton": {"rounds": 1, "budget": 1.0, "validation_budget": 1.0, "class_budget": 1.0, "validated": True},
    "msg": {"epochs": 1},
    "gradient_difference": {"epochs": 1},
    "npo": {"epochs": 1},
    "simnpo": {"epochs": 1},
}


def _method(name):
    def call(model, folder):
        forget, retain = sets()
        settings = dict(QUICK[name])
        if settings.pop("validated", False):
            settings["validation"] = retain
        return ux.unlearn(name, model, forget, retain, task=Marked(), **settings)

    return call


def _plan(model, folder):
    forget, retain = sets()
    plan = ux.plan_ssd(model, forget, retain, task=Marked())
    plan.apply()
    try:
        plan.revert()
    except BaseException:  # the plan is still applied then, and can be reverted
        plan.revert()
        raise
    return plan


def _fisher(**settings):
    def call(model, folder):
        return ux.fisher_diagonal(model, sets()[1], task=Marked(), **settings)

    return call


def _compare(model, folder):
    forget, retain = sets()
    return ux.compare(
        model, forget, retain, retain, methods=["finetune"], metrics=("retain", "forget"), task=Marked()
    )


def _saved(make):
    def call(model, folder):
        POINTS("write")
        made = make(model, folder)
        made.save(folder / "kept.safetensors")

    return call


SUBJECTS = {
    **{name: _method(name) for name in QUICK},
    "plan_ssd, apply, revert": _plan,
    "fisher_diagonal": _fisher(),
    "fisher_diagonal, mc": _fisher(estimator="mc", generator=None),
    "fisher_diagonal, batch": _fisher(estimator="batch"),
    "fisher_diagonal, checkpoint": lambda model, folder: ux.fisher_diagonal(
        model, sets()[1], task=Marked(), checkpoint=folder / "pass.safetensors", checkpoint_every=1
    ),
    "kfac_factors": lambda model, folder: ux.kfac_factors(model, sets()[1], task=Marked()),
    "activation_gram": lambda model, folder: ux.activation_gram(model, sets()[1], task=Marked()),
    "saliency": lambda model, folder: ux.saliency(model, *sets(), task=Marked()),
    "prune_neurons": lambda model, folder: ux.prune_neurons(
        model, ux.saliency(model, sets()[1], score="obd", task=Marked()), 0.2
    ),
    "accuracy": lambda model, folder: ux.metrics.accuracy(model, sets()[0], task=Marked()),
    "compare": _compare,
    "Importance.save": _saved(lambda model, folder: _fisher()(model, folder)),
    "KroneckerFactors.save": _saved(lambda model, folder: ux.kfac_factors(model, sets()[1], task=Marked())),
    "ActivationGram.save": _saved(lambda model, folder: ux.activation_gram(model, sets()[1], task=Marked())),
}
