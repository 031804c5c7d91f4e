"""`python -m slidemake VERB ...`: what can be done with results beside the workflow."""

from __future__ import annotations

import sys

VERBS = {"verify": "slidemake.workflow.verify"}  # verb -> module with main(arguments) -> exit code


def main(arguments: list[str]) -> int:
    """Run the verb that is named first. Returns the exit code: that of the verb, 2 where there is no such verb."""
    from importlib import import_module

    verb = arguments[0] if arguments else "--help"
    if verb in VERBS:
        return import_module(VERBS[verb]).main(arguments[1:])
    told = "\n".join(f"  {name:10} {_title(module)}" for name, module in VERBS.items())
    text = f"usage: python -m slidemake VERB [--help] ...\n\n{told}\n"
    if verb in ("-h", "--help"):
        print(text)
        return 0
    print(f"slidemake has no verb {verb!r}.\n{text}", file=sys.stderr)
    return 2


def _title(module: str) -> str:
    from importlib import import_module

    return (import_module(module).__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
