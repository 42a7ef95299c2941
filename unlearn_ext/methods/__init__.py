"""Unlearning methods: functions that change a model in place and return an ``UnlearnResult``.

``METHODS[name](model, forget, retain, **settings)`` works for every one of them. Keywords mean the same
everywhere: ``task`` says what the model is for, ``loss_fn`` replaces the task's loss, ``generator`` decides
every random choice, ``progress`` shows bars, ``include`` and ``exclude`` choose what may change.
"""

from unlearn_ext.fisher.importance import Importance
from unlearn_ext.methods.baselines import finetune, gradient_ascent, neg_grad_plus, random_label, retrain
from unlearn_ext.methods.fisher_forgetting import fisher_forgetting
from unlearn_ext.methods.gradient_masking import gradient_masking, salun
from unlearn_ext.methods.msg import msg
from unlearn_ext.methods.newton import newton
from unlearn_ext.methods.pgu import forgetting_loss, pgu, pgu_from_sets
from unlearn_ext.methods.preference import gradient_difference, npo, simnpo
from unlearn_ext.methods.pruning import prune_neurons
from unlearn_ext.methods.registry import METHODS, unlearn
from unlearn_ext.methods.rmu import rmu
from unlearn_ext.methods.ssd import plan_ssd, ssd
from unlearn_ext.methods.ssd_plan import SsdPlan
from unlearn_ext.methods.ssd_sweep import Sweep, SweepRow
from unlearn_ext.methods.teachers import bad_teacher, scrub
from unlearn_ext.methods.unsir import unsir
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.batches import Batches

__all__ = [
    "METHODS",
    "Batches",
    "Importance",
    "SsdPlan",
    "Sweep",
    "SweepRow",
    "UnlearnResult",
    "bad_teacher",
    "finetune",
    "fisher_forgetting",
    "forgetting_loss",
    "gradient_ascent",
    "gradient_difference",
    "gradient_masking",
    "msg",
    "neg_grad_plus",
    "newton",
    "npo",
    "pgu",
    "pgu_from_sets",
    "plan_ssd",
    "prune_neurons",
    "random_label",
    "retrain",
    "rmu",
    "salun",
    "scrub",
    "simnpo",
    "ssd",
    "unlearn",
    "unsir",
]
