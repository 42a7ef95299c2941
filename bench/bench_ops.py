"""Every op against its floor, its reference and the other ways to do the same with torch or numpy.

``pytest bench/bench_ops.py -k "fisher and resnet18"`` runs a selection; ``python -m bench`` runs all and
writes ``bench/RESULTS.md``. Groups are called ``op/model/dtype/device``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.race import FLOOR, Contender, Race, replay
from bench.shapes import MODELS
from unlearn_ext import ops
from unlearn_ext.ops import reference
from unlearn_ext.optim.masked import MaskedAdamW, MaskedSGD

_C = pytest.importorskip("unlearn_ext._C", reason="nothing was compiled: these race the compiled ops")

OURS, DOOR, REFERENCE = "ours", "direct door", "reference (eager)"
FOREACH, FUSED, COMPILED = "torch._foreach", "torch fused", "torch.compile"


@dataclass(frozen=True)
class Group:
    """One race: what is computed, on which tensors, and who takes part."""

    op: str
    model: str
    dtype: torch.dtype
    names: tuple[str, ...]
    build: Callable[["Group", torch.device], Race]

    def tensors(
        self, device: torch.device, dtype: torch.dtype | None = None, uniform: bool = False
    ) -> list[Tensor]:
        fill = torch.rand if uniform else torch.randn
        return [fill(shape, device=device).to(dtype or self.dtype) for shape in MODELS[self.model]()]

    @property
    def uncompared(self) -> int:
        """Number of tensors at the front that the reference leaves out: its temporaries would not fit."""
        return 1 if self.model == "transformer_1b" else 0


GROUPS: list[Group] = []


def contest(
    op: str,
    names: Sequence[str],
    *,
    models: Sequence[str] = ("resnet18",),
    half: Sequence[str] = (),
    large: Sequence[str] = (),
) -> Callable:
    """Register a race.

    Args:
        op: First part of the groups' names.
        names: Contenders in float32.
        models: Where the tensors' shapes come from.
        half: Contenders on the first model in bfloat16.
        large: Contenders on ViT-B/16 in float32 and, marked slow, on the 1 B transformer in bfloat16.
    """

    def register(build: Callable[[Group, torch.device], Race]) -> Callable[[Group, torch.device], Race]:
        GROUPS.extend(Group(op, model, torch.float32, tuple(names), build) for model in models)
        if half:
            GROUPS.append(Group(op, models[0], torch.bfloat16, tuple(half), build))
        if large:
            GROUPS.append(Group(op, "vit_b16", torch.float32, tuple(large), build))
            GROUPS.append(Group(op, "transformer_1b", torch.bfloat16, tuple(large), build))
        return build

    return register


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile for exactly the shapes it is called with, unimpressed by other races."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def spare(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Other memory of the same sizes: an addition to itself would read everything only once."""
    return [tensor.clone() for tensor in tensors]


def n_bytes(*lists: Sequence[Tensor]) -> float:
    return float(sum(tensor.nbytes for tensors in lists for tensor in tensors))


# Importances and dampening.


@contest(
    "fisher_accumulate_",
    [OURS, DOOR, REFERENCE, FOREACH, COMPILED, "loop over parameters", FLOOR],
    half=[OURS, DOOR, REFERENCE, FOREACH, FLOOR],
    large=[OURS, FOREACH, FLOOR],
)
def fisher_accumulate(group: Group, device: torch.device) -> Race:
    fisher, grads = group.tensors(device, torch.float32, uniform=True), group.tensors(device)
    weight, skip = 1 / 64, group.uncompared

    def formula(fisher: list[Tensor], grads: list[Tensor]) -> None:
        for total, grad in zip(fisher, grads, strict=True):
            total.add_(grad.float().square(), alpha=weight)

    def loop() -> None:  # as the released code of selective dampening accumulates
        for total, grad in zip(fisher, grads, strict=True):
            total.data += grad.data.clone().pow(2) / 64

    compiled_formula = compiled(formula)
    return Race(
        reference=lambda: reference.fisher_accumulate_(fisher[skip:], grads[skip:], weight=weight),
        contenders={
            OURS: Contender(lambda: ops.fisher_accumulate_(fisher, grads, weight=weight)),
            DOOR: Contender(lambda: _C.fisher_accumulate_(fisher, grads, weight=weight)),
            FOREACH: Contender(lambda: torch._foreach_addcmul_(fisher, grads, grads, value=weight)),
            COMPILED: Contender(lambda: compiled_formula(fisher, grads)),
            "loop over parameters": Contender(loop),
        },
        written=fisher[skip:],
        bytes_moved=2 * n_bytes(fisher) + n_bytes(grads),
        floor=(fisher, spare(fisher)),
    )


# A power of two, so that alpha * full is exact however it is computed, and all contenders select the same
# scalars.
ALPHA = 8.0


@contest(
    "selective_dampen_",
    [OURS, DOOR, REFERENCE, "torch.where (eager)", COMPILED, "published loop", FLOOR],
    half=[OURS, DOOR, "torch.where (eager)", FLOOR],
    large=[OURS, FLOOR],
)
def selective_dampen(group: Group, device: torch.device) -> Race:
    params = group.tensors(device)
    full, forget = (group.tensors(device, torch.float32, uniform=True) for _ in range(2))  # 1/16 is selected
    skip = group.uncompared

    def formula(params: list[Tensor], full: list[Tensor], forget: list[Tensor]) -> None:
        for p, i_full, i_forget in zip(params, full, forget, strict=True):
            factor = (i_full / i_forget).clamp(max=1.0)
            p.copy_(torch.where(i_forget > ALPHA * i_full, p * factor, p))

    def published() -> None:  # the steps of the released code, parameter by parameter
        for p, i_full, i_forget in zip(params, full, forget, strict=True):
            chosen = torch.where(i_forget > i_full.mul(ALPHA))
            factors = i_full.mul(1.0).div(i_forget).pow(1.0)[chosen]
            factors[torch.where(factors > 1.0)] = 1.0
            p[chosen] = p[chosen].mul(factors.to(p.dtype))

    compiled_formula = compiled(formula)
    return Race(
        reference=lambda: reference.selective_dampen_(
            params[skip:], full[skip:], forget[skip:], alpha=ALPHA, lambda_=1.0
        ),
        contenders={
            OURS: Contender(lambda: ops.selective_dampen_(params, full, forget, alpha=ALPHA, lambda_=1.0)),
            DOOR: Contender(lambda: _C.selective_dampen_(params, full, forget, alpha=ALPHA, lambda_=1.0)),
            "torch.where (eager)": Contender(lambda: formula(params, full, forget)),
            COMPILED: Contender(lambda: compiled_formula(params, full, forget)),
            "published loop": Contender(published),
        },
        written=params[skip:],
        drifts=True,  # dampened again and again, parameters become denormal and slow
        bytes_moved=2 * n_bytes(params) + n_bytes(full, forget),
        floor=(full, forget),
        rtol=1e-5 if group.dtype == torch.float32 else 1e-2,
    )


@contest("selected_counts", [OURS, DOOR, "sums of comparisons", FLOOR])
def selected_counts(group: Group, device: torch.device) -> Race:
    full, forget = (group.tensors(device, uniform=True) for _ in range(2))
    alphas = [2.0**power for power in range(10)]
    compared = 30  # tensors: the reference decides every comparison exactly, and would take a minute for all

    def first(counts: Tensor) -> Tensor:
        return counts[:, :compared]

    def sums() -> Tensor:
        rows = [
            torch.stack([(b > alpha * a).sum() for a, b in zip(full, forget, strict=True)])
            for alpha in alphas
        ]
        return torch.stack(rows)

    return Race(
        reference=lambda: reference.selected_counts(full[:compared], forget[:compared], alphas),
        contenders={
            OURS: Contender(lambda: ops.selected_counts(full, forget, alphas), first),
            DOOR: Contender(lambda: _C.selected_counts(full, forget, alphas), first),
            "sums of comparisons": Contender(sums, first),
        },
        bytes_moved=n_bytes(full, forget),
        floor=(full, forget),
    )


@contest("ratio_quantile", [OURS, DOOR, REFERENCE, "torch.quantile", "numpy.nanpercentile", FLOOR])
def ratio_quantile(group: Group, device: torch.device) -> Race:
    full, forget = (group.tensors(device, uniform=True) for _ in range(2))
    full = [tensor + 1e-3 for tensor in full]  # torch.quantile does not leave out infinite ratios

    def ratios() -> Tensor:
        return torch.cat([(b / a).flatten() for a, b in zip(full, forget, strict=True)])

    return Race(
        reference=lambda: reference.ratio_quantile(full, forget, 0.9),
        contenders={
            OURS: Contender(lambda: ops.ratio_quantile(full, forget, 0.9)),
            DOOR: Contender(lambda: _C.ratio_quantile(full, forget, 0.9)),
            # At most 16 M elements: no larger model can be served this way.
            "torch.quantile": Contender(lambda: torch.quantile(ratios(), 0.9)),
            "numpy.nanpercentile": Contender(
                lambda: np.nanpercentile(ratios().cpu().numpy(), 90),
                lambda value: torch.tensor(value, device=device),
            ),
        },
        bytes_moved=n_bytes(full, forget),
        floor=(full, forget),
    )


# Masks.


def neuron_masks(tensors: Sequence[Tensor], density: float) -> list[Tensor]:
    """Whole output neurons: rows of weights, elements of biases."""
    masks = []
    for tensor in tensors:
        rows = torch.rand(tensor.shape[0], device=tensor.device) < density
        masks.append(rows.view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape).contiguous())
    return masks


def element_masks(tensors: Sequence[Tensor], density: float) -> list[Tensor]:
    return [torch.rand(tensor.shape, device=tensor.device) < density for tensor in tensors]


def words_touched(masks: Sequence[Tensor]) -> float:
    """Count the scalars that share a word of 64 with a marked one: what an op on the marked ones moves."""
    count = 0
    for mask in masks:
        bits = F.pad(mask.flatten(), (0, -mask.numel() % 64)).view(-1, 64)
        count += 64 * int(bits.any(1).sum())
    return float(count)


@contest("pack_mask", [OURS, DOOR, REFERENCE, "numpy.packbits", FLOOR])
def pack_mask(group: Group, device: torch.device) -> Race:
    masks = element_masks(group.tensors(device), 0.5)
    flat = [mask.flatten().cpu().numpy() for mask in masks]
    flags = [mask.clone().view(torch.uint8) for mask in masks]
    return Race(
        reference=lambda: [reference.pack_mask(mask) for mask in masks],
        contenders={
            OURS: Contender(lambda: [ops.pack_mask(mask) for mask in masks]),
            DOOR: Contender(lambda: [_C.pack_mask(mask) for mask in masks]),
            "numpy.packbits": Contender(
                lambda: [np.packbits(mask, bitorder="little") for mask in flat],
                lambda packed: [torch.from_numpy(p).to(device) for p in packed],
            ),
        },
        bytes_moved=n_bytes(masks) * 9 / 8,
        floor=(flags, spare(flags)),
    )


@contest("unpack_mask", [OURS, DOOR, REFERENCE, "numpy.unpackbits", FLOOR])
def unpack_mask(group: Group, device: torch.device) -> Race:
    masks = element_masks(group.tensors(device), 0.5)
    packed = [ops.pack_mask(mask) for mask in masks]
    shapes = [list(mask.shape) for mask in masks]
    arrays = [p.cpu().numpy() for p in packed]
    flags = [mask.clone().view(torch.uint8) for mask in masks]

    def with_numpy() -> list[np.ndarray]:
        return [
            np.unpackbits(a, count=math.prod(s), bitorder="little").reshape(s).view(np.bool_)
            for a, s in zip(arrays, shapes, strict=True)
        ]

    return Race(
        reference=lambda: [reference.unpack_mask(p, s) for p, s in zip(packed, shapes, strict=True)],
        contenders={
            OURS: Contender(lambda: [ops.unpack_mask(p, s) for p, s in zip(packed, shapes, strict=True)]),
            DOOR: Contender(lambda: [_C.unpack_mask(p, s) for p, s in zip(packed, shapes, strict=True)]),
            "numpy.unpackbits": Contender(
                with_numpy, lambda arrays: [torch.from_numpy(a).to(device) for a in arrays]
            ),
        },
        bytes_moved=n_bytes(masks) * 9 / 8,
        floor=(flags, spare(flags)),
    )


@contest("topk_mask", [OURS, DOOR, REFERENCE, "torch.kthvalue", "torch.topk", "torch.argsort", FLOOR])
def topk_mask(group: Group, device: torch.device) -> Race:
    shapes = MODELS[group.model]()
    sizes = [math.prod(shape) for shape in shapes]
    # Distinct, so that every contender marks the same scalars; all integers of this size are floats.
    distinct = torch.randperm(sum(sizes), device=device).to(group.dtype).split(sizes)
    scores = [part.clone().view(shape) for part, shape in zip(distinct, shapes, strict=True)]
    n, k = sum(sizes), sum(sizes) // 20

    def joined() -> Tensor:
        return torch.cat([score.flatten() for score in scores])

    def by_threshold() -> list[Tensor]:
        threshold = torch.kthvalue(joined(), n - k + 1).values
        return [score >= threshold for score in scores]

    def marked(indices: Tensor) -> list[Tensor]:
        mask = torch.zeros(n, dtype=torch.bool, device=device)
        mask[indices] = True
        return [part.view(shape) for part, shape in zip(mask.split(sizes), shapes, strict=True)]

    def unpacked(masks: object) -> list[Tensor]:
        assert isinstance(masks, list)
        return [ops.unpack_mask(mask, shape) for mask, shape in zip(masks, shapes, strict=True)]

    return Race(
        reference=lambda: reference.topk_mask(scores, k),
        read_reference=unpacked,
        contenders={
            OURS: Contender(lambda: ops.topk_mask(scores, k), unpacked),
            DOOR: Contender(lambda: _C.topk_mask(scores, k), unpacked),
            "torch.kthvalue": Contender(by_threshold),
            "torch.topk": Contender(lambda: marked(torch.topk(joined(), k, sorted=False).indices)),
            "torch.argsort": Contender(lambda: marked(torch.argsort(joined(), descending=True)[:k])),
        },
        bytes_moved=n_bytes(scores) + n / 8,
        floor=(scores, spare(scores)),
    )


@contest(
    "apply_mask_", [OURS, DOOR, REFERENCE, FOREACH, "masked_fill_", FLOOR], half=[OURS, DOOR, FOREACH, FLOOR]
)
def apply_mask(group: Group, device: torch.device) -> Race:
    grads = group.tensors(device)
    masks = neuron_masks(grads, 0.05)
    packed = [ops.pack_mask(mask) for mask in masks]
    factors = [mask.to(group.dtype) for mask in masks]
    closed = [~mask for mask in masks]

    def fill() -> None:
        for grad, mask in zip(grads, closed, strict=True):
            grad.masked_fill_(mask, 0.0)

    return Race(
        reference=lambda: reference.apply_mask_(grads, packed),
        contenders={
            OURS: Contender(lambda: ops.apply_mask_(grads, packed)),
            DOOR: Contender(lambda: _C.apply_mask_(grads, packed)),
            FOREACH: Contender(lambda: torch._foreach_mul_(grads, factors)),
            "masked_fill_": Contender(fill),
        },
        written=grads,
        # Zeros are written without looking at what was there.
        bytes_moved=words_touched(closed) * group.dtype.itemsize + n_bytes(packed),
        floor=(grads, spare(grads)),
    )


# Optimizers.

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"lr": 0.1, "weight_decay": 1e-2}


def with_state(
    optimizer: torch.optim.Optimizer, grads: Sequence[Tensor], **state: Sequence[Tensor] | float
) -> Callable:
    """Give an optimizer gradients and state, so that it steps on the tensors that the ops are given."""
    group = optimizer.param_groups[0]
    for index, p in enumerate(group["params"]):
        p.grad = grads[index]
        device = p.device if group.get("fused") else "cpu"  # of the step count, as torch.optim keeps it
        for key, value in state.items():
            scalar = isinstance(value, float)
            optimizer.state[p][key] = torch.tensor(value, device=device) if scalar else value[index]
    return optimizer.step


@contest(
    "masked_sgd_",
    [
        OURS,
        DOOR,
        "MaskedSGD.step",
        REFERENCE,
        "torch.optim.SGD(foreach)",
        "torch.optim.SGD(fused)",
        COMPILED,
        FLOOR,
    ],
    half=[OURS, DOOR, "MaskedSGD.step", REFERENCE, FLOOR],  # torch.optim would keep bfloat16 momentum
    large=[OURS, "MaskedSGD.step", FLOOR],
)
def masked_sgd(group: Group, device: torch.device) -> Race:
    params = [nn.Parameter(tensor) for tensor in group.tensors(device)]
    grads, momentum = group.tensors(device), group.tensors(device, torch.float32)
    masks = [torch.full(((p.numel() + 7) // 8,), 255, dtype=torch.uint8, device=device) for p in params]
    written, skip = [p.data for p in params], group.uncompared

    def formula(params: list[Tensor], grads: list[Tensor], momentum: list[Tensor]) -> None:
        for p, g, b in zip(params, grads, momentum, strict=True):
            b.copy_(0.9 * b + (g + SGD["weight_decay"] * p))
            p.sub_(b, alpha=SGD["lr"])

    def optimizer(cls: type, **options: object) -> Contender:
        return Contender(with_state(cls(params, **SGD, **options), grads, momentum_buffer=momentum))

    compiled_formula = compiled(formula)
    contenders = {
        OURS: Contender(lambda: ops.masked_sgd_(params, grads, momentum, masks, **SGD)),
        DOOR: Contender(lambda: _C.masked_sgd_(params, grads, momentum, masks, **SGD)),
        "MaskedSGD.step": optimizer(MaskedSGD),
        COMPILED: Contender(lambda: compiled_formula(written, grads, momentum)),
    }
    if group.dtype == torch.float32:
        contenders["torch.optim.SGD(foreach)"] = optimizer(torch.optim.SGD, foreach=True)
        contenders["torch.optim.SGD(fused)"] = optimizer(torch.optim.SGD, fused=True)
    return Race(
        reference=lambda: reference.masked_sgd_(*(x[skip:] for x in (params, grads, momentum, masks)), **SGD),
        contenders=contenders,
        written=list(zip(written[skip:], momentum[skip:], strict=True)),
        bytes_moved=2 * n_bytes(params, momentum) + n_bytes(grads, masks),
        floor=(momentum, spare(momentum)),
        rtol=1e-5 if group.dtype == torch.float32 else 1e-2,
    )


def density_curve(density: float, unit: str) -> None:
    op = f"masked_sgd_, {100 * density:.0f} percent by {unit}"

    # The dense steps do other work, on all scalars; they are here for their time and are not compared.
    @contest(
        op, [OURS, "torch.optim.SGD(foreach)", "torch.optim.SGD(fused)", "gradient * mask, fused SGD", FLOOR]
    )
    def curve(group: Group, device: torch.device) -> Race:
        params = [nn.Parameter(tensor) for tensor in group.tensors(device)]
        grads, momentum = group.tensors(device), group.tensors(device)
        masks = {"neuron": neuron_masks, "element": element_masks}[unit](params, density)
        packed = [ops.pack_mask(mask) for mask in masks]
        masked_grads, factors = [grad.clone() for grad in grads], [mask.to(group.dtype) for mask in masks]
        dense = {
            name: with_state(torch.optim.SGD(params, **SGD, **{name: True}), grads, momentum_buffer=momentum)
            for name in ("foreach", "fused")
        }
        twins = [nn.Parameter(p.data) for p in params]
        masked_step = with_state(
            torch.optim.SGD(twins, **SGD, fused=True), masked_grads, momentum_buffer=momentum
        )

        def mask_then_step() -> None:
            torch._foreach_mul_(masked_grads, factors)
            masked_step()

        return Race(
            reference=lambda: reference.masked_sgd_(params, grads, momentum, packed, **SGD),
            contenders={
                OURS: Contender(lambda: ops.masked_sgd_(params, grads, momentum, packed, **SGD)),
                "torch.optim.SGD(foreach)": Contender(dense["foreach"], compared=False),
                "torch.optim.SGD(fused)": Contender(dense["fused"], compared=False),
                "gradient * mask, fused SGD": Contender(mask_then_step, compared=False),
            },
            written=list(zip([p.data for p in params], momentum, strict=True)),
            bytes_moved=20 * words_touched(masks) + n_bytes(packed),
            floor=(momentum, grads),
        )


for share in (1.0, 0.5, 0.2, 0.05, 0.01):
    density_curve(share, "neuron")
for share in (0.5, 0.2, 0.05, 0.01):  # everything is everything, however it is chosen
    density_curve(share, "element")


@contest(
    "masked_adamw_",
    [
        OURS,
        DOOR,
        "MaskedAdamW.step",
        REFERENCE,
        "torch.optim.AdamW(foreach)",
        "torch.optim.AdamW(fused)",
        COMPILED,
        FLOOR,
    ],
    half=[OURS, DOOR, "MaskedAdamW.step", REFERENCE, FLOOR],
    large=[OURS, "MaskedAdamW.step", FLOOR],
)
def masked_adamw(group: Group, device: torch.device) -> Race:
    params = [nn.Parameter(tensor) for tensor in group.tensors(device)]
    grads, averages = group.tensors(device), group.tensors(device, torch.float32)
    squares = group.tensors(device, torch.float32, uniform=True)
    masks = [torch.full(((p.numel() + 7) // 8,), 255, dtype=torch.uint8, device=device) for p in params]
    written = [p.data for p in params]
    step, eps, (beta1, beta2), skip = 10, 1e-8, (0.9, 0.999), group.uncompared

    def formula(
        params: list[Tensor], grads: list[Tensor], averages: list[Tensor], squares: list[Tensor]
    ) -> None:
        for p, g, m, v in zip(params, grads, averages, squares, strict=True):
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
            decayed = p * (1 - ADAMW["lr"] * ADAMW["weight_decay"])
            p.copy_(decayed - ADAMW["lr"] / (1 - beta1**step) * m / denominator)

    def optimizer(cls: type, **options: object) -> Contender:
        # Their own step counts go on from round to round, which costs the same and changes little.
        state = {"exp_avg": averages, "exp_avg_sq": squares, "step": float(step - 1)}
        return Contender(with_state(cls(params, **ADAMW, **options), grads, **state))

    compiled_formula = compiled(formula)
    lists = (params, grads, averages, squares, masks)
    contenders = {
        OURS: Contender(lambda: ops.masked_adamw_(*lists, step=step, **ADAMW)),
        DOOR: Contender(lambda: _C.masked_adamw_(*lists, step=step, **ADAMW)),
        "MaskedAdamW.step": optimizer(MaskedAdamW),
        COMPILED: Contender(lambda: compiled_formula(written, grads, averages, squares)),
    }
    if group.dtype == torch.float32:
        contenders["torch.optim.AdamW(foreach)"] = optimizer(torch.optim.AdamW, foreach=True)
        contenders["torch.optim.AdamW(fused)"] = optimizer(torch.optim.AdamW, fused=True)
    return Race(
        reference=lambda: reference.masked_adamw_(*(x[skip:] for x in lists), step=step, **ADAMW),
        contenders=contenders,
        written=list(zip(written[skip:], averages[skip:], squares[skip:], strict=True)),
        bytes_moved=2 * n_bytes(params, averages, squares) + n_bytes(grads, masks),
        floor=(averages, squares),
        rtol=1e-5 if group.dtype == torch.float32 else 1e-2,
    )


# Subspaces: arithmetic is the limit, so there is no floor.


@contest("gram_accumulate_", [OURS, DOOR, REFERENCE, "X.T @ X, then add", "addmm"], models=["4096x768"])
def gram_accumulate(group: Group, device: torch.device) -> Race:
    inputs, gram = torch.randn(4096, 768, device=device), torch.zeros(768, 768, device=device)
    return Race(
        reference=lambda: reference.gram_accumulate_(gram, inputs),
        contenders={
            OURS: Contender(lambda: ops.gram_accumulate_(gram, inputs)),
            DOOR: Contender(lambda: _C.gram_accumulate_(gram, inputs)),
            "X.T @ X, then add": Contender(lambda: gram.add_(inputs.T @ inputs)),
            "addmm": Contender(lambda: gram.addmm_(inputs.T, inputs)),
        },
        written=[gram],
        rtol=1e-4,  # sums of 4096 products: entries up to 4000, off the diagonal about 64
    )


@contest(
    "gram_accumulate_ into float64",
    [OURS, DOOR, "X.T @ X in float32, then add", "X.T @ X in float64"],
    models=["4096x768"],
)
def gram_accumulate_double(group: Group, device: torch.device) -> Race:
    inputs = torch.randn(4096, 768, device=device)
    gram = torch.zeros(768, 768, device=device, dtype=torch.float64)

    def in_double() -> None:
        wide = inputs.double()
        gram.addmm_(wide.T, wide)

    return Race(
        reference=lambda: reference.gram_accumulate_(gram, inputs),
        contenders={
            OURS: Contender(lambda: ops.gram_accumulate_(gram, inputs)),
            DOOR: Contender(lambda: _C.gram_accumulate_(gram, inputs)),
            "X.T @ X in float32, then add": Contender(lambda: gram.add_(inputs.T @ inputs)),
            "X.T @ X in float64": Contender(in_double),
        },
        written=[gram],
        rtol=1e-4,
    )


@contest("gram_conv_accumulate_", [OURS, DOOR, REFERENCE, "unfold, mm"], models=["8x64x32x32 k3"])
def gram_conv_accumulate(group: Group, device: torch.device) -> Race:
    inputs, gram = torch.randn(8, 64, 32, 32, device=device), torch.zeros(576, 576, device=device)
    options = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}

    def unfold() -> None:
        patches = F.unfold(inputs, 3, padding=1).transpose(1, 2).reshape(-1, 576)
        gram.addmm_(patches.T, patches)

    return Race(
        reference=lambda: reference.gram_conv_accumulate_(gram, inputs, **options),
        contenders={
            OURS: Contender(lambda: ops.gram_conv_accumulate_(gram, inputs, **options)),
            DOOR: Contender(lambda: _C.gram_conv_accumulate_(gram, inputs, **options)),
            "unfold, mm": Contender(unfold),
        },
        written=[gram],
        rtol=4e-4,  # float32 sums of 8,192 products in another order; either is up to 1.6e-4 off
    )


@contest("project_out_", [OURS, DOOR, REFERENCE, "one call per layer", "mm, addmm_"])
def project_out(group: Group, device: torch.device) -> Race:
    weights = [shape for shape in MODELS[group.model]() if len(shape) > 1]
    grads = [torch.randn(shape, device=device) for shape in weights]
    sizes = [math.prod(shape[1:]) for shape in weights]
    bases = [torch.linalg.qr(torch.randn(d, min(64, d // 2), device=device)).Q.contiguous() for d in sizes]

    def per_layer() -> None:
        for grad, basis in zip(grads, bases, strict=True):
            ops.project_out_(grad, basis)

    def expression() -> None:
        for grad, basis in zip(grads, bases, strict=True):
            rows = grad.view(grad.shape[0], -1)
            rows.addmm_(rows @ basis, basis.T, alpha=-1)

    return Race(
        reference=lambda: reference.project_out_(grads, bases),
        contenders={
            OURS: Contender(lambda: ops.project_out_(grads, bases)),
            DOOR: Contender(lambda: _C.project_out_(grads, bases)),
            "one call per layer": Contender(per_layer),
            "mm, addmm_": Contender(expression),
        },
        written=grads,
        rtol=1e-4,
    )


# Running.


def cases() -> list:
    return [
        pytest.param(
            group,
            name,
            id=f"{group.op}/{group.model}/{str(group.dtype)[6:]}-{name}",
            marks=[pytest.mark.slow] if group.model == "transformer_1b" else [],
        )
        for group in GROUPS
        for name in group.names
    ]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("group, name", cases())
def test_op(group: Group, name: str, compete: Callable, races) -> None:
    label = f"{group.op}/{group.model}/{str(group.dtype)[6:]}/{races.device.type}"
    compete(label, name, lambda: group.build(group, races.device).only(group.names, REFERENCE))
