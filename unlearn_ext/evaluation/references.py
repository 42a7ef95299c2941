"""The retrained models that methods are held against."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from unlearn_ext._internal.checkpoints import stored_in
from unlearn_ext._internal.copies import copied
from unlearn_ext._internal.digests import weights_digest
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.evaluation.cache import Cache, keeping
from unlearn_ext.evaluation.keys import NoKeyError
from unlearn_ext.evaluation.metrics.measures import reason_of
from unlearn_ext.evaluation.sets import Sets
from unlearn_ext.tasks.batches import Batches

_log = logging.getLogger(__name__)


class References:
    """The retrained models, made when they are needed."""

    def __init__(
        self,
        given: nn.Module | None,
        make_model: Callable[[], nn.Module] | None,
        train: Callable[[nn.Module, Batches], object] | None,
        sets: Sets,
        cache: Cache,
        device: torch.device,
    ) -> None:
        self._given = None if given is None else copied(given).to(device)
        self._digest = weights_digest(self._given) if self._given is not None and cache.is_on else None
        self._device = device
        self._make_model = make_model
        self._train = train
        self._sets = sets
        self._cache = cache
        self._made: dict[int, tuple[nn.Module, float]] = {}
        self._failed: dict[int, str] = {}

    @property
    def story(self) -> str:
        """How the reference came about."""
        if self._given is not None:
            return "a model given by the caller"
        return "none" if self._train is None else "retrained without the forget set, once per seed"

    def key(self, seed: int) -> object:
        """Return what decides the reference of a seed.

        Args:
            seed: The seed.

        Returns:
            A value for ``keys.key``.
        """
        if self._digest is not None:
            return self._digest
        if self._train is None:
            return None
        return [self._make_model, self._train, seed]

    def recipe(self) -> dict[str, object]:
        """Return what the method ``retrain`` needs.

        Returns:
            Its settings; empty if there is no recipe.
        """
        return {} if self._train is None else {"make_model": self._make_model, "train": self._train}

    def get(self, seed: int) -> tuple[nn.Module, float | None]:
        """Return the reference of a seed, trained now if it has to be.

        Args:
            seed: The seed.

        Returns:
            The model, and the seconds that its training took; None for a model that was given.

        Raises:
            LookupError: If there is none, or its training failed.
        """
        if self._given is not None:
            return self._given, None
        if self._make_model is None or self._train is None:
            raise LookupError("there is no retrained model: give reference=, or make_model= and train=")
        if seed in self._failed:
            raise LookupError(f"retraining failed: {self._failed[seed]}")
        if seed not in self._made:
            try:
                made, seconds = self._load(seed, self._make_model) or self._retrain(
                    seed, self._make_model, self._train
                )
            except Exception as error:
                _log.debug("retraining with seed %d failed", seed, exc_info=True)
                self._failed[seed] = reason_of(error)
                raise LookupError(f"retraining failed: {self._failed[seed]}") from error
            self._made[seed] = made.to(self._device), seconds
        return self._made[seed]

    def _retrain(
        self,
        seed: int,
        make_model: Callable[[], nn.Module],
        train: Callable[[nn.Module, Batches], object],
    ) -> tuple[nn.Module, float]:
        # Before training, which may change what the key is made of.
        path = self._path(seed)
        with seeded(seed, *self._sets.all.values()):
            started = time.perf_counter()
            made = make_model().to(self._device)
            made.train()
            returned = train(made, self._sets.all["retain"])
            seconds = time.perf_counter() - started
        trained = returned if isinstance(returned, nn.Module) else made
        if path is not None:
            with keeping(path) as draft:
                torch.save({"weights": trained.state_dict(), "seconds": seconds}, draft)
        return trained, seconds

    def _load(self, seed: int, make_model: Callable[[], nn.Module]) -> tuple[nn.Module, float] | None:
        path = self._path(seed)
        if path is None or not path.exists():
            return None
        try:
            stored = stored_in(path)
            with seeded(seed):
                loaded = make_model()
            loaded.load_state_dict(stored["weights"])
            seconds = float(stored["seconds"])
        except Exception:  # cut short, damaged, or of another architecture: train again
            _log.info("%s cannot be used; training again", path, exc_info=True)
            return None
        return loaded, seconds

    def _path(self, seed: int) -> Path | None:
        facts = {"reference": self.key(seed), "data": self._sets.fingerprints["retain"]}
        try:
            return self._cache.path("retrained", ".pt", **facts)
        except NoKeyError:
            return None
