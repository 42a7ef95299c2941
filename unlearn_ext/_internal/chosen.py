"""Which parameters a call is about: by name, by pattern, or as a part of a model with adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, TypeAlias

from torch import Tensor, nn

from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.names import chosen_names, parameters_by_name, plain_name
from unlearn_ext._internal.undo import Undone

Params: TypeAlias = str | Iterable[str] | None
Patterns: TypeAlias = str | Iterable[str] | None

_PARTS = ("adapters", "base")


def chosen_parameters(
    model: nn.Module, who: str, params: Params = None, include: Patterns = None, exclude: Patterns = None
) -> dict[str, nn.Parameter]:
    """Return the parameters that a call is about.

    Args:
        model: The model, perhaps with adapters of PEFT.
        who: Whose message it is.
        params: Names of trainable parameters; ``"adapters"`` for those of the active adapters, with the
            modules that are trained and saved beside them; ``"base"`` for all that belongs to no adapter,
            frozen or not. None: all trainable ones.
        include: Patterns of those to take of these; see ``chosen_names``.
        exclude: Patterns of those to leave out.

    Returns:
        Plain name to parameter, in the model's order, at least one.

    Raises:
        ValueError: If nothing is left, a name is unknown or that of a frozen parameter, or adapters are
            asked for where there are none, or none that the forward pass uses.
    """
    parameters = parameters_by_name(model)
    if isinstance(params, str) and params in _PARTS:
        if params in parameters:
            raise ValueError(
                f"{who}: params must not be {params!r} for a model with a parameter of that name, which "
                f"could be meant just as well; pass [{params!r}] for that one"
            )
        found = _part_of(model, who, params, parameters)
    else:
        found = _trainable(who, params, parameters)
    return {name: found[name] for name in chosen_names(found, include, exclude, who)}


@contextmanager
def only_trainable(model: nn.Module, names: Iterable[str] | None) -> Iterator[None]:
    """Let some parameters be the trainable ones, and put ``requires_grad`` back afterwards.

    Args:
        model: The model.
        names: Plain names; None leaves everything as it is.

    Yields:
        Nothing.
    """
    if names is None:
        yield
        return
    chosen = set(names)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def put_back() -> None:
        for parameter, flag in before.items():
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    with Undone(put_back):
        for name, parameter in parameters_by_name(model).items():
            if parameter.requires_grad != (name in chosen):
                parameter.requires_grad_(name in chosen)
        yield


@contextmanager
def restricted(
    model: nn.Module,
    who: str,
    may_be_sharded: bool = False,
    /,
    params: Params = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Iterator[list[str] | None]:
    """Let the parameters that a call is about be the only trainable ones for its time.

    Args:
        model: The model.
        who: Whose message it is.
        may_be_sharded: See ``check_model``.
        params: See ``chosen_parameters``.
        include: See ``chosen_parameters``.
        exclude: See ``chosen_parameters``.

    Yields:
        Their names; None where nothing was asked for, and nothing is changed.

    Raises:
        ValueError: As ``chosen_parameters``.
        TypeError: If one is not floating point, as weights of a quantised model are.
    """
    if params is None and include is None and exclude is None:
        yield None
        return
    check_model(model, who, may_be_sharded=may_be_sharded)
    chosen = chosen_parameters(model, who, params, include, exclude)
    check_floating(chosen, who)
    with only_trainable(model, chosen):
        yield list(chosen)


def choice(params: Params, include: Patterns, exclude: Patterns) -> dict[str, Any]:
    """Collect what was asked for, for ``restricted`` and for the record of a run.

    Args:
        params: What the user passed.
        include: What the user passed.
        exclude: What the user passed.

    Returns:
        Argument to value, of those that are not None.
    """
    given = {"params": params, "include": include, "exclude": exclude}
    return {
        name: value if isinstance(value, str) else list(value)
        for name, value in given.items()
        if value is not None
    }


def check_floating(parameters: dict[str, nn.Parameter], who: str) -> None:
    """Refuse parameters that have no gradients.

    Args:
        parameters: Name to parameter.
        who: Whose message it is.

    Raises:
        TypeError: If one is not floating point.
    """
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise TypeError(
                f"{who}: {name} must be floating point, got {parameter.dtype}; keep its real and imaginary "
                "parts as one real parameter and use torch.view_as_complex of it, or leave it out by exclude"
            )
        if not parameter.is_floating_point():
            raise TypeError(
                f"{who}: {name} must be floating point, got {parameter.dtype}, as weights of a quantised "
                "model are: load the model without quantisation, or choose params='adapters'"
            )


def _trainable(who: str, names: Params, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if names is None:
        if not trainable:
            raise ValueError(f"{who}: the model must have a trainable parameter, got none")
        return trainable
    wanted = [names] if isinstance(names, str) else list(names)
    wanted = [name if name in trainable else plain_name(name) for name in wanted]
    for name in wanted:
        if name not in trainable:
            raise ValueError(f"{who}: params must name trainable parameters, got {name!r}")
    if not wanted:
        raise ValueError(f"{who}: params must name at least one parameter, got none")
    return {name: p for name, p in trainable.items() if name in wanted}


def _part_of(
    model: nn.Module, who: str, part: str, parameters: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    adapters = _Adapters(model)
    if part == "base":
        skipped = adapters.every | adapters.unused
        return {name: p for name, p in parameters.items() if id(p) not in skipped}
    if not adapters.every:
        raise ValueError(f"{who}: params='adapters' must find adapters of PEFT in the model, got none")
    if adapters.idle:
        layer, why, then = adapters.idle
        raise ValueError(
            f"{who}: params='adapters' must find adapters that the forward pass uses, got {layer}, which is "
            f"{why}; {then} first"
        )
    found = {name: p for name, p in parameters.items() if id(p) in adapters.active}
    if not found:
        raise ValueError(f"{who}: params='adapters' must find an active adapter, got none; call set_adapter")
    return found


class _Adapters:
    """The adapters in a model, told by what PEFT's layers say of themselves.

    Attributes:
        every: ids of the parameters of all adapters.
        active: Of those that are in use.
        unused: Of modules that stand aside while an adapter takes their place.
        idle: A layer whose adapters are merged or disabled, why, and what to do about it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.every: set[int] = set()
        self.active: set[int] = set()
        self.unused: set[int] = set()
        self.idle: tuple[str, str, str] | None = None
        for name, module in model.named_modules():
            if hasattr(module, "adapter_layer_names") and hasattr(module, "active_adapters"):
                self._look_at(name, module)
            prompts = getattr(module, "prompt_encoder", None)
            if hasattr(module, "peft_config") and isinstance(prompts, nn.ModuleDict):
                ids = {id(p) for p in prompts.parameters()}
                self.every |= ids
                self.active |= ids

    def _look_at(self, name: str, layer: Any) -> None:  # noqa: ANN401 - a layer of PEFT
        active = set(layer.active_adapters)
        for attribute in (*layer.adapter_layer_names, *getattr(layer, "other_param_names", ())):
            try:
                kept = attrgetter(attribute)(layer)
            except AttributeError:  # not every layer has every kind
                continue
            for adapter, held in _items(kept):
                ids = {id(held)} if isinstance(held, Tensor) else {id(p) for p in held.parameters()}
                self.every |= ids
                if adapter in active and attribute in layer.adapter_layer_names:
                    self.active |= ids
        is_off = bool(layer.disable_adapters)
        original = layer._modules.get("original_module")
        if original is not None and active and not is_off:
            self.unused |= {id(p) for p in original.parameters()}
        if self.idle is None and is_off:
            self.idle = name, "disabled", "enable the adapters"
        elif self.idle is None and bool(getattr(layer, "merged_adapters", ())):
            self.idle = name, "merged", "call unmerge_adapter()"


def _items(kept: object) -> Iterator[tuple[str, Any]]:
    # What a layer keeps by name of the adapter; buffers and plain values are none of ours.
    if isinstance(kept, (nn.ModuleDict, nn.ParameterDict)):
        for adapter, held in kept.items():
            if isinstance(held, (nn.Module, Tensor)):
                yield adapter, held
