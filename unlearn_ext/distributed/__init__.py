"""Many processes of one job.

fsdp      models that ``fully_shard`` has sharded: gathered parameters, and what is sharded like them
"""
