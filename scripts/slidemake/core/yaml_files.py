"""YAML that says what it seems to say: a key once, in UTF-8, of a size and depth that people write.

A YAML parser takes the last of two equal keys without a word, expands ten lines of anchors to a thousand million values
(https://en.wikipedia.org/wiki/Billion_laughs_attack), and follows an anchor that holds itself for ever. The stream of
events is looked at instead, before anything is built from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slidemake.core.failures import RunError

MOST = 100_000  # values, anchors expanded
DEEPEST = 50
_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C: 10 times as fast


def read_yaml(path: str | Path) -> Any:
    """Content of a YAML file. Raises RunError for one that cannot be read or is not what it seems (`problems_of`)."""
    text = _text(path)
    if problems := problems_of(text):
        raise _error(path, problems)
    try:
        return yaml.load(text, Loader=_SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # an anchor given twice, a tag of Python's, the 32nd of May
        raise _error(path, [_invalid(error)]) from error


def check_yaml_files(paths: Iterable[str | Path]) -> None:
    """Look at files of keys and values that another program loads. RunError as `read_yaml`; of absent ones nothing."""
    for path in paths:
        if Path(path).is_file() and not isinstance(read_yaml(path), dict):
            raise _error(path, ["it has no keys at its top level (`key: value`)"])


def check_command(arguments: Iterable[str]) -> None:
    """Look at the configuration files that a command line of Snakemake's names, before Snakemake reads them.

    Called by the profiles, the first code of ours that runs. Ends the process with a message where one is not as it
    should be; Snakemake would show a traceback, or run out of memory. A file that is not there is left to Snakemake.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--configfile", "--configfiles", nargs="+", action="extend", default=[])
    try:
        check_yaml_files(parser.parse_known_args(list(arguments))[0].configfile)
    except RunError as error:
        sys.exit(f"\nslidemake cannot start.\n{error}\n")


def _error(path: str | Path, problems: list[str]) -> RunError:
    listed = "\n  ".join(problems)
    return RunError(f"{path} is not as it should be:\n  {listed}")


def _invalid(error: Exception) -> str:
    return f"it is no valid YAML: {error}"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RunError(f"{path} is not UTF-8 (line {line}). Save it as UTF-8 and run again.") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error


@dataclass
class _Open:
    """A collection that is being read: its anchor, values so far, and of a mapping the keys with their lines."""

    anchor: str | None
    mapping: bool
    values: int = 1
    keys: dict[str, int] = field(default_factory=dict)
    items: int = 0  # nodes directly inside: of a mapping every other one is a key


def problems_of(text: str) -> list[str]:
    """What is wrong with a YAML text, with lines; empty for one that is well."""
    found: list[str] = []
    stack: list[_Open] = [_Open(None, False)]
    sizes: dict[str, int] = {}
    try:
        for event in yaml.parse(text, Loader=_SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent)):
                if isinstance(event, yaml.AliasEvent) and event.anchor not in sizes:
                    inside = any(one.anchor == event.anchor for one in stack)
                    why = "holds itself" if inside else "is nowhere defined"
                    return [*found, f"line {line}: *{event.anchor} {why}"]
                _add(stack[-1], event, line, found, sizes)
            elif isinstance(event, yaml.CollectionStartEvent):
                stack[-1].items += 1
                stack.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
                if len(stack) > DEEPEST:
                    return [*found, f"line {line}: brackets or lists are nested more than {DEEPEST} deep"]
            elif isinstance(event, yaml.CollectionEndEvent):
                done = stack.pop()
                stack[-1].values += done.values
                if done.anchor:
                    sizes[done.anchor] = done.values
            if stack[-1].values > MOST:
                return [*found, f"line {line}: it holds more than {MOST} values when its anchors are followed"]
    except yaml.YAMLError as error:
        found.append(_invalid(error))
    return found


def _add(into: _Open, event: Any, line: int, found: list[str], sizes: dict[str, int]) -> None:
    """Count a scalar or an alias, and compare a key with those before it."""
    if isinstance(event, yaml.AliasEvent):
        into.values += sizes[event.anchor]
    else:
        into.values += 1
        if event.anchor:
            sizes[event.anchor] = 1
        if into.mapping and into.items % 2 == 0:
            if (first := into.keys.get(event.value)) is not None:
                text = f"{event.value} is there already (line {first}), and one would be lost; remove one"
                found.append(f"line {line}: {text}")
            into.keys[event.value] = line
    into.items += 1
