"""Many processes of one job: sums over their shards of the data, and what they must agree on.

    group     the ranks of a process group: what they tell each other, and that all fail where one does
    reduce    sums over the ranks that have the same bits on every rank and in every run
    agree     the face of a function that takes ``process_group``: same model, same settings, same outcome
    shards    every rank its own batches of one loader
    fsdp      models that ``fully_shard`` has sharded: gathered parameters, and what is sharded like them;
              ``fsdp_steps`` has the batches that their ranks read in step, ``mesh`` the ranks themselves,
              ``forward`` what can be told of a pass that fails on one of them

Nothing here starts processes or schedules anything: ``torchrun`` and ``torch.distributed`` do.
"""

from unlearn_ext.distributed.agree import lockstep, lockstep_on_mesh, lockstep_or_sharded
from unlearn_ext.distributed.group import ALONE, Group, Ranks, ranks_of
from unlearn_ext.distributed.mesh import MeshRanks
from unlearn_ext.distributed.shards import Shards, shard_batches

__all__ = [
    "ALONE",
    "Group",
    "MeshRanks",
    "Ranks",
    "Shards",
    "lockstep",
    "lockstep_on_mesh",
    "lockstep_or_sharded",
    "ranks_of",
    "shard_batches",
]
