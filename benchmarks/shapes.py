"""The layer shapes of eight networks at four widths (op-shapes.csv) and the rules that make a run short."""

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "op-shapes.csv"
MAX_MACS = 2**27  # of one forward call; about 2 ms on one core
MAX_ELEMENTS = 2**23  # of input and output together
QUICK_WIDTHS = (0.25, 1.0)


@dataclass(frozen=True)
class Shape:
    net: str
    width: float
    op: str  # as in the file, without what stands in brackets
    detail: str  # what stands in brackets: "dil=4", "T=259"
    n: int
    c_in: int
    h: int
    w: int
    c_out: int
    k: int
    stride: int
    pad: int
    groups: int
    count: int
    mmacs: float  # of one sample (image, clip), all rows of a linear layer in it
    heaviest: bool  # of the layers of this op in this net at this width, the one with the most multiply-adds in all


def shapes(op: str, quick: bool = False) -> list[Shape]:
    """Rows of ``op``: conv2d, dwconv2d, conv1d, linear, layernorm, groupnorm or bilstm.

    A shape that a net has twice at a width comes once. ``quick``: of each net only the heaviest, at two widths.
    """
    with FILE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["op"].split("(")[0] == op]
    if not rows:
        raise ValueError(f"shapes: expected op to be one that {FILE.name} lists, got {op!r}")

    def weight(row: dict[str, str]) -> float:
        elements = int(row["N"]) * int(row["Cin"]) * int(row["H"]) * int(row["W"])
        return int(row["count"]) * (float(row["MMACs_per_sample"]) or elements * 1e-6)

    top: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["net"], row["width"]
        top[key] = max(top.get(key, 0.0), weight(row))
    found, seen = [], set()
    for row in rows:
        heaviest = weight(row) == top[row["net"], row["width"]]
        identity = tuple([*row.values()][:12])  # all that makes the shape
        if identity in seen:
            continue
        seen.add(identity)
        if quick and not (heaviest and float(row["width"]) in QUICK_WIDTHS):
            continue
        size = {
            name: int(row[name]) for name in ("N", "Cin", "H", "W", "Cout", "k", "stride", "pad", "groups", "count")
        }
        found.append(
            Shape(
                net=row["net"],
                width=float(row["width"]),
                op=op,
                detail=row["op"].partition("(")[2].rstrip(")"),
                n=size["N"],
                c_in=size["Cin"],
                h=size["H"],
                w=size["W"],
                c_out=size["Cout"],
                k=size["k"],
                stride=size["stride"],
                pad=size["pad"],
                groups=size["groups"],
                count=size["count"],
                mmacs=float(row["MMACs_per_sample"]),
                heaviest=heaviest,
            )
        )
    return found


def reduced(n: int, macs: float, elements: float) -> tuple[int, str]:
    """The batch to run, halved until one call has at most MAX_MACS and MAX_ELEMENTS activations, and a note saying so.

    ``macs`` and ``elements`` are those of one batch item.
    """
    batch = n
    while batch > 1 and (batch * macs > MAX_MACS or batch * elements > MAX_ELEMENTS):
        batch = (batch + 1) // 2
    return batch, "" if batch == n else f"batch {n} halved to {batch}: at most 2^27 MACs and 2^23 activations a call"
