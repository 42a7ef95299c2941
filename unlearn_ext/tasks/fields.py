"""Where a batch keeps the inputs and the labels, and how they are handed to the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from unlearn_ext.tasks.batches import Batch

Path: TypeAlias = int | str | tuple[int | str, ...]
Inputs: TypeAlias = str | int | Sequence[Path] | Callable[[Any], Any] | None
Labels: TypeAlias = Path | Callable[[Any], Tensor] | None

_DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}
_OUTPUT_KEYS = ("logits", "out")  # of transformers, of torchvision's segmentation models


def entry(batch: Any, path: Path) -> Any:  # noqa: ANN401 - any nesting of anything
    """Follow a path into a batch.

    Args:
        batch: Tuples, lists and mappings.
        path: A position or key, or several, from the outside in.

    Returns:
        What lies there.

    Raises:
        LookupError: If nothing does.
    """
    for step in path if isinstance(path, tuple) else (path,):
        try:
            batch = batch[step]
        except (IndexError, KeyError, TypeError) as error:
            raise LookupError(f"there is no {step!r} in {described(batch)}") from error
    return batch


def with_entry(batch: Any, path: Path, value: object) -> Any:  # noqa: ANN401
    """Return a batch with another entry; the batch itself is left alone.

    Args:
        batch: Tuples, lists and mappings.
        path: As for ``entry``.
        value: What to put there.

    Returns:
        A batch of the same form; mappings come back as plain dictionaries.
    """
    step, *rest = path if isinstance(path, tuple) else (path,)
    inner = with_entry(batch[step], tuple(rest), value) if rest else value
    if isinstance(batch, Mapping):
        return {**batch, step: inner}
    replaced = list(batch)
    replaced[cast("int", step)] = inner
    if isinstance(batch, tuple):
        return type(batch)(*replaced) if hasattr(batch, "_fields") else tuple(replaced)
    return replaced


def described(value: object) -> str:
    """Describe a batch, or an entry of one, for a message.

    Args:
        value: Anything.

    Returns:
        Kinds and shapes, such as ``(float32 [4, 3], int64 [4])``.

    Example:
        >>> described((torch.zeros(4, 3), {"ids": torch.zeros(4, dtype=torch.long)}))
        '(float32 [4, 3], {ids: int64 [4]})'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        shown = [described(part) for part in value[:4]] + (["..."] if len(value) > 4 else [])
        return opening + ", ".join(shown) + closing
    return type(value).__name__


class Fields:
    """Which entries of a batch are the model's inputs, and which are the labels.

    Args:
        inputs: Keys of a mapping, as one string or several; positions of a tuple, or paths such as ``(0, 1)``
            inside a sequence of paths; or a function of the batch that returns what the model is called with:
            a tuple of arguments, a mapping of keyword arguments, or the only argument. None: the first entry
            of a tuple, and of a mapping all but the labels.
        labels: Key, position or path of the labels, or a function of the batch. None: ``"labels"`` of a
            mapping; of a tuple the entry after the inputs.
    """

    def __init__(self, inputs: Inputs = None, labels: Labels = None) -> None:
        if isinstance(inputs, str):
            inputs = tuple(inputs.split())
        elif isinstance(inputs, int):
            inputs = (inputs,)
        elif inputs is not None and not callable(inputs):
            inputs = tuple(inputs)
        if isinstance(inputs, tuple) and not inputs:
            raise ValueError("inputs must name at least one entry of a batch, got none")
        self.inputs = inputs
        self.labels = tuple(labels) if isinstance(labels, list) else labels

    def _key(self) -> tuple[object, ...]:
        return self.inputs, self.labels

    def labels_of(self, batch: Batch) -> Tensor:
        """Return the labels of a batch.

        Args:
            batch: A batch.

        Returns:
            The labels, as they are.

        Raises:
            ValueError: If there are none.
        """
        if callable(self.labels):
            found: object = self.labels(batch)
        else:
            try:
                found = entry(batch, self.labels_path(batch))
            except LookupError:
                found = None
        if not isinstance(found, Tensor):
            raise ValueError(self._no_labels(batch))
        return found

    def with_labels(self, batch: Batch, labels: Tensor) -> Batch:
        """Return the batch with other labels; the batch itself is left alone.

        Args:
            batch: A batch that holds labels.
            labels: What to put in their place.

        Returns:
            A batch of the same form.

        Raises:
            ValueError: If labels are found by a function, which does not say where they lie.
        """
        if callable(self.labels):
            raise ValueError(
                "labels must be a key or a position where labels are replaced, got a function; or override "
                "the task's with_labels"
            )
        return cast("Batch", with_entry(batch, self.labels_path(batch), labels))

    def labels_path(self, batch: Batch) -> Path:
        """Say where the labels of a batch lie.

        Args:
            batch: A batch.

        Returns:
            A key, a position or a path.
        """
        if self.labels is not None:
            return cast("Path", self.labels)
        if isinstance(batch, Mapping):
            return "label" if "labels" not in batch and "label" in batch else "labels"
        if isinstance(self.inputs, tuple):
            first = [path[0] if isinstance(path, tuple) else path for path in self.inputs]
            return 1 + max([position for position in first if isinstance(position, int)], default=0)
        return 1

    def call(self, model: nn.Module, batch: Batch) -> Any:  # noqa: ANN401 - what the user's model returns
        """Call the model on a batch.

        An encoder-decoder model that gets no ``decoder_input_ids`` derives them from the labels: it is asked
        for them, or where it has no method for that, given the labels too.

        Args:
            model: The model.
            batch: A batch, on the model's device.

        Returns:
            Whatever the model returns.

        Raises:
            ValueError: If the batch lacks an input.
        """
        if callable(self.inputs):
            made = self.inputs(batch)
            if isinstance(made, Mapping):
                return model(**made)
            return model(*made) if isinstance(made, tuple) else model(made)
        if isinstance(self.inputs, tuple):
            try:
                parts = [entry(batch, path) for path in self.inputs]
            except LookupError as error:
                raise ValueError(f"inputs must name entries of the batch: {error}") from error
            if isinstance(batch, Mapping) and all(isinstance(path, str) for path in self.inputs):
                named = dict(zip(cast("tuple[str, ...]", self.inputs), parts, strict=True))
                more = self._for_decoder(model, batch)
                return _called(
                    model, {**named, **({"labels": self.labels_of(batch)} if more is None else more)}
                )
            return model(*parts)
        if isinstance(batch, Mapping):
            held_back = self.labels_path(batch) if not callable(self.labels) else None
            if held_back == "input_ids":  # labels and inputs at once
                held_back = "labels"
            more = self._for_decoder(model, batch)
            given = {key: value for key, value in batch.items() if key != held_back or more is None}
            return _called(model, {**given, **(more or {})})
        if type(batch[0]).__module__ == "numpy":
            raise ValueError(
                f"inputs must be tensors, got {described(batch)}; arrays become tensors by torch.as_tensor"
            )
        return model(batch[0])

    def _for_decoder(self, model: nn.Module, batch: Mapping[str, object]) -> dict[str, Tensor] | None:
        # What the decoder reads where the batch does not hold it; None if only the model can tell.
        if not is_encoder_decoder(model) or not _DECODER_INPUTS.isdisjoint(batch):
            return {}
        derive = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if derive is None:
            return None
        try:
            labels = self.labels_of(batch)
        except ValueError:  # there are none
            return None
        # Given labels, models would compute a mean loss of their own, which nobody looks at.
        return {"decoder_input_ids": derive(labels)}

    def _no_labels(self, batch: object) -> str:
        if callable(self.labels):
            return f"labels must return a tensor, got none for {described(batch)}"
        if self.labels is not None:
            return f"labels must name a tensor of the batch, got {self.labels!r} for {described(batch)}"
        if isinstance(batch, Mapping):
            return (
                f"a mapping must hold the tensor 'labels', got the keys {list(batch)}; another key is named "
                "by task=, such as ux.tasks.Classification(labels='label')"
            )
        return (
            f"a batch must hold (inputs, targets) with targets a tensor, got {described(batch)}; other "
            "places are named by task=, such as ux.tasks.Classification(inputs=(0, 1), labels=2)"
        )


def _called(model: nn.Module, given: Mapping[str, Any]) -> Any:  # noqa: ANN401 - what the model returns
    try:
        return model(**given)
    except TypeError as error:
        signature = _signature_without(model, given)
        if signature is None:
            raise
        raise ValueError(
            f"the model must take the entries of a mapping by name, got {described(given)} for "
            f"forward{signature}; say which are inputs: task=ux.tasks.Classification(inputs=lambda "
            "batch: batch['x'], labels='y'), or another task"
        ) from error


def _signature_without(model: nn.Module, given: Mapping[str, Any]) -> inspect.Signature | None:
    # The signature of a model that does not take these names, if it has one.
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(**given)
    except TypeError:
        return signature
    return None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Say whether a Hugging Face model has an encoder and a decoder.

    Args:
        model: Any model.

    Returns:
        What its ``config`` says; False without one.
    """
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def logits_in(output: object) -> Tensor:
    """Find the logits in what a model has returned.

    Args:
        output: A tensor, an object or mapping with ``logits``, a mapping with ``out``, or a tuple that starts
            with them.

    Returns:
        The logits, float32 for half-precision models.

    Raises:
        TypeError: If there are none.
    """
    found: object = output
    if hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, Mapping):
        found = next((output[key] for key in _OUTPUT_KEYS if key in output), None)
    elif isinstance(output, tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model must return logits, got {type(output).__name__}; a task's forward says where they are"
        )
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found
