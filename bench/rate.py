"""This machine's float32 product rate now, as one JSON line: what the share of it (MFU) in the same round is taken of."""

from __future__ import annotations

import argparse

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    import torch

    from tutelage.plan.machine import gemm_rate

    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.inference_mode():
        rate = gemm_rate(torch.float32, args.seconds)
    common.emit("rate", "float32 products", flops_per_s=round(rate))


if __name__ == "__main__":
    main()
