"""What every slimmable module shares: the active output width and, after a concat, the gather of active inputs."""

import torch
from torch import Tensor


class SlimModule:
    """Mixin of the slimmable modules, placed before the torch module it extends.

    The active output width is carried as the shape of an empty tensor attribute: torch.compile then treats it as a dynamic
    integer with no flag set, where a plain int attribute would make one graph a width. The active *input* width is never stored:
    it is the input's shape. The one exception is an input that is a concat of differently slimmed parts, whose active channels
    are no leading slice: ``in_index`` then lists them. Outputs that are no leading slice (the halves of a gated convolution) are
    listed by ``out_index``.
    """

    _width: Tensor
    in_index: (
        Tensor | None
    )  # (k,) int64 positions of the active inputs in the full weight, or None: a leading (block) slice
    out_index: Tensor | None  # (n,) likewise of the outputs; of a convolution without groups or a linear layer

    def _init_width(self, full: int) -> None:
        self.full_width = full
        self.in_index = self.out_index = None
        self._set_width(full)

    def _set_width(self, n: int) -> None:
        # Past nn.Module's setattr, which costs more than all else here; a training step sets every width several times.
        known = self.__dict__.get("_width")
        if known is None or known.shape[0] != n:
            self.__dict__["_width"] = torch.empty((n, 0))

    @property
    def width(self) -> int:
        """Active number of outputs (channels or features, all blocks together)."""
        return self._width.shape[0]

    def set_width(self, n: int | None) -> None:
        """Run on the first ``n`` outputs from now on; None means all of them.

        Raises: ValueError when ``n`` is not between 1 and the full width.
        """
        n = self.full_width if n is None else n
        self._check_width(n)
        self._set_width(n)

    def _check_width(self, n: int) -> None:
        if not isinstance(n, int) or not 1 <= n <= self.full_width:
            raise ValueError(f"{type(self).__name__}: expected a width between 1 and {self.full_width}, got {n}")
