"""Random calls of every op through all doors. A million: ``make check-faults``."""

import op_fuzz
import torch


def test_random_calls_are_answered_alike_or_refused_in_the_same_words():
    wrong = []
    happened = op_fuzz.fuzz(3000, 500_000, wrong.append)
    assert not wrong
    assert happened["answered"] > 1000
    assert happened["refused"] > 500


def test_another_answer_is_seen(monkeypatch):
    def off(params, full, forget, **settings):
        torch.ops.unlearn_ext.selective_dampen_(params, full, forget, **settings)
        for tensor in params:
            tensor.mul_(1.01)

    monkeypatch.setitem(op_fuzz.KERNELS, "selective_dampen_", off)
    monkeypatch.setattr(op_fuzz, "OPS", {"selective_dampen_": op_fuzz.OPS["selective_dampen_"]})
    wrong = []
    op_fuzz.fuzz(50, 0, wrong.append)
    assert any("plain PyTorch has another answer" in text for text in wrong)


def test_another_sum_is_seen_where_terms_do_not_cancel(monkeypatch):
    def off(fisher, inputs, grads, **settings):
        torch.ops.unlearn_ext.fisher_conv_(fisher, inputs, grads, **settings)
        fisher.mul_(1.01)

    monkeypatch.setitem(op_fuzz.KERNELS, "fisher_conv_", off)
    monkeypatch.setattr(op_fuzz, "OPS", {"fisher_conv_": op_fuzz.OPS["fisher_conv_"]})
    wrong = []
    happened = op_fuzz.fuzz(100, 0, wrong.append)
    assert happened["wrong"] > 0.3 * (happened["answered"] + happened["wrong"])
