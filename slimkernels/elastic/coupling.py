"""Which positions of the sliced dimensions of a model are coupled."""

IS_OUTPUT = "its channels are an output of the network"
SINGLE = "it has one channel"


class Coupling:
    """Union-find over the positions of every sliced dimension."""

    def __init__(self) -> None:
        self.offsets: dict[tuple[str, str], tuple[int, int]] = {}  # (module, side) -> (first node, size)
        self.parent: list[int] = []
        self.poison: list[tuple[int, str]] = []  # (node, reason)
        self.known: set[tuple[str, str]] = set()  # dimensions that the trace reached
        self.summed: set[int] = set()  # nodes that an operation of the network's own sums over
        self.heads = False  # whether there are products of several heads

    def add(self, module: str, side: str, size: int) -> None:
        self.offsets[module, side] = (len(self.parent), size)
        self.parent.extend(range(len(self.parent), len(self.parent) + size))

    def find(self, node: int) -> int:
        root = node
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[node] != root:
            self.parent[node], node = root, self.parent[node]
        return root

    def union(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)

    def node(self, key: tuple[str, str], position: int) -> int:
        return self.offsets[key][0] + position

    def labels(self, key: tuple[str, str]) -> list[int]:
        start, size = self.offsets[key]
        return [self.find(i) for i in range(start, start + size)]

    def poison_all(self, key: tuple[str, str], reason: str) -> None:
        start, size = self.offsets[key]
        self.poison.extend((i, reason) for i in range(start, start + size))
