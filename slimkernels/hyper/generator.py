"""``WeightGenerator``: the weights of a network at any width, from coordinate networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import elastic
from slimkernels.elastic.plan import Width, unwrap
from slimkernels.elastic.trace import as_call
from slimkernels.hyper.networks import InrNetworks, auto_bands
from slimkernels.hyper.permutation import permutation_of
from slimkernels.hyper.state import changed, difference, fingerprint
from slimkernels.hyper.targets import Tile, _fits, check_blocks, elastic_copy, find
from slimkernels.ops.inr_weights import COMPAT, NOISE

_FORMAT = "slimkernels.hyper/1"


class WeightGenerator(nn.Module):
    """Generates tensors of a network at a width: ``gen(width)`` gives weights for ``torch.func.functional_call``.

    With ``base="residual"`` a generated tensor is the leading slice of the target's own weight plus the output of its
    network, which starts at zero: every width starts as the sliced pre-trained network. Without base the scale of each
    tensor's output is learned and starts where the generated tensor is as large as the target's (with base: where an
    output of one is).

    The target is copied, and none of its parameters is trained (see ``train_extras`` and ``train_base``). Weights are
    returned with their gradient and never written into the target.

    Args:
        target: an elastic network (``elastic.convert``), or a plain one, which is then converted: its width dimensions
            tell which tensors shrink together.
        tensors: names or globs of parameters, or of modules with all that is inside; weights and biases of Linear and
            convolution layers can be generated. Parameters that are not trained (``requires_grad=False``, where
            others are) have to be named in full.
        example_inputs: for a plain target; ``convert`` is then called with it and the keywords in ``convert``.
        hidden, layers: size and number of layers of a coordinate network.
        bands: frequencies of its input encoding; "auto" takes as many as the largest tensor needs.
        size_bands: of them, those for the active sizes, and none for coordinates that never change; None: all of them for
            every coordinate, as published.
        positions: "relative" puts channel a of C at a / C, as published: a channel moves when the width changes. "absolute"
            keeps it where it is at full width, so that what is learned for a channel holds at widths between those
            trained. None: absolute with base "residual" and networks per tensor, else relative.
        skip: the residual scalars of its layers at the start; published: 0.1, with which it learns several times slower.
        standardized: without base, give every output channel of a matrix mean 0 and the variance that keeps that of the
            activations, at every width: training from scratch needs it where no batch norm follows. "centered" takes
            out what all output channels have in common as well: networks start smooth, and kernels nearly equal.
        mlp: a network for each tensor ("per_tensor") or one for all ("shared").
        noise: "axis" or "element" shifts coordinates at random in training mode, and for the mean over samples; "none".
        compat: "neumeta" or "htty": order of the encoding's columns and limit of the noise, for published weights
            (``load_published``).
        norm: divides the coordinates that say how large the network is; None: the largest of them.
        tile: (output, input) channels that one coordinate emits together, for matrices and 1x1 convolutions; or a dict
            of them by tensor name or glob, for any tensor.
        blocks: modules whose tensors get networks of their own parameters, to be trained one after another.

    Raises: ValueError when an argument does not fit, a name fits no tensor, or the target cannot be converted.
    Source: Yang et al., Neural Metamorphosis (arXiv 2410.11878); Sommariva et al. (arXiv 2505.05510).
    """

    def __init__(
        self,
        target: nn.Module,
        tensors: str | Sequence[str] = "*",
        *,
        hidden: int = 256,
        layers: int = 4,
        bands: int | str = "auto",
        size_bands: int | None = 1,
        positions: str | None = None,
        skip: float = 1.0,
        standardized: bool | str = False,
        activation: str = "relu",
        base: str | None = "residual",
        mlp: str = "per_tensor",
        noise: str = "axis",
        compat: str = "neumeta",
        norm: float | None = None,
        tile: Tile | Mapping[str, Tile] | None = None,
        blocks: Sequence[str] | None = None,
        example_inputs: Any = None,
        convert: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check("base", base, ("residual", None))
        _check("mlp", mlp, ("per_tensor", "shared"))
        _check("noise", noise, NOISE)
        _check("compat", compat, COMPAT)
        _check("positions", positions, (None, "relative", "absolute"))
        for name, value, least in (("hidden", hidden, 1), ("layers", layers, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"WeightGenerator: expected {name} to be an integer of at least {least}, got {value!r}"
                )
        if bands != "auto" and (isinstance(bands, bool) or not isinstance(bands, int) or bands < 1):
            raise ValueError(f"WeightGenerator: expected bands to be a positive integer or 'auto', got {bands!r}")
        if size_bands is not None and (
            isinstance(size_bands, bool) or not isinstance(size_bands, int) or size_bands < 0
        ):
            raise ValueError(f"WeightGenerator: expected size_bands to be an integer or None, got {size_bands!r}")
        if norm is not None and not norm > 0:
            raise ValueError(f"WeightGenerator: expected norm to be positive or None, got {norm!r}")
        _check("standardized", standardized, (False, True, "centered"))
        if standardized and base is not None:
            raise ValueError(f"WeightGenerator: expected standardized weights without base only, got base={base!r}")
        if positions == "absolute" and mlp == "shared":
            raise ValueError(
                "WeightGenerator: expected absolute positions with mlp='per_tensor' only, got mlp='shared'"
            )
        if positions is None:
            positions = "absolute" if base is not None and mlp == "per_tensor" else "relative"
        self.positions = positions
        self.base, self.noise, self.standardized, self.compat = base, noise, standardized, compat
        self.base_trained = False
        self.target = elastic_copy(target, example_inputs, convert)
        plan = elastic.plan(self.target)
        self.targets = find(self.target, plan, tensors, tile)
        self.target.requires_grad_(
            False
        ).train()  # like the generator: batch norms of a pre-trained net were in eval mode
        self.blocks = check_blocks(blocks, self.targets)
        full = plan.units("WeightGenerator", 1.0)
        sizes = [size for t in self.targets for size in t.active(full)]
        count = auto_bands(self.targets, full) if isinstance(bands, str) else bands
        self.norm = float(max(len(self.targets), *sizes) if norm is None else norm)
        options: dict[str, Any] = {
            "total": len(self.targets),
            "norm": self.norm,
            "compat": compat,
            "hidden": hidden,
            "layers": layers,
            "bands": count,
            "size_bands": None if size_bands is None else min(size_bands, count),
            "skip": skip,
            "standardized": standardized,
            "outputs": max(t.outputs for t in self.targets),
            "activation": activation,
            "shared": mlp == "shared",
            "zero": base is not None,
            "absolute": positions == "absolute",
        }
        self.networks = nn.ModuleList()
        first = 0
        parts: list[str | None] = [*self.blocks] or [None]
        for block in parts:
            members = [t for t in self.targets if block is None or _fits(t.name, block)]
            self.networks.append(InrNetworks(members, first=first, **options))
            first += len(members)
        for networks in self._parts():
            if base is None:
                networks.match(full, self.originals())
            else:
                networks.scale_to(full, self.originals())

    def forward(
        self,
        width: Width = 1.0,
        samples: int = 1,
        *,
        seed: int | Tensor | None = None,
        first_sample: int = 0,
        blocks: int | None = None,
    ) -> dict[str, Tensor]:
        """Generated tensors by parameter name, each of its active size.

        In training mode, with several ``samples`` or with a ``seed``, coordinates are shifted by noise and the mean over
        the samples is returned; otherwise there is no noise. The seed is drawn from torch's generator in training mode
        and 0 in evaluation mode; the mean over K samples is that of K calls with ``first_sample`` 0 to K - 1.

        Args:
            width: as in ``elastic.set_width``.
            blocks: generate the tensors of so many of the first ``blocks``; None: of all.

        Raises: ValueError when the target has no such width.
        """
        units = elastic.plan(self.target).units("WeightGenerator", width)
        noisy = self.noise != "none" and (self.training or samples > 1 or seed is not None)
        if noisy and seed is None:
            seed = torch.randint(2**62, (), dtype=torch.int64) if self.training else 0
        return self._generate(units, self.noise if noisy else "none", seed, samples, first_sample, blocks)

    def _generate(self, units, noise, seed, samples, first_sample=0, blocks=None) -> dict[str, Tensor]:
        originals = self.originals()
        weights: dict[str, Tensor] = {}
        for networks in self._parts()[:blocks]:
            weights |= networks(
                units,
                None if self.base is None else originals,
                [originals[name].dtype for name in networks.names],
                noise=noise,
                seed=seed,
                samples=samples,
                first_sample=first_sample,
            )
        return weights

    def _parts(self) -> list[InrNetworks]:
        return [part for part in self.networks if isinstance(part, InrNetworks)]

    def originals(self) -> dict[str, nn.Parameter]:
        """The target's own tensors, at full size, that generated ones stand for."""
        parameters = dict(self.target.named_parameters())
        return {target.name: parameters[target.name] for target in self.targets}

    def placed(self, weights: Mapping[str, Tensor], width: Width) -> dict[str, Tensor]:
        """The weights as the layers of the elastic target read them at ``width``.

        Layers that pick their active inputs from the full weight (after a concat, or in groups) get it at full size.
        """
        units = elastic.plan(self.target).units("WeightGenerator", width)
        by_name = {t.name: t for t in self.targets}
        return {name: by_name[name].put(w, units) if by_name[name].placed else w for name, w in weights.items()}

    def call(self, inputs: Any, width: Width = 1.0, weights: Mapping[str, Tensor] | None = None) -> Any:
        """The target's output at ``width`` with generated weights (``weights``, or those of ``gen(width)``)."""
        weights = self(width) if weights is None else weights
        args, kwargs = as_call(inputs)
        with elastic.width(self.target, width):
            return torch.func.functional_call(self.target, self.placed(weights, width), args, kwargs)

    @torch.no_grad()
    def materialize(
        self,
        width: Width = 1.0,
        samples: int = 1,
        *,
        seed: int = 0,
        blocks: int | None = None,
        noisy: bool | None = None,
    ) -> nn.Module:
        """A plain network of torch layers at ``width`` that has the generated weights.

        Args:
            noisy: shift coordinates; None: with several ``samples`` only.

        Raises: ValueError when the target has no such width.
        """
        units = elastic.plan(self.target).units("WeightGenerator", width)
        plain = elastic.extract(self.target, width)
        parameters = dict(plain.named_parameters())
        noise = self.noise if (samples > 1 if noisy is None else noisy) else "none"
        for name, weight in self._generate(units, noise, seed, samples, 0, blocks).items():
            parameters[name].copy_(weight)
        return plain

    @torch.no_grad()
    def write_into(self, model: nn.Module, samples: int = 1, *, seed: int = 0) -> None:
        """Generate every tensor at full width into the parameters of an elastic model like the target.

        Raises: ValueError when the model lacks a tensor or has it in another shape; nothing is written then.
        """
        elastic.plan(model)
        parameters = dict(unwrap(model).named_parameters())
        for target in self.targets:
            shape = tuple(parameters[target.name].shape) if target.name in parameters else None
            if shape != target.shape:
                raise ValueError(
                    f"write_into: expected a model with a tensor {target.name!r} of shape {target.shape}, got"
                    f" {'none of that name' if shape is None else shape}"
                )
        units = elastic.plan(self.target).units("write_into", 1.0)
        noise = self.noise if samples > 1 else "none"
        for name, weight in self._generate(units, noise, seed, samples).items():
            parameters[name].copy_(weight)

    def train_extras(self, names: str | Sequence[str]) -> list[nn.Parameter]:
        """Let parameters of the target that are not generated be trained (head, scalars); all widths share them.

        Raises: ValueError when a name or glob fits none.
        """
        generated = {target.name for target in self.targets}
        others = {n: p for n, p in self.target.named_parameters() if n not in generated}
        found: dict[str, nn.Parameter] = {}
        for pattern in [names] if isinstance(names, str) else names:
            fitting = {n: p for n, p in others.items() if _fits(n, pattern)}
            if not fitting:
                raise ValueError(
                    f"WeightGenerator: expected names or globs of tensors that are not generated, got {pattern!r}, which"
                    " fits none"
                )
            found |= fitting
        for parameter in found.values():
            parameter.requires_grad_(True)
        return list(found.values())

    def train_base(self) -> list[nn.Parameter]:
        """Let the weights that residuals are added to be trained as well; all widths share them, each its leading slice.

        Raises: ValueError without base.
        """
        if self.base is None:
            raise ValueError("WeightGenerator: expected base='residual' to train the base of, got base=None")
        self.base_trained, found = True, list(self.originals().values())
        for parameter in found:
            parameter.requires_grad_(True)
        return found

    def trained_parameters(self) -> list[nn.Parameter]:
        """What an optimizer gets: the coordinate networks, the scales, the extras and a base that is trained."""
        return [*self.networks.parameters(), *self.extras()]

    def extras(self) -> list[nn.Parameter]:
        """Trained parameters of the target itself."""
        return [p for p in self.target.parameters() if p.requires_grad]

    @torch.no_grad()
    def init_from(self, previous_block: str, block: str, source: "WeightGenerator | None" = None) -> list[str]:
        """Start the networks of ``block`` as copies of those of ``previous_block``, tensor by tensor of the same name.

        Args:
            source: the generator that has the previous block, with networks of the same size; None: this one.

        Returns: the tensors whose networks were copied.
        Raises: ValueError when no tensor of the two blocks fits, or the networks have other sizes.
        """
        theirs = (self if source is None else source)._members(previous_block)
        ours = self._members(block)
        common = [rest for rest in ours if rest in theirs]
        if not common:
            raise ValueError(
                f"init_from: expected tensors of the same names in {previous_block!r} and {block!r}, got"
                f" {', '.join(theirs) or 'none'} and {', '.join(ours) or 'none'}"
            )
        for rest in common:
            for mine, other in zip(ours[rest], theirs[rest], strict=True):
                if mine.shape != other.shape:
                    raise ValueError(
                        f"init_from: expected networks of one size, got {tuple(other.shape)} for"
                        f" {previous_block + rest!r} and {tuple(mine.shape)} for {block + rest!r}"
                    )
                mine.copy_(other)
        return [block + rest for rest in common]

    def _members(self, block: str) -> dict[str, list[Tensor]]:
        """Network parameters of every tensor inside a module, by the rest of the tensor's name."""
        found = {}
        for networks in self._parts():
            for i, target in enumerate(networks.targets):
                if target.name.startswith(block + "."):
                    found[target.name.removeprefix(block)] = networks.of(i)
        return found

    def get_extra_state(self) -> dict[str, Any]:
        plan = elastic.plan(self.target)
        return {
            "format": _FORMAT,
            "base": self.base or "none",
            "compat": self.compat,
            "norm": self.norm,
            "positions": self.positions,
            "tensors": [[t.name, *t.shape] for t in self.targets],
            "tiles": [list(t.tile) for t in self.targets],
            "groups": {group.name: group.units for group in plan.groups.values()},
            "divisor": plan.divisor,
            "permutation": permutation_of(self.target),
            "weights": None if self.base is None or self.base_trained else fingerprint(self.originals()),
        }

    def set_extra_state(self, state: Any) -> None:
        """Raises: ValueError when the state is of a generator for another target."""
        ours = self.get_extra_state()
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError("WeightGenerator: expected the state of a WeightGenerator, got another one")
        for key, what in (("tensors", "tensors"), ("groups", "width dimensions"), ("divisor", "divisor")):
            if state[key] != ours[key]:
                raise ValueError(
                    f"WeightGenerator: the state is of another target: expected {what} {difference(ours[key], state[key])}"
                )
        for key in ("base", "tiles", "compat", "norm", "positions"):
            theirs = state.get(key, "relative" if key == "positions" else ours[key])  # the last three came later
            if theirs != ours[key]:
                raise ValueError(f"WeightGenerator: expected a state with {key} {ours[key]}, got {theirs}")
        if ours["weights"] is not None and state.get("weights") is not None:
            name = changed(ours["weights"], state["weights"], [t.name for t in self.targets])
            if name is not None:
                raise ValueError(
                    "WeightGenerator: the state is of another target: expected one with the same pre-trained weights, which"
                    f" the residual is added to, got other weights in {name!r}"
                )
        if state["permutation"] is not None:
            self.target.__dict__["_permutation"] = state["permutation"]


def full_units(generator: WeightGenerator) -> dict[str, int]:
    """Active units of every width dimension at full width."""
    return elastic.plan(generator.target).units("WeightGenerator", 1.0)


def _check(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"WeightGenerator: expected {name} to be one of {choices}, got {value!r}")
