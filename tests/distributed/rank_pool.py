"""Processes that run checks together: started once, given functions by name, and killed when they hang."""

import importlib
import os
import queue
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
from many import CONTEXT

LIMIT = 600.0  # only a hang takes so long; what is slow on a busy machine is no fault


def _serve(rank, world, store, inbox, outbox):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=_timeout(LIMIT)
    )
    while True:
        job = inbox.get()
        module, name, arguments = job
        torch.manual_seed(30_402_457)  # whatever was asked of these ranks before
        try:
            function = getattr(importlib.import_module(module), name)
            outbox.put((rank, "", function(*arguments)))
        except BaseException:
            outbox.put((rank, traceback.format_exc(), None))


def _timeout(seconds):
    import datetime

    return datetime.timedelta(seconds=seconds)


class RankPool:
    """A number of gloo ranks that wait for work.

    Args:
        world: How many.
    """

    def __init__(self, world):
        self.world = world
        self._start()

    def _start(self):
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._outbox = CONTEXT.Queue()
        self._inboxes = [CONTEXT.Queue() for _ in range(self.world)]
        self._processes = [
            CONTEXT.Process(target=_serve, args=(rank, self.world, store, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, module, name, *arguments, limit=LIMIT):
        """Run a function of a module on every rank; what one raises, or a hang, fails the test.

        Args:
            module: An importable module.
            name: A function in it.
            *arguments: What can be pickled.
            limit: Seconds.

        Returns:
            What the ranks returned, in their order.
        """
        for inbox in self._inboxes:
            inbox.put((module, name, arguments))
        found, errors = {}, {}
        deadline = time.monotonic() + limit
        while len(found) + len(errors) < self.world:
            # Once a rank has failed, the others may wait for it for ever.
            left = (
                min(deadline, time.monotonic() + 5) - time.monotonic()
                if errors
                else deadline - time.monotonic()
            )
            try:
                rank, error, value = self._outbox.get(timeout=max(0.01, left))
            except queue.Empty:
                break
            (errors if error else found)[rank] = error or value
        missing = [rank for rank in range(self.world) if rank not in found and rank not in errors]
        if missing:
            self._restart()
        texts = [f"rank {rank}:\n{error}" for rank, error in sorted(errors.items())]
        if missing:
            texts.append(f"ranks {missing} did not answer")
        assert not texts, "\n".join(texts)
        return [found[rank] for rank in range(self.world)]

    def _restart(self):
        self._kill()
        self._start()

    def _kill(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def close(self):
        """End the processes."""
        self._kill()
