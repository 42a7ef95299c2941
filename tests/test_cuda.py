"""What only CUDA has: graphs, asynchronous launches, several devices, a caching allocator.

That every op computes the same there as on the CPU is among the tests of the ops themselves.
"""

import pytest
import torch
from op_cases import CASES, assert_same_bits, assert_within, copied, mapped, tensors_of

import unlearn_ext as ux
from unlearn_ext import ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and ops.build_info()["cuda"]),
        reason="needs a GPU and a build with CUDA",
    ),
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.schema)
# ratio_quantile reads one number back, to raise an error where no ratio is finite.
each_asynchronous_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.name != "ratio_quantile"], ids=lambda case: case.schema
)
# Some 50 to 200 milliseconds on any card.
SLEEP = 200_000_000


def _sample(case, generator, variant=None, device="cuda"):
    return case.sample(device, case.dtypes[0], generator, variant or case.variants[0])


@each_asynchronous_case
def test_ops_do_not_wait_for_the_device(case, generator):
    variants = [case.variants[0], *(["large"] if "large" in case.variants else [])]
    for variant in variants:
        args, kwargs = _sample(case, generator, variant)
        # Loads the kernels, and fills the allocator's pools with what both calls below will ask for.
        kept = [case.overload(*copied(args), **kwargs) for _ in range(2)]
        del kept
        arguments = [copied(args) for _ in range(2)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(SLEEP)
            results = [case.overload(*each, **kwargs) for each in arguments]
            end = torch.cuda.Event()
            end.record()
            assert not end.query(), "the call came back after the device had finished"
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        del results


def test_a_list_of_several_dtypes_does_not_wait_either(generator):
    lists = [
        [torch.rand(5, generator=generator).to("cuda", dtype) for dtype in (torch.float32, torch.float64)]
        for _ in range(2)
    ]
    expected = ops.selected_counts(*lists, [1.0, 2.0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts = ops.selected_counts(*lists, [1.0, 2.0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(counts, expected)


@each_asynchronous_case
def test_ops_are_captured_in_graphs(case, generator):
    args, kwargs = _sample(case, generator)
    expected = case.run(case.overload, copied(args), kwargs)
    static = copied(args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.overload(*copied(args), **kwargs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.overload(*static, **kwargs)
    for _ in range(2):
        for tensor, value in zip(tensors_of(static), tensors_of(args), strict=True):
            tensor.copy_(value)
        graph.replay()
        for output, wanted in zip(case.outputs(static, result), expected, strict=True):
            assert_same_bits(output, wanted)


@each_case
def test_calls_keep_no_memory(case, generator):
    args, kwargs = _sample(case, generator)
    for _ in range(3):
        case.overload(*args, **kwargs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        case.overload(*args, **kwargs)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@each_case
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ops_run_on_a_device_that_is_not_the_current_one(case, generator):
    args, kwargs = _sample(case, generator, device="cuda:1")
    expected, bounds = case.expect(args, kwargs)
    outputs = case.run(case.overload, args, kwargs)
    assert_within(outputs, expected, bounds)
    assert torch.cuda.current_device() == 0
    assert {output.device for output in outputs} <= {torch.device("cuda:1")}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_call_takes_tensors_of_two_devices(generator):
    grads = [torch.randn(1000, generator=generator).to(f"cuda:{i % 2}") for i in range(5)]
    fisher = [torch.zeros_like(grad) for grad in grads]
    ops.fisher_accumulate_(fisher, grads)
    for total, grad in zip(fisher, grads, strict=True):
        assert_same_bits(total, grad.square())


@pytest.mark.parametrize("case", [c for c in CASES if "large" in c.variants], ids=lambda case: case.schema)
def test_results_do_not_depend_on_what_else_the_device_does(case, generator):
    args, kwargs = _sample(case, generator, "large")
    expected = case.run(case.overload, copied(args), kwargs)
    busy, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(3):
        with torch.cuda.stream(busy):
            noise = (noise @ noise).clamp(-1, 1)
        for output, wanted in zip(case.run(case.overload, copied(args), kwargs), expected, strict=True):
            assert_same_bits(output, wanted)
    torch.cuda.synchronize()


def test_graph_replays_of_a_masked_step_follow_new_gradients(generator):
    # As a training loop uses it: gradients are written into the same memory before every replay.
    param = torch.randn(257, device="cuda")
    grad, momentum = torch.zeros_like(param), torch.zeros_like(param)
    mask = ops.pack_mask(torch.rand(257, generator=generator).cuda() < 0.5)
    eager = [tensor.clone() for tensor in (param, momentum)]
    options = {"lr": 0.1, "momentum": 0.9}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.masked_sgd_([param], [grad], [momentum], [mask], **options)
    for _ in range(3):
        grad.copy_(torch.randn(257, generator=generator))
        graph.replay()
        ops.masked_sgd_([eager[0]], [grad], [eager[1]], [mask], **options)
        assert_same_bits(param, eager[0])
        assert_same_bits(momentum, eager[1])


def test_importances_move_between_devices(generator):
    values = {"weight": torch.rand(70, generator=generator)}
    here = ux.Importance.from_dict(values, 10)
    there = ux.Importance.from_dict(mapped(torch.Tensor.cuda, values), 10)
    torch.testing.assert_close((there + here)["weight"].cpu(), (here + here)["weight"])
