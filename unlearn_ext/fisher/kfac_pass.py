"""Taking Kronecker factors: one forward and backward pass per batch, in which the layers are looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.modules import check_made, eager
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.distributed import Group, MeshRanks, Ranks, lockstep_on_mesh, ranks_of
from unlearn_ext.fisher.engine import checkpoints
from unlearn_ext.fisher.engine.sample_losses import one_alone_explained
from unlearn_ext.fisher.kfac import KroneckerFactors
from unlearn_ext.fisher.kfac_layers import Factored, Totals, why_not_factored
from unlearn_ext.resume import Progress
from unlearn_ext.tasks.base import Outputs, Task, one_per_sample
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of
from unlearn_ext.tasks.losses import LossFn, resolve

TEMPERED = "the task's loss at labels drawn from softmax(z / 2)"
TEMPERATURE = 2.0
FLAT = 100.0  # temperature at which nearly every label is drawn alike
PROBE = 3  # samples on which coverage is found out
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 0.05  # in half precision
_HALVES = (torch.float16, torch.bfloat16)


@lockstep_on_mesh
def kfac_factors(
    model: nn.Module,
    data: Batches,
    *,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    process_group: Group = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 200,
) -> KroneckerFactors:
    """Sum the Kronecker factors of every linear, convolutional and embedding layer over a data set.

        A = sum over samples and positions of a a^T         a: what the layer multiplies, 1 for the bias
        G = sum over samples of g g^T                       g: gradient of its output, summed over positions

    ``g`` is the gradient of the task's loss (the cross entropy, for classes) at labels drawn from
    ``softmax(z / 2)``. Drawn from ``softmax(z)`` they would be the true labels, for a network that knows its
    training set by heart, and ``G`` would vanish.

    Covered are ``Linear``, ``Conv1d/2d/3d``, ``ConvTranspose1d/2d/3d`` (without the bias) with any stride,
    padding, dilation and groups, ``Embedding`` and Hugging Face's ``Conv1D``; a layer that runs several times
    adds up as one with more positions. ``coverage`` names every other parameter and why it is left out: a
    weight that several layers share, that is used outside of its layer's own call, that is not trainable, or
    whose layer sees its samples mixed or not along the leading dimension. This is found out on the first
    batch, by comparing with plain autograd.

    The model runs in eval mode. Training flags, ``requires_grad``, ``.grad``, hooks, buffers and the global
    random state are as before afterwards, also after an exception.

    Args:
        model: Any model.
        data: Re-iterable batches, labels included (they tell which positions count).
        task: What the model is for; inferred, or refused, where it is not given.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``: take the gradients of this loss instead, at the
            labels there are.
        generator: For the draws. Without one the global random state is used, and put back: two calls draw
            the same labels.
        progress: Show a progress bar on a terminal, where tqdm is installed.
        process_group: Ranks that call this together, each with its own share of the data, perhaps none; the
            totals are those of all data, with the same bits on every rank. Each rank draws labels from a
            stream of its own. See ``fisher_diagonal``. None for a model that ``fully_shard`` has sharded, of
            which all ranks of its mesh call this: the factors are whole on every rank.
        checkpoint: A file for the progress of the pass, which goes on where it was interrupted; see
            ``fisher_diagonal``.
        checkpoint_every: Batches from one writing to the next.

    Returns:
        The factors, on the devices of the weights.

    Raises:
        ValueError: If ``data`` is empty or a one-shot iterator, or no layer can be covered; if ``checkpoint``
            is damaged, or of other data, weights or settings.
        NotImplementedError: Of a sharded model, if its factors would take more than 16 GiB, or ``checkpoint``
            is given.
        FloatingPointError: If an output of the model or a total is NaN or infinite.

    Source:
        Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
        2015; Grosse & Martens, ICML 2016, for convolutions, whose gradients are summed over positions as in
        the "reduce" setting of Eschenhagen et al., NeurIPS 2023; Grosse et al., "Studying Large Language
        Model Generalization with Influence Functions", 2023. The tempered labels, transposed convolutions and
        embeddings are ours.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> data = [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1]))]
        >>> factors = kfac_factors(model, data)
        >>> factors["0"].inputs
        tensor([[10., 14.,  4.],
                [14., 20.,  6.],
                [ 4.,  6.,  2.]], dtype=torch.float64)
    """
    batches = check_batches(data)
    check_made(model, "kfac_factors")
    task = resolve(task, loss_fn, who="kfac_factors")
    ranks = ranks_of(process_group, "kfac_factors")
    n_samples = 0
    watch: Watch | None = None
    gradients = TEMPERED if loss_fn is None else callable_name(loss_fn)
    if isinstance(ranks, MeshRanks):
        from unlearn_ext.fisher.kfac_sharded import sharded_factors

        if checkpoint is not None:
            raise NotImplementedError(
                "kfac_factors: checkpoint must be None for a model that fully_shard has sharded; finished "
                "factors are whole on every rank, and their save() keeps them"
            )
        own = ranks.own_generator(generator) if loss_fn is None else generator
        return sharded_factors(model, batches, task, ranks, loss_fn, own, gradients, progress=progress)
    kept = Progress(
        "kfac_factors",
        checkpoint,
        checkpoint_every,
        model=model,
        settings={"gradients": gradients, "task": repr(task)},
        ranks=ranks,
    )
    with borrowed(model):
        if loss_fn is None:
            generator = ranks.own_generator(generator)
        if kept.found is not None:
            totals, facts = kept.found
            n_samples = facts["n_samples"]
            if n_samples:
                watch = Watch(model, task, None, is_drawn=loss_fn is None)
                watch.restore(totals, facts)

        def so_far() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            totals, facts = ({}, {}) if watch is None else watch.state()
            return totals, {**facts, "n_samples": n_samples}

        reader = kept.read(
            batches,
            device_of(model),
            save=so_far,
            generator=generator if loss_fn is None else None,
            description="Kronecker factors",
            progress=progress,
        )
        with closing(reader):  # type: ignore[type-var]
            for index, batch in reader:
                n = task.count(batch)
                if n == 0:
                    continue
                if watch is None:
                    watch = Watch(model, task, batch, is_drawn=loss_fn is None)
                with watch.recording():
                    if loss_fn is None:
                        loss = _drawn_loss(model, task, batch, generator)
                    else:
                        loss = task.sample_losses(model, batch).sum()
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError(
                        f"kfac_factors: the loss must be finite, got {loss.item()} in batch {index}"
                    )
                watch.take(loss, n)
                n_samples += n
    (n_samples,) = ranks.total("samples", n_samples)
    if n_samples == 0:
        raise ValueError("kfac_factors: data must hold at least one sample, got none")
    if watch is None:  # this rank has no data, others have
        watch = Watch(model, task, None, is_drawn=loss_fn is None)
    watch.join(ranks)
    return watch.result(n_samples, gradients)


@contextmanager
def readable() -> Iterator[None]:
    """Run models so that their layers call hooks and gradients of single tensors can be asked for.

    Compiled code calls no hooks of its layers, and reentrant checkpoints refuse ``torch.autograd.grad``.

    Yields:
        Nothing.
    """
    with eager(), checkpoints.patched():
        yield


@dataclass
class WatchedLayer:
    """A layer that has factors.

    Attributes:
        name: Its name in the model.
        factored: How it multiplies.
        totals: What has been summed.
        uses: Inputs and output edges of the pass that is recorded.
    """

    name: str
    factored: Factored
    totals: Totals
    uses: list[tuple[Tensor, GradientEdge]] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters that the factors cover."""
        module = self.factored.module
        return [cast("Tensor", getattr(module, name)) for name in self.factored.parameters]


class Watch:
    """The layers of a model that have factors, and what they have shown so far.

    Args:
        model: The model, borrowed.
        task: What it is for.
        batch: Some samples, on which it is found out what can be covered; None: nothing is.
        is_drawn: Labels are drawn.

    Attributes:
        coverage: Parameter name to ``"factored"``, or to why it is left out.

    Raises:
        ValueError: If no layer can be covered.
    """

    def __init__(self, model: nn.Module, task: Task, batch: Batch | None, *, is_drawn: bool) -> None:
        self._model = model
        self._task = task
        self._layers: dict[nn.Module, WatchedLayer] = {}
        self.coverage = {name: "frozen" for name, p in model.named_parameters() if not p.requires_grad}
        known = {name for name, _ in model.named_parameters()}  # a shared one by its first name
        uses: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            uses.setdefault(id(p), []).append(name)
        inside_attention = {
            child: "MultiheadAttention multiplies by its weights without calling a layer"
            for module in model.modules()
            if isinstance(module, nn.MultiheadAttention)
            for child in module.children()
        }
        found: list[tuple[str, Factored]] = []
        for name, module in model.named_modules():
            why = inside_attention.get(module) or why_not_factored(module)
            own = {f"{name}.{n}" if name else n: p for n, p in module._parameters.items() if p is not None}
            shared = [names for p in own.values() if len(names := uses[id(p)]) > 1]
            if not why and shared:
                why = f"shared: {', '.join(shared[0])}"
            factored = None
            if own and not why:
                factored = Factored(module)
                found.append((name, factored))
            for parameter in own.keys() & known:
                is_factored = factored is not None and parameter.rpartition(".")[2] in factored.parameters
                bias = "the bias of a transposed convolution"
                self.coverage.setdefault(parameter, why or ("factored" if is_factored else bias))
        self._make(found)
        if self._layers and batch is not None:
            self._probe(batch, is_drawn)
        if not self._layers:
            told = "; ".join(sorted(set(self.coverage.values())))
            raise ValueError(f"kfac_factors: model must have a layer that can be covered, got none: {told}")

    def _make(self, found: list[tuple[str, Factored]]) -> None:
        for name, factored in found:
            self._layers[factored.module] = WatchedLayer(name, factored, factored.new_totals())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note inputs and outputs of the layers that run inside."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            inputs = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(output, Tensor) and output.requires_grad and isinstance(inputs, Tensor):
                # The edge, not the output: what is written over it later does not matter then.
                self._layers[module].uses.append((inputs.detach(), get_gradient_edge(output)))

        with ExitStack() as stack:
            stack.enter_context(readable())
            for module, layer in self._layers.items():
                layer.uses.clear()
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def take(self, loss: Tensor, n: int) -> None:
        """Add what the layers have shown.

        Args:
            loss: Of the pass that was recorded: a sum over samples.
            n: Their number.
        """
        for layer, grads in self._gradients(loss):
            sums = None
            for (inputs, _), grad in zip(layer.uses, grads, strict=True):
                if grad is None:
                    continue
                if len(grad) != n or len(inputs) != n:
                    self._drop(layer, f"its output must have {n} samples along the leading dimension")
                    break
                layer.factored.add_inputs(layer.totals, inputs)
                found = layer.factored.position_sums(inputs, grad)
                sums = found if sums is None else sums + found
            else:
                if sums is not None:
                    layer.totals.add_outputs(sums)
            layer.uses.clear()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what has been summed so far.

        Returns:
            Tensors by name, and what belongs to them.
        """
        tensors: dict[str, Tensor] = {}
        for layer in self._layers.values():
            for name, tensor in layer.totals.tensors().items():
                tensors[f"{layer.name}/{name}"] = tensor
        rows = {layer.name: layer.totals.rows for layer in self._layers.values()}
        return tensors, {"rows": rows, "coverage": self.coverage}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on with what ``state`` has returned.

        Args:
            tensors: By name.
            facts: What belongs to them.
        """
        for layer in list(self._layers.values()):
            if layer.name not in facts["rows"]:
                self._drop(layer, "")
                continue
            layer.totals.rows = facts["rows"][layer.name]
            for name, tensor in layer.totals.tensors().items():
                tensor.copy_(tensors[f"{layer.name}/{name}"])
        self.coverage = dict(facts["coverage"])

    def join(self, ranks: Ranks) -> None:
        """Add up what all ranks have seen; a layer that one has to leave out, all leave out.

        Args:
            ranks: The ranks.
        """
        if not ranks.are_many:
            return
        mine = {layer.name: layer.totals.rows for layer in self._layers.values()}
        found = ranks.exchange("layers", (mine, self.coverage))
        for layer in list(self._layers.values()):
            without = next((coverage for rows, coverage in found if layer.name not in rows), None)
            if without is not None:
                prefix = f"{layer.name}." if layer.name else ""
                self._drop(layer, without[f"{prefix}{layer.factored.parameters[0]}"])
        tensors: list[Tensor] = []
        for layer in self._layers.values():
            layer.totals.rows = sum(rows[layer.name] for rows, _ in found)
            tensors += layer.totals.tensors().values()
        ranks.sum_("totals", tensors)

    def result(self, n_samples: int, gradients: str) -> KroneckerFactors:
        """Return the totals.

        Args:
            n_samples: How many samples have been taken.
            gradients: Of which loss.

        Returns:
            The factors.

        Raises:
            ValueError: If no layer is left.
            FloatingPointError: If a total is NaN or infinite.
        """
        found = {}
        for layer in list(self._layers.values()):
            if layer.totals.rows == 0:
                self._drop(layer, "it did not run, or its output does not matter to the loss")
                continue
            pair = layer.totals.with_column(), layer.totals.outputs
            if not all(bool(torch.isfinite(total).all()) for total in pair):
                raise FloatingPointError(
                    f"kfac_factors: the factors of {layer.name} must be finite, got NaN or inf"
                )
            found[layer.name] = pair
        if not found:
            told = "; ".join(sorted(set(self.coverage.values())))
            raise ValueError(f"kfac_factors: model must have a layer that can be covered, got none: {told}")
        rows = {layer.name: layer.totals.rows for layer in self._layers.values()}
        return KroneckerFactors(found, n_samples, rows, gradients=gradients, coverage=self.coverage)

    def _gradients(self, loss: Tensor) -> Iterator[tuple[WatchedLayer, list[Tensor | None]]]:
        layers = [layer for layer in self._layers.values() if layer.uses]
        edges = [edge for layer in layers for _, edge in layer.uses]
        grads = iter(torch.autograd.grad(loss, edges, allow_unused=True) if edges else ())
        return iter([(layer, [next(grads) for _ in layer.uses]) for layer in layers])

    # Note [What a layer shows is checked]
    # That the leading dimension counts samples, that samples do not meet in the layer's gradient, that the
    # layer computes what its kind does and that nothing else uses its weight: none of it can be read off a
    # module. All of it is seen on a few samples: alone or together, the first and the last one must show the
    # same, and inputs and output gradients must make up the gradient that autograd gives the weight.
    def _probe(self, batch: Batch, is_drawn: bool) -> None:
        model, task = self._model, self._task
        n = min(PROBE, task.count(batch))
        few = task.select(batch, range(n))
        if is_drawn:
            # Nearly any label: no sample is so well known then that its gradient vanishes.
            few = _drawn(model, task, few, torch.Generator().manual_seed(0), FLAT)[1]
        # The first and the last: what comes from the first of a batch changes all samples but that one.
        single = [(task.select(few, [sample]), 1) for sample in dict.fromkeys([0, n - 1])]
        seen: list[dict[str, tuple[WatchedLayer, list[tuple[Tensor, Tensor]]]]] = []
        true: dict[str, list[Tensor | None]] = {}
        for part, count in ((few, n), *single):
            with self.recording(), one_alone_explained():
                values = task.losses(task.forward(model, part), part) if is_drawn else task.loss(model, part)
                objective = one_per_sample(values).sum()
            if not objective.requires_grad:
                raise ValueError("kfac_factors: the model's output must depend on a trainable parameter")
            if count == n and not true:
                tensors = [tensor for layer in self._layers.values() for tensor in layer.tensors]
                grads = iter(torch.autograd.grad(objective, tensors, allow_unused=True, retain_graph=True))
                true = {layer.name: [next(grads) for _ in layer.tensors] for layer in self._layers.values()}
            shown = {}
            for layer, found in self._gradients(objective):
                pairs = [(a, g) for (a, _), g in zip(layer.uses, found, strict=True) if g is not None]
                if any(len(a) != count or len(g) != count for a, g in pairs):
                    self._drop(layer, "samples do not lie along the leading dimension")
                elif pairs:
                    shown[layer.name] = (layer, pairs)
            seen.append(shown)
        together, alone, last = seen[0], seen[1], seen[-1]
        is_coarse = any(
            tensor.dtype in _HALVES for _, pairs in together.values() for pair in pairs for tensor in pair
        )  # under autocast what is float32 has been computed from less all the same
        for layer in list(self._layers.values()):
            if layer.name not in together or layer.name not in alone:
                if all(grad is None for grad in true[layer.name]):
                    continue  # it may run in another batch
                self._drop(layer, "its weight is used outside of its own call")
                continue
            pairs = together[layer.name][1]
            ends = [(0, alone[layer.name][1]), (n - 1, last.get(layer.name, (layer, []))[1])]
            if not all(_is_apart(pairs, sample, shown, is_coarse) for sample, shown in ends if shown):
                self._drop(layer, "its samples depend on each other")
            elif not _makes_up(layer, pairs, true[layer.name], is_coarse):
                self._drop(layer, "its weight is used outside of its own call, or not as its kind does")

    def _drop(self, layer: WatchedLayer, why: str) -> None:
        self._layers.pop(layer.factored.module, None)
        for name in layer.factored.parameters:
            self.coverage[f"{layer.name}.{name}" if layer.name else name] = why


def _is_apart(
    pairs: list[tuple[Tensor, Tensor]], sample: int, alone: list[tuple[Tensor, Tensor]], is_coarse: bool
) -> bool:
    # Whether a sample shows among others what it shows alone.
    if len(pairs) != len(alone):
        return False
    own = slice(sample, sample + 1)
    return all(
        close_to(a[own], a1, is_coarse) and close_to(g[own], g1, is_coarse)
        for (a, g), (a1, g1) in zip(pairs, alone, strict=True)
    )


def _makes_up(
    layer: WatchedLayer, pairs: list[tuple[Tensor, Tensor]], true: list[Tensor | None], is_coarse: bool
) -> bool:
    # Whether inputs and output gradients give the gradient of the weight.
    total: list[Tensor] = []
    for inputs, grad in pairs:
        is_autocast = grad.dtype in _HALVES and grad.dtype != layer.tensors[0].dtype
        with torch.autocast(grad.device.type, grad.dtype, is_autocast, cache_enabled=False):
            output = layer.factored.plain_call(inputs)
        if output.shape != grad.shape:
            return False
        found = torch.autograd.grad(output, layer.tensors, grad)
        total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
    return all(
        t is not None and close_to(a.to_dense(), t.to_dense(), is_coarse)
        for a, t in zip(total, true, strict=True)
    )


def close_to(a: Tensor, b: Tensor, is_coarse: bool = False) -> bool:
    """Say whether two tensors differ by rounding alone.

    Args:
        a: A tensor.
        b: Another one.
        is_coarse: Something was computed in half precision on the way.

    Returns:
        Whether they do; False where shapes differ.
    """
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _COARSE if is_coarse else _TOLERANCE.get(a.dtype, _COARSE)
    scale = max(float(a.double().norm()), float(b.double().norm()))
    return float((a.double() - b.double()).norm()) <= tolerance * scale


def _drawn(
    model: nn.Module, task: Task, batch: Batch, generator: torch.Generator | None, temperature: float
) -> tuple[Outputs, Batch]:
    outputs = task.forward(model, batch)
    return outputs, drawn_from(outputs, task, batch, generator, temperature)


def drawn_from(
    outputs: Outputs, task: Task, batch: Batch, generator: torch.Generator | None, temperature: float
) -> Batch:
    """Draw labels from the model's own distribution.

    Args:
        outputs: Of the model.
        task: The task.
        batch: What it was called with.
        generator: Draws them.
        temperature: What logits are divided by.

    Returns:
        The batch with other labels.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    with torch.no_grad():
        if not bool(torch.isfinite(task.losses(outputs, batch)).all()):
            raise FloatingPointError("kfac_factors: the loss must be finite, got NaN or infinity")
        return task.sampled(outputs, batch, generator, temperature=temperature)


def _drawn_loss(model: nn.Module, task: Task, batch: Batch, generator: torch.Generator | None) -> Tensor:
    # Sum the samples' losses at labels that are drawn from the model's own, tempered distribution.
    outputs, drawn = _drawn(model, task, batch, generator, TEMPERATURE)
    return one_per_sample(task.losses(outputs, drawn)).sum()
