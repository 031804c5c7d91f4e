"""How an aggregator makes itself known: its name, the settings it takes, and whether the order of tiles matters to it.

    @aggregator("ilra", takes=("hidden", "dropout"))
    class ILRA(Aggregator): ...

A file of this package with a class so marked is all that a new aggregator needs: `registry` imports every file here,
tests run over what is registered, and compare schema and guide with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from slidemake.mil.aggregators.base import Aggregator

ATTENTION = ("hidden", "attention", "dropout")  # settings of gated attention and of what builds on it
Made = TypeVar("Made", bound=type[Aggregator])


@dataclass(frozen=True)
class Registered:
    """What builds an aggregator: a class, the settings of a model that it takes, arguments that its name fixes."""

    build: type[Aggregator]
    takes: tuple[str, ...]
    fixed: dict[str, Any]
    in_order: bool


AGGREGATORS: dict[str, Registered] = {}  # by the names that configuration and bundles use


def aggregator(
    name: str, takes: tuple[str, ...] = ATTENTION, in_order: bool = False, **fixed: Any
) -> Callable[[Made], Made]:
    """Register a class under a name. Raises ValueError for a name that is taken."""

    def register(made: Made) -> Made:
        if name in AGGREGATORS:
            raise ValueError(f"aggregator {name!r} is registered already, as {AGGREGATORS[name].build.__name__}")
        AGGREGATORS[name] = Registered(made, takes, fixed, in_order)
        return made

    return register
