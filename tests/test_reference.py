"""The specification against hand-worked numbers and identities: it must share no mistake with a kernel."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from layer_calls import LAYERS
from torch import tensor

from unlearn_ext.ops import reference

NAN, INF = math.nan, math.inf
ALL = torch.full((2,), 255, dtype=torch.uint8)  # a mask of up to 16 scalars


def _packed(*flags):
    return reference.pack_mask(tensor(flags, dtype=torch.bool))


@pytest.mark.parametrize(
    "power, expected", [(2, [0.9 + 4.5, 1.8 + 8.0, 0.0]), (1, [0.9 + 1.5, 1.8 + 2.0, 0.0])]
)
def test_fisher(power, expected):
    fisher = [tensor([1.0, 2.0, 0.0], dtype=torch.float64)]
    grads = [tensor([3.0, -4.0, 0.0], dtype=torch.float64)]
    reference.fisher_accumulate_(fisher, grads, weight=0.5, decay=0.9, power=power)
    assert fisher[0].tolist() == pytest.approx(expected, rel=1e-15)


def test_fisher_of_a_running_mean_of_equal_gradients_is_their_square():
    fisher = [torch.zeros(1, dtype=torch.float64)]
    for step in range(1, 6):
        reference.fisher_accumulate_(fisher, [tensor([3.0])], weight=1 / step, decay=1 - 1 / step)
        assert fisher[0].item() == pytest.approx(9.0, rel=1e-15)


# Two samples of two positions, whose weight gradients are [[4, 6], [-1, 0]] and [[3, 0], [-3, 6]].
ROWS = tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]])
GRADS = tensor([[[1.0, 2.0], [1.0, -1.0]], [[3.0, -3.0], [0.0, 3.0]]])


@pytest.mark.parametrize(
    "power, weights, biases, scales",
    [
        (2, [[25.0, 36.0], [10.0, 36.0]], [13.0, 1.0], [25.0, 36.0]),
        (1, [[7.0, 6.0], [4.0, 6.0]], [5.0, 1.0], [7.0, 6.0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_fisher_of_a_linear_layer_and_of_its_bias_and_of_a_scale(power, weights, biases, scales, dtype):
    total = torch.float64 if dtype == torch.float64 else torch.float32
    rows, grads = ROWS.to(dtype), GRADS.to(dtype)
    fisher = torch.ones(2, 2, dtype=total)
    reference.fisher_linear_(fisher, rows, grads, weight=0.5, power=power)
    assert fisher.tolist() == [[1 + value / 2 for value in row] for row in weights]
    for channel_dim in (-1, 1):
        g, x = (t if channel_dim == -1 else t.mT for t in (grads, rows))
        fisher = torch.zeros(2, dtype=total)
        reference.fisher_bias_(fisher, g, channel_dim=channel_dim, power=power)
        assert fisher.tolist() == biases
        reference.fisher_affine_(fisher, x, g, channel_dim=channel_dim, weight=-2.0, power=power)
        assert fisher.tolist() == [b - 2 * s for b, s in zip(biases, scales, strict=True)]


def test_fisher_of_positions_in_several_axes_is_that_of_one():
    torch.manual_seed(0)
    rows, grads = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 6)
    several, one = torch.zeros(6, 5), torch.zeros(6, 5)
    reference.fisher_linear_(several, rows, grads)
    reference.fisher_linear_(one, rows.view(3, 8, 5), grads.view(3, 8, 6))
    assert torch.equal(several, one)


def test_fisher_without_an_axis_of_positions_is_that_of_one_position_each():
    fisher, expected = torch.zeros(2, 2), torch.zeros(2, 2)
    reference.fisher_linear_(fisher, ROWS[:, 0], GRADS[:, 0])
    reference.fisher_linear_(expected, ROWS[:, :1], GRADS[:, :1])
    assert torch.equal(fisher, expected)
    assert fisher.tolist() == [[10.0, 4.0], [13.0, 16.0]]


def test_fisher_of_a_convolution():
    # Patches (0 1), (1 2), (2 3) with gradients 1, 2, -1: 0 and 2.
    fisher = torch.zeros(1, 1, 2)
    signal, grads = tensor([[[1.0, 2.0, 3.0]]]), tensor([[[1.0, 2.0, -1.0]]])
    reference.fisher_conv_(fisher, signal, grads, stride=1, padding=[(1, 0)], dilation=1)
    assert fisher.tolist() == [[[0.0, 4.0]]]


def test_fisher_of_a_grouped_strided_dilated_convolution():
    # One output pixel per channel, which sees pixels (0, 0) and (0, 2) of its own channel.
    image, fisher = torch.arange(18.0).view(1, 2, 3, 3), torch.zeros(2, 1, 1, 2)
    grads = tensor([2.0, -1.0]).view(1, 2, 1, 1)
    reference.fisher_conv_(fisher, image, grads, stride=[3, 1], padding=0, dilation=[1, 2], groups=2, power=1)
    assert fisher.flatten().tolist() == [0.0, 4.0, 9.0, 11.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_fisher_of_an_embedding(dtype):
    indices = tensor([[0, 2, 0], [2, 1, 1]], dtype=dtype)
    grads = tensor([[[1.0], [5.0], [2.0]], [[-4.0], [1.0], [-1.0]]])
    fisher = torch.zeros(4, 1)
    reference.fisher_embedding_(fisher, indices, grads)
    assert fisher.flatten().tolist() == [9.0, 0.0, 41.0, 0.0]
    fisher = torch.zeros(4, 1)
    reference.fisher_embedding_(fisher, indices, grads, padding_idx=2, power=1)
    assert fisher.flatten().tolist() == [3.0, 0.0, 0.0, 0.0]
    for bad in (-1, 4):
        with pytest.raises(
            ValueError, match=rf"^fisher_embedding_: indices must lie in \[0, 4\), got {bad}$"
        ):
            reference.fisher_embedding_(fisher, tensor([[0, bad, 0], [0, 0, 0]]), grads)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("power", [1, 2])
def test_fisher_of_layers_is_that_of_autograd(name, power):
    layer = LAYERS[name]("cpu", torch.Generator().manual_seed(0))
    fisher = torch.zeros(layer.gradients.shape[1:], dtype=torch.float64)
    getattr(reference, layer.name)(fisher, *layer.tensors, power=power, **layer.constants)
    assert torch.allclose(fisher, (layer.gradients.abs() ** power).sum(0), rtol=1e-12, atol=0)


def test_dampening():
    # Ratios 2 (not above alpha), 4, 8, 0/0, 3/0, and one with a factor above 1.
    params = [tensor([1.0, -2.0, 4.0, 5.0, 6.0, 7.0])]
    full = [tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0])]
    forget = [tensor([2.0, 4.0, 8.0, 0.0, 3.0, 2.5])]
    reference.selective_dampen_(params, full, forget, alpha=2.0, lambda_=3.0)
    assert params[0].tolist() == [1.0, -1.5, 1.5, 5.0, 0.0, 7.0]


def test_dampening_with_an_exponent_and_bounds():
    full, forget = [torch.ones(3)], [tensor([4.0, 16.0, 1024.0])]
    params = [tensor([1.0, 1.0, 1.0])]
    reference.selective_dampen_(params, full, forget, alpha=1.0, lambda_=1.0, exponent=0.5)
    assert params[0].tolist() == [0.5, 0.25, 0.03125]
    params = [tensor([1.0, 1.0, 1.0])]
    reference.selective_dampen_(
        params, full, forget, alpha=1.0, lambda_=1.0, exponent=0.5, beta_min=0.125, beta_max=0.375
    )
    assert params[0].tolist() == [0.375, 0.25, 0.125]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_selection_is_that_of_exact_fractions(dtype):
    torch.manual_seed(0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    largest = torch.finfo(dtype).max
    values = torch.cat([torch.rand(40), torch.rand(40) * 1e-30, torch.ones(1)]).to(dtype).tolist()
    values += [0.0, smallest, 2 * smallest, 7 * smallest, largest, largest / 3, 1 / 3]
    alphas = [0.0, 1.0, 1.0 + torch.finfo(dtype).eps, 0.1, 1 / 3, 10.0, 1e-30, 1e30]
    for alpha in alphas:
        rounded = float(tensor(alpha, dtype=dtype))
        full = tensor(values, dtype=dtype)
        # The products themselves, rounded, are the hard cases; so are their neighbours.
        product = (full.double() * rounded).to(dtype)
        products = [
            product,
            torch.nextafter(product, tensor(INF, dtype=dtype)),
            torch.nextafter(product, tensor(0.0, dtype=dtype)),
        ]
        for forget in [*products, full.flip(0)]:
            expected = [
                math.isfinite(b) and Fraction(b) > Fraction(rounded) * Fraction(a)
                for a, b in zip(full.tolist(), forget.tolist(), strict=True)
            ]
            counts = reference.selected_counts([full], [forget], [alpha])
            assert counts.tolist() == [[sum(expected)]]
            params = [torch.ones_like(full)]
            reference.selective_dampen_(params, [full], [forget], alpha=alpha, lambda_=0.0)
            assert (params[0] == 0).tolist() == expected


def test_importances_that_are_not_finite_select_nothing():
    full = [tensor([NAN, 1.0, INF, 1.0, 0.0])]
    forget = [tensor([1.0, NAN, 1.0, INF, -INF])]
    assert reference.selected_counts(full, forget, [0.0, 1.0, 1e39]).tolist() == [[0], [0], [0]]


def test_selected_counts():
    full, forget = [tensor([1.0, 2.0]), tensor([0.0])], [tensor([2.0, 2.0]), tensor([1.0])]
    counts = reference.selected_counts(full, forget, [0.5, 1.0, 2.0])
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[2, 1], [1, 1], [0, 1]]
    assert reference.selected_counts([], [], [0.5]).shape == (1, 0)


@pytest.mark.parametrize("q, expected", [(0.0, 1.0), (0.25, 1.75), (0.5, 2.5), (0.75, 3.25), (1.0, 4.0)])
def test_ratio_quantile(q, expected):
    full = [tensor([1.0, 2.0, 0.0]), tensor([[4.0], [0.0], [0.5]])]
    forget = [tensor([4.0, 6.0, 0.0]), tensor([[4.0], [7.0], [1.0]])]
    # Ratios 4, 3, 0/0, 1, 7/0, 2.
    result = reference.ratio_quantile(full, forget, q)
    assert (result.item(), result.shape, result.dtype) == (expected, (), torch.float32)


def test_ratio_quantile_of_one_ratio_and_of_none():
    assert reference.ratio_quantile([tensor([2.0])], [tensor([6.0])], 0.3).item() == 3.0
    for full, forget in (([], []), ([torch.zeros(2)], [torch.ones(2)]), ([torch.ones(0)], [torch.ones(0)])):
        with pytest.raises(ValueError, match="finite ratio"):
            reference.ratio_quantile(full, forget, 0.5)


def test_packing():
    assert _packed(True, False, True, True).tolist() == [0b1101]
    assert _packed(*[False] * 7, True, True).tolist() == [0b1000_0000, 1]
    assert _packed().shape == (0,)
    assert reference.pack_mask(tensor(True)).tolist() == [1]
    assert reference.unpack_mask(tensor([0b1101], dtype=torch.uint8), (2, 2)).tolist() == [
        [True, False],
        [True, True],
    ]
    # The high bits of the last byte belong to nothing.
    assert reference.unpack_mask(tensor([0, 0b1111_0001], dtype=torch.uint8), (9,)).tolist() == [
        False
    ] * 8 + [True]
    assert reference.unpack_mask(torch.zeros(0, dtype=torch.uint8), (0, 3)).shape == (0, 3)


def test_topk():
    scores = [tensor([1.0, 5.0, 3.0]), tensor([[5.0], [5.0]]), tensor([])]

    def chosen(k, largest=True):
        masks = reference.topk_mask(scores, k, largest=largest)
        assert [mask.numel() for mask in masks] == [1, 1, 0]
        return [int(mask[0]) for mask in masks[:2]]

    assert chosen(0) == [0b000, 0b00]
    assert chosen(1) == [0b010, 0b00]
    assert chosen(2) == [0b010, 0b01]
    assert chosen(3) == [0b010, 0b11]
    assert chosen(4) == [0b110, 0b11]
    assert chosen(5) == [0b111, 0b11]
    assert chosen(1, largest=False) == [0b001, 0b00]
    assert chosen(3, largest=False) == [0b111, 0b00]
    assert reference.topk_mask([], 0) == []


@pytest.mark.parametrize("largest", [True, False])
def test_topk_takes_zeros_as_equal_and_refuses_nan(largest):
    scores = [tensor([-0.0, 0.0, -0.0])]
    masks = [int(reference.topk_mask(scores, k, largest=largest)[0]) for k in range(4)]
    assert masks == [0b000, 0b001, 0b011, 0b111]
    with pytest.raises(ValueError, match="NaN"):
        reference.topk_mask([tensor([1.0, NAN])], 1, largest=largest)


def test_masked_gradient():
    grads = [tensor([1.0, -2.0, NAN, INF, -0.0])]
    reference.apply_mask_(grads, [_packed(True, False, False, False, False)])
    assert grads[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert not grads[0].signbit().any()


def test_masked_sgd():
    # The gradient is 3 + 0.5 * 2 = 4, the buffer 9 + 0.8 * 4 = 12.2, the parameter 2 - 0.1 * 12.2 = 0.78.
    def run(**kwargs):
        params, buffers = [tensor([2.0, 2.0]).double()], [tensor([10.0, 10.0]).double()]
        grads = [tensor([3.0, NAN]).double()]
        reference.masked_sgd_(
            params, grads, buffers, [_packed(True, False)], lr=0.1, momentum=0.9, weight_decay=0.5, **kwargs
        )
        assert params[0][1] == 2.0
        assert buffers[0][1] == 10.0
        return params[0][0].item(), buffers[0][0].item()

    assert run(dampening=0.2) == pytest.approx((0.78, 12.2))
    # Here the buffer is 9 + 4 = 13, the parameter 2 - 0.1 * (4 + 0.9 * 13) = 0.43.
    assert run(nesterov=True) == pytest.approx((0.43, 13.0))
    # Here the gradient is -3 + 1 = -2, the buffer 9 - 2 = 7, the parameter 2 - 0.7.
    assert run(maximize=True) == pytest.approx((1.3, 7.0))


def test_masked_sgd_without_momentum():
    params, buffers = [tensor([2.0])], [tensor([5.0])]
    reference.masked_sgd_(params, [tensor([4.0])], buffers, [_packed(True)], lr=0.25)
    assert params[0].item() == 1.0
    assert buffers[0].item() == 5.0
    reference.masked_sgd_(params, [tensor([4.0])], [], [_packed(True)], lr=0.25)
    assert params[0].item() == 0.0


def test_masked_adamw():
    # Step 2: the mean is 0.5 * 1 + 0.5 * 3 = 2, corrected 2 / 0.75; the square 0.75 * 4 + 0.25 * 9 = 5.25,
    # corrected 5.25 / 0.4375 = 12; the parameter 10 * (1 - 0.1 * 0.5) - 0.1 * (8 / 3) / (sqrt(12) + 1).
    for step in (2, tensor(2.0)):
        params = [tensor([10.0, 10.0]).double()]
        means, squares = [tensor([1.0, 1.0]).double()], [tensor([4.0, 4.0]).double()]
        reference.masked_adamw_(
            params,
            [tensor([3.0, NAN]).double()],
            means,
            squares,
            [_packed(True, False)],
            step=step,
            lr=0.1,
            beta1=0.5,
            beta2=0.75,
            eps=1.0,
            weight_decay=0.5,
        )
        assert (means[0][0].item(), squares[0][0].item()) == pytest.approx((2.0, 5.25))
        assert params[0][0].item() == pytest.approx(9.5 - 0.1 * (8 / 3) / (math.sqrt(12) + 1))
        assert (params[0][1].item(), means[0][1].item(), squares[0][1].item()) == (10.0, 1.0, 4.0)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_first_adamw_step_moves_by_the_learning_rate(maximize):
    params = [torch.zeros(3).double()]
    reference.masked_adamw_(
        params,
        [tensor([5.0, -0.1, 2e-3]).double()],
        [torch.zeros(3).double()],
        [torch.zeros(3).double()],
        [_packed(True, True, True)],
        step=1,
        lr=0.25,
        eps=0.0,
        maximize=maximize,
    )
    expected = [-0.25, 0.25, -0.25]
    assert params[0].tolist() == pytest.approx([-x for x in expected] if maximize else expected)


@pytest.mark.parametrize(
    "make, run",
    [
        (
            lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
            lambda p, g, state, step: reference.masked_sgd_(
                [p], [g], [state[0]], [ALL], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
            ),
        ),
        (
            lambda params: torch.optim.AdamW(params, lr=0.1, betas=(0.7, 0.9), weight_decay=0.1),
            lambda p, g, state, step: reference.masked_adamw_(
                [p],
                [g],
                [state[0]],
                [state[1]],
                [ALL],
                step=step,
                lr=0.1,
                beta1=0.7,
                beta2=0.9,
                weight_decay=0.1,
            ),
        ),
    ],
    ids=["sgd", "adamw"],
)
def test_full_masks_give_the_optimizers_of_torch(make, run):
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(11, dtype=torch.float64))
    ours, state = theirs.detach().clone(), torch.zeros(2, 11, dtype=torch.float64)
    optimizer = make([theirs])
    for step in range(1, 6):
        theirs.grad = torch.randn(11, dtype=torch.float64)
        run(ours, theirs.grad, state, step)
        optimizer.step()
        assert torch.allclose(ours, theirs, rtol=1e-13, atol=0)


def test_gram():
    gram = torch.eye(2)
    reference.gram_accumulate_(gram, tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
    assert gram.tolist() == [[11.0, 14.0], [14.0, 21.0]]
    reference.gram_accumulate_(gram, tensor([1.0, -1.0]))
    assert gram.tolist() == [[12.0, 13.0], [13.0, 22.0]]
    reference.gram_accumulate_(gram, torch.zeros(0, 2))
    assert gram.tolist() == [[12.0, 13.0], [13.0, 22.0]]


def test_gram_of_a_padded_signal():
    # Patches of [1 2 3] with one zero before: (0 1), (1 2), (2 3).
    gram = torch.zeros(2, 2)
    reference.gram_conv_accumulate_(
        gram, tensor([[[1.0, 2.0, 3.0]]]), kernel_size=2, stride=1, padding=[(1, 0)], dilation=1
    )
    assert gram.tolist() == [[5.0, 8.0], [8.0, 14.0]]


def test_gram_of_a_strided_dilated_image_with_two_channels():
    # One patch per image: pixels (0, 0), (0, 2) of both channels.
    image = torch.arange(18.0).view(1, 2, 3, 3)
    gram = torch.zeros(4, 4)
    reference.gram_conv_accumulate_(
        gram, image, kernel_size=[1, 2], stride=[3, 1], padding=0, dilation=[1, 2]
    )
    row = tensor([0.0, 2.0, 9.0, 11.0])
    assert torch.equal(gram, torch.outer(row, row))


@pytest.mark.parametrize(
    "shape, weight, options",
    [
        ((2, 3, 12), (4, 3, 3), {"stride": 2, "padding": 1, "dilation": 2}),
        ((2, 4, 9, 8), (6, 2, 3, 2), {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "groups": 2}),
        ((2, 3, 5, 4, 6), (6, 1, 2, 3, 1), {"stride": 1, "padding": 1, "dilation": 1, "groups": 3}),
    ],
    ids=["1d", "2d", "3d"],
)
def test_gram_gives_the_energy_of_a_convolution(shape, weight, options):
    torch.manual_seed(0)
    inputs = torch.randn(shape, dtype=torch.float64)
    weights = torch.randn(weight, dtype=torch.float64)
    groups, d = options.get("groups", 1), math.prod(weight[1:])
    gram = torch.zeros((groups, d, d) if groups > 1 else (d, d), dtype=torch.float64)
    reference.gram_conv_accumulate_(gram, inputs, kernel_size=weight[2:], **options)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape) - 2]
    energy = conv(inputs, weights, **options).square().sum(dim=[0, *range(2, len(shape))])
    rows = weights.view(groups, -1, d)
    quadratic = torch.einsum("goi,gij,goj->go", rows, gram.view(groups, d, d), rows)
    assert torch.allclose(energy, quadratic.flatten(), rtol=1e-12)


def test_paddings_can_be_written_in_four_ways():
    inputs = torch.arange(30.0).view(1, 1, 5, 6)
    grams = []
    for padding in (1, [1, 1], [(1, 1), 1], [1, 1, 1, 1]):
        gram = torch.zeros(4, 4)
        reference.gram_conv_accumulate_(gram, inputs, kernel_size=2, stride=1, padding=padding, dilation=1)
        grams.append(gram)
    assert all(torch.equal(gram, grams[0]) for gram in grams)


def test_projections():
    grad = tensor([[3.0, 4.0, 5.0], [1.0, 1.0, 0.0]])
    diagonal = tensor([[0.6], [0.8], [0.0]])
    # Coefficients 1.8 + 3.2 = 5 and 0.6 + 0.8 = 1.4.
    assert torch.allclose(
        reference.project_onto(grad, diagonal), tensor([[3.0, 4.0, 0.0], [0.84, 1.12, 0.0]])
    )
    assert torch.allclose(
        reference.project_out(grad, diagonal), tensor([[0.0, 0.0, 5.0], [0.16, -0.12, 0.0]]), atol=1e-6
    )


def test_projections_on_nothing_and_on_everything():
    grad, full = torch.arange(6.0).view(2, 3), torch.eye(3)
    assert torch.equal(reference.project_out(grad, full[:, :0]), grad)
    assert torch.equal(reference.project_onto(grad, full[:, :0]), torch.zeros(2, 3))
    assert torch.equal(reference.project_out(grad, full), torch.zeros(2, 3))
    assert torch.equal(reference.project_onto(grad, full), grad)


def test_projections_of_groups_are_those_of_each():
    grad = torch.arange(24.0).view(4, 3, 2)
    bases = torch.stack([torch.eye(6)[:, :2], torch.eye(6)[:, 3:5]])
    expected = grad.clone().view(4, 6)
    expected[:2, :2] = 0
    expected[2:, 3:5] = 0
    assert torch.equal(reference.project_out(grad, bases), expected.view(4, 3, 2))
    one, other = grad.clone(), [grad.clone()]
    reference.project_out_(one, bases)
    reference.project_out_(other, [bases])
    assert torch.equal(one, expected.view(4, 3, 2))
    assert torch.equal(other[0], one)


def test_projections_are_differentiable():
    torch.manual_seed(0)
    grad = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    basis = torch.linalg.qr(torch.randn(4, 2, dtype=torch.float64)).Q
    assert torch.autograd.gradcheck(lambda g: reference.project_out(g, basis), (grad,))
    assert torch.autograd.gradcheck(lambda g: reference.project_onto(g, basis), (grad,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    # Each half of this step is half a spacing below 1 and would be lost on its own.
    half = torch.finfo(dtype).eps / 4
    param = tensor([1.0], dtype=dtype)
    reference.masked_sgd_(
        [param], [tensor([half], dtype=dtype)], [tensor([half])], [_packed(True)], lr=1.0, momentum=1.0
    )
    assert param.item() == 1.0 - 2 * half
    grad = tensor([1e-4], dtype=dtype)
    fisher = [torch.zeros(1)]
    reference.fisher_accumulate_(fisher, [grad])
    assert fisher[0].item() == pytest.approx(1e-8, rel=1e-2)
