"""The console script `weightmill`: runs a verb as python -m jobs.VERB does, and provides shell completion."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Sequence

VERBS = (
    "run", "plan", "status", "list", "verify", "lint", "inspect", "diff", "compare", "track", "recommend", "clean",
    "bench",
)  # fmt: skip
# The completion function for bash. Bash splits words at "=" unless COMP_WORDBREAKS says otherwise, so a completed
# "key=value" must be given back without its "key=". zsh runs the same function through bashcompinit.
SCRIPT = """\
_weightmill() {{
    local line="${{COMP_LINE:0:$COMP_POINT}}"
    COMPREPLY=($(weightmill _complete "$line" 2>/dev/null))
    [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *[=.] ]] && compopt -o nospace
    local word="${{line##* }}"
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{word%%=*}}="}}")
    return 0
}}
{load}complete -o default -F _weightmill weightmill
"""
SHELLS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = given[0] if given else "--help"
    if verb in VERBS:
        found = importlib.import_module(f"jobs.{verb}")
        status: int = found.main(given[1:])
        return status
    if verb == "completion":
        if given[1:] and given[1] in SHELLS:
            print(SCRIPT.format(load=SHELLS[given[1]]))
            return 0
        print(f"weightmill: completion: expected one of {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    if verb == "_complete":
        print("\n".join(completions(" ".join(given[1:]))))
        return 0
    if verb == "help":
        shown: int = importlib.import_module("jobs.report.topics").main(given[1:])
        return shown
    if verb in ("-h", "--help"):
        print(overview())
        return 0
    if verb == "--version":
        from importlib.metadata import version

        print(f"weightmill {version('weightmill')}")
        return 0
    from jobs.cli.meant import verb_meant

    print(f"weightmill: {verb_meant(verb, VERBS)}", file=sys.stderr)
    return 2


def overview(only: str | None = None) -> str:
    """Return a list of all verbs, one line each, or the line of one."""
    rows = [f"  {verb:10} {importlib.import_module(f'jobs.{verb}').VERB.summary}" for verb in VERBS]
    rows.append(f"  {'help':10} Explain a verb, a group, a choice or a setting: weightmill help quant=nf4.")
    rows.append(f'  {"completion":10} Complete in your shell: eval "$(weightmill completion bash)" (or zsh).')
    if only is not None:
        return " ".join(next(row for row in rows if row.split()[0] == only).split())
    rows = [line for row in rows for line in textwrap.wrap(row, 80, subsequent_indent=" " * 13)]
    return "\n".join(["usage: weightmill VERB [key=value ...]   (or python -m jobs.VERB; VERB --help)", "", *rows])


def completions(line: str) -> list[str]:
    """Return the completions of a command line's last word: verbs, groups and their options, settings."""
    words = [*line.split()[1:], *([""] if line.endswith(" ") else [])]
    if len(words) <= 1:
        return [v for v in (*VERBS, "help", "completion") if v.startswith(words[0] if words else "")]
    if words[0] == "completion":
        return [shell for shell in SHELLS if shell.startswith(words[-1])]
    is_help = words[0] == "help"
    if is_help and len(words) > 2 and words[1] in VERBS:
        words = words[1:]
    if words[0] not in (*VERBS, "help"):
        return []
    from jobs.cli.compose import files_of
    from jobs.cli.help import chosen_settings, default_of, settings_of, words_of

    verb = importlib.import_module(f"jobs.{'run' if words[0] == 'help' else words[0]}").VERB
    word = words[-1]
    group, equals, start = word.partition("=")
    choices = files_of(verb.config or verb.name)
    if equals:
        *before, last = start.split(",")
        lead = "".join(f"{b}," for b in before)
        options = tuple(choices.get(group, ())) or words_of(verb.spec, group) or default_of(verb, words, group)
        return [f"{group}={lead}{option}" for option in options if option.startswith(last)]
    settings = settings_of(verb.spec) if is_help else chosen_settings(verb, words)
    end = "" if is_help else "="
    names = [f"{group}=" for group in choices] + [f"{key}{end}" for key in settings]
    names += [*choices, *(VERBS if words[0] == "help" else ())] if is_help else []
    return sorted(name for name in names if name.startswith(word))


def script() -> None:
    """Run the console script and end the process."""
    from jobs.cli.early import watch

    watch()
    from jobs.cli.console import patient_streams
    from jobs.cli.verb import leave

    with patient_streams():
        status = main()
    leave(status)


if __name__ == "__main__":
    script()
