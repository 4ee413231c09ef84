"""Drop-in slimmable modules: subclasses of the torch modules with the same constructors and state_dict keys."""

from slimkernels.nn.linear import SlimLinear

__all__ = ["SlimLinear"]
