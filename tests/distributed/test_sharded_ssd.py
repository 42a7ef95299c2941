"""Selective synaptic dampening and stored importances of models that FSDP2 has sharded."""

import torch
from sharded_models import small

import unlearn_ext as ux

CHECKS = "sharded_ssd"


def test_a_plan_is_that_of_the_whole_model_and_can_be_undone(two_ranks):
    two_ranks.run(CHECKS, "plan")


def test_the_closed_loop(two_ranks):
    one, other = two_ranks.run(CHECKS, "loop")
    assert one == other


def test_a_function_decides_for_all_ranks_together(two_ranks):
    one, other = two_ranks.run(CHECKS, "judged_by_a_function")
    assert one == other


def test_in_one_call(two_ranks):
    two_ranks.run(CHECKS, "at_once")


def test_scores_and_masks(two_ranks):
    two_ranks.run(CHECKS, "masks")


def test_importances_go_through_distributed_checkpoints(two_ranks, tmp_path):
    import torch.distributed.checkpoint as checkpoint

    folder = str(tmp_path / "saved")
    values, facts = two_ranks.run(CHECKS, "stored", folder)[0]
    loaded = ux.Importance.like(small())
    checkpoint.load({"importance": loaded}, checkpoint_id=folder, no_dist=True)
    assert loaded._facts() == facts
    for name, tensor in loaded.items():
        assert torch.equal(tensor, torch.tensor(values[name]))
