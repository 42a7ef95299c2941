"""What the kernels in plain PyTorch cost: python -m bench.fallback prints the ratios of docs/install.md.

Both kinds of kernels in one process, one thread, in turns; medians of the processor time, which other
processes do not change as much as the time of the clock.
"""

import statistics
import time
from collections.abc import Callable

import torch

from unlearn_ext import ops
from unlearn_ext.ops import fallback

LAPS = 7

# Shapes of a small ResNet: 1.2 M scalars in 62 tensors.
SHAPES = [(64, 64, 3, 3)] * 30 + [(64,)] * 30 + [(100, 640), (100,)]


def cases(generator: torch.Generator) -> dict[str, tuple[str, list, dict]]:
    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    def lists():
        return [drawn(*shape) for shape in SHAPES]

    params, grads, momentum = lists(), lists(), lists()
    full, forget = ([t.exp() for t in lists()] for _ in range(2))
    masks = [ops.pack_mask(t > 0) for t in grads]
    basis = torch.linalg.qr(drawn(576, 64))[0]
    convolution = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    return {
        "fisher_accumulate_": ("fisher_accumulate_", [full, grads], {}),
        "fisher_linear_, vectors (32, 512 to 512)": (
            "fisher_linear_",
            [torch.zeros(512, 512), drawn(32, 512), drawn(32, 512)],
            {},
        ),
        "fisher_linear_, sequences of 64 (32, 256 to 256)": (
            "fisher_linear_",
            [torch.zeros(256, 256), drawn(32, 64, 256), drawn(32, 64, 256)],
            {},
        ),
        "fisher_conv_, 3 x 3 (32, 64 to 64, 16 x 16)": (
            "fisher_conv_",
            [torch.zeros(64, 64, 3, 3), drawn(32, 64, 16, 16), drawn(32, 64, 16, 16)],
            convolution,
        ),
        "fisher_embedding_, 20,000 rows (16 x 64)": (
            "fisher_embedding_",
            [
                torch.zeros(20_000, 128),
                torch.randint(20_000, (16, 64), generator=generator),
                drawn(16, 64, 128),
            ],
            {},
        ),
        "selective_dampen_": ("selective_dampen_", [params, full, forget], {"alpha": 10.0, "lambda_": 1.0}),
        "selected_counts, 20 thresholds": (
            "selected_counts",
            [full, forget, [1.5**i for i in range(20)]],
            {},
        ),
        "ratio_quantile": ("ratio_quantile", [full, forget, 0.9], {}),
        "topk_mask": ("topk_mask", [grads, 500_000], {}),
        "masked_sgd_": ("masked_sgd_", [params, grads, momentum, masks], {"lr": 0.0, "momentum": 0.9}),
        "gram_accumulate_, 4096 x 512": ("gram_accumulate_", [torch.zeros(512, 512), drawn(4096, 512)], {}),
        "project_out_, 64 of 576 dimensions": ("project_out_", [drawn(256, 64, 3, 3), basis], {}),
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print("| op | compiled, ms | plain PyTorch takes |\n|---|---|---|")
    for name, (op, args, settings) in cases(torch.Generator().manual_seed(0)).items():
        packet = getattr(torch.ops.unlearn_ext, op).default

        def ours(packet=packet, args=args, settings=settings):
            packet(*args, **settings)

        def plain(op=op, args=args, settings=settings):
            fallback.KERNELS[op](*args, **settings)

        laps = [(seconds(ours), seconds(plain)) for _ in range(LAPS + 1)][1:]
        compiled = statistics.median(lap[0] for lap in laps)
        ratio = statistics.median(lap[1] / lap[0] for lap in laps)
        print(
            f"| `{name.partition(',')[0]}`{name[len(name.partition(',')[0]) :]} | {1e3 * compiled:.2f} | {ratio:.1f}x |"
        )


if __name__ == "__main__":
    main()
