"""The fast way as a function of any model: at a named level, or at the fastest that its code can be traced through."""

from mlxdpo.forward.choose_forward import detailed_fns, forward_fns
from mlxdpo.forward.levels import offered_levels
from mlxdpo.forward.rewards import reward_fns


def level_of(model, name=None):
    """A level that the model offers."""
    return next(level for level in offered_levels(model) if name in (None, level.name))


def at_level(name=None, checkpoint=False):
    """(model, batch) -> log-probs of the rows."""
    return lambda model, batch: forward_fns(model, checkpoint, level_of(model, name)).train(model, batch)


def details_at(name=None, checkpoint=False):
    """(model, batch) -> their details."""

    def forward(model, batch):
        fns = forward_fns(model, checkpoint, level_of(model, name))
        return detailed_fns(fns, checkpoint).train(model, batch)

    return forward


def rewards_at(name=None, checkpoint=False):
    """(model, batch) -> rewards of the rows."""
    return lambda model, batch: reward_fns(level_of(model, name), checkpoint).train(model, batch)
