"""Methods of this package for OpenUnlearning, a benchmark of unlearning in language models.

In its ``src/trainer/__init__.py``, beside the other trainers:

    from unlearn_ext.integrations.open_unlearning import unlearn_trainer
    _register_trainer(unlearn_trainer(UnlearnTrainer))

and as ``configs/trainer/UnlearnExt.yaml``, with ``defaults: [finetune]``:

    handler: UnlearnExt
    method_args: {method: npo, settings: {epochs: 5}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from unlearn_ext.methods import METHODS, unlearn
from unlearn_ext.tasks import CausalLM

_FIELDS = ("input_ids", "attention_mask", "labels")


def unlearn_trainer(base: type) -> type:
    """Make a trainer for OpenUnlearning's registry, which runs a method of this package in ``train``.

    Evaluation, logging and saving stay those of ``base``. The record of the run is written to
    ``unlearning_result.json`` in the output folder.

    Args:
        base: OpenUnlearning's ``UnlearnTrainer``, or any ``transformers.Trainer``.

    Returns:
        The class ``UnlearnExt``. Besides what ``base`` takes, it takes ``method``, a key of ``ux.METHODS``,
        and ``settings``, the method's keyword arguments. ``train`` raises ValueError for an unknown method,
        data without a forget and a retain set, or samples of another form, and NotImplementedError in more
        than one process.
    """

    class UnlearnExt(base):  # type: ignore[misc]
        """See ``unlearn_trainer``."""

        def __init__(
            self,
            *args: Any,  # noqa: ANN401 - of the base
            method: str = "npo",
            settings: Mapping[str, Any] | None = None,
            **kwargs: Any,  # noqa: ANN401 - of the base
        ) -> None:
            if method not in METHODS:
                raise ValueError(f"UnlearnExt: method must be one of {', '.join(METHODS)}, got {method!r}")
            super().__init__(*args, **kwargs)
            self._method, self._settings = method, dict(settings or {})

        def train(self, *_: object, **__: object) -> Any:  # noqa: ANN401 - of an optional package
            from transformers.trainer_utils import TrainOutput

            if self.accelerator.num_processes > 1:
                raise NotImplementedError(
                    f"UnlearnExt: there must be one process, got {self.accelerator.num_processes}; call "
                    "unlearn_ext with process_group from a script of your own (docs/processes.md)"
                )
            forget, retain = (self._batches(name) for name in ("forget", "retain"))
            result = unlearn(self._method, self.model, forget, retain, task=CausalLM(), **self._settings)
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "unlearning_result.json").write_text(result.to_json(), encoding="utf-8")
            facts = {"train_runtime": sum(result.seconds.values()), "changed": result.changed}
            return TrainOutput(self.state.global_step, 0.0, facts)

        def _batches(self, name: str) -> DataLoader[Any]:
            data = getattr(self.train_dataset, name, None)
            if data is None:
                raise ValueError(
                    "UnlearnExt: train_dataset must be a ForgetRetainDataset with both sets, got "
                    f"{type(self.train_dataset).__name__} without {name}"
                )
            size = self.args.per_device_train_batch_size
            return DataLoader(data, size, shuffle=True, collate_fn=_collating(self.data_collator))

    return UnlearnExt


def _collating(collate: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], dict[str, Any]]:
    # What else a sample has (its number, for one) is no argument of a model.
    def collated(samples: Sequence[Any]) -> dict[str, Any]:
        batch = collate(samples)
        missing = [name for name in ("input_ids", "labels") if name not in batch]
        if missing:
            raise ValueError(f"UnlearnExt: samples must have input_ids and labels, got {', '.join(batch)}")
        return {name: batch[name] for name in _FIELDS if name in batch}

    return collated
