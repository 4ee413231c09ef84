"""What ``Deployed.report`` says."""

from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One operation of a deployed network."""

    name: str  # of the layer, or of the operation in the traced graph
    operation: str  # what runs as one
    segment: int  # operations of one segment are one call into C++
    runs_on: str


@dataclass(frozen=True)
class LayerTime:
    """What one operation took as the network ran; several where a layer is several operations."""

    name: str  # of the layer; "" for copies of inputs and outputs and the zeros around an image
    operation: str
    runs_on: str
    seconds: float  # median
    flops: int  # two for a product that is added
    bytes: int  # of inputs, outputs and weights, each once


@dataclass(frozen=True)
class DeployReport:
    """What each layer of a deployed network runs on. ``str()`` is a table."""

    layers: list[LayerReport]
    modules: list[str]  # that PyTorch runs as they are
    others: list[str]  # further operations that PyTorch runs
    stopped: dict[str, str]  # modules that could not be traced ("": the whole network), and the line
    dtype: str
    cached: dict[str, int]  # packed widths and depths, and their bytes
    cache_bytes: int
    max_cache_bytes: int

    def __str__(self) -> str:
        table = Table(title=f"Deployed in {self.dtype}", title_justify="left")
        for column in ("layer", "operation", "segment", "runs on"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            table.add_row(layer.name, layer.operation, str(layer.segment), layer.runs_on)
        for name in self.modules:
            table.add_row(name, "as it is", "-", "PyTorch")
        text = StringIO()
        console = Console(file=text, width=120, legacy_windows=False)
        console.print(table)
        for name, line in self.stopped.items():
            whole = f"{name} is not traced" if name else "The network is not traced"
            console.print(f"{whole}, what it calls is deployed by itself: {line}", highlight=False, markup=False)
        if self.others:
            console.print(f"{len(self.others)} further operations run in PyTorch.", highlight=False)
        sizes = ", ".join(f"{key}: {size:,}" for key, size in self.cached.items())
        console.print(
            f"Packed weights: {self.cache_bytes:,} bytes of at most {self.max_cache_bytes:,} ({sizes}).",
            highlight=False,
            markup=False,
        )
        return text.getvalue()
