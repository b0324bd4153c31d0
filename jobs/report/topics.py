"""Explain a verb, a group of choices, one choice or one setting: weightmill help quant=nf4."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.cli.choices import fault_of
from jobs.cli.compose import FOLDER, choices_of, files_of
from jobs.cli.help import choice_lines, group_text, help_text, setting_lines, settings_of, whole_text
from jobs.cli.main import VERBS, overview
from jobs.cli.meant import choice_problem, key_hint
from jobs.cli.verb import Verb
from loaders.near_misses import ELSEWHERE, meant, plain

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the pages about some words and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    folders = tuple(Path(a.removeprefix(FOLDER)).expanduser() for a in given if a.startswith(FOLDER))
    words = [a for a in given if not a.startswith("-")]
    if not words:
        print(overview())
        return 0
    if words in (["completion"], ["help"]):
        print(overview(words[0]))
        return 0
    verb = _verb(words.pop(0)) if words[0] in VERBS else None
    if verb is not None and words in ([], [ALL]):
        print((whole_text if words else help_text)(verb, folders))
        if verb.name in choices_of("run"):  # verify is a verb, and a group of run's
            print(f"\n{group_text(_verb('run'), verb.name, folders)}")
        return 0
    status = 0
    for index, word in enumerate(words):
        page, problem = page_of(word, verb, folders)
        if problem:
            print(f"weightmill: help: {problem}", file=sys.stderr)
            status = 2
        else:
            print(("\n" if index else "") + page)
    return status


def page_of(word: str, verb: Verb[Any] | None, folders: tuple[Path, ...] = ()) -> tuple[str, str]:
    """Return the page about a word, or the problem that there is none.

    The word is a group, a choice (group=option) or a setting of the verb; without a verb, of the first that has it.
    """
    key, equals, option = word.partition("=")
    key = key.lstrip("+")
    verbs = [verb] if verb is not None else [_verb(name) for name in VERBS]
    for each in verbs:
        config = each.config or each.name
        groups = choices_of(config, folders)
        settings = settings_of(each.spec)
        if equals and key in groups:
            if option not in groups[key]:
                return "", choice_problem(key, option, groups[key])
            path = files_of(config, folders)[key][option]
            wrong = fault_of(path, key, groups)
            return ("", wrong) if wrong else ("\n".join([*choice_lines(each, key, path), *_loading(key, path)]), "")
        if key in groups or any(name.startswith(f"{key}.") for name in settings):
            return group_text(each, key, folders), ""
        if key in settings:
            lines = group_text(each, key, folders).splitlines()[1:] if key == "rules" else setting_lines(each, key)
            return "\n".join(lines), ""
    return "", _unknown(word, verbs, folders)


def _unknown(word: str, verbs: Sequence[Verb[Any]], folders: tuple[Path, ...]) -> str:
    """Say what was meant by a word that is neither a verb, a group, a choice nor a setting."""
    quants = choices_of("run")["quant"]
    if plain(word) in ELSEWHERE and plain(word) not in map(plain, quants):
        return choice_problem("quant", word, quants)
    for verb in verbs:
        for group, options in choices_of(verb.config or verb.name, folders).items():
            if (option := meant(word, options)) is not None:
                return f"{word}: is it {group}={option}? weightmill help {group}={option}"
    keys = [key for verb in verbs for key in (*choices_of(verb.config or verb.name), *settings_of(verb.spec))]
    hint = key_hint(word.partition("=")[0], keys)
    return f"{word}: expected a verb ({', '.join(VERBS)}), a group, GROUP=NAME or a setting{hint}"


def _verb(name: str) -> Verb[Any]:
    found: Verb[Any] = importlib.import_module(f"jobs.{name}").VERB
    return found


def _loading(group: str, path: Path) -> list[str]:
    """Return which engine loads what a choice of a quantization, or of an output, writes; and the command for it."""
    from jobs.report.loading import loaded_by

    lines = loaded_by(group, path.stem)
    example = f"weightmill run model.path=DIR {group}={path.stem} output.path=OUT"
    return [*(["", *lines] if lines else []), *(["", f"example: {example}"] if group in ("quant", "output") else [])]


if __name__ == "__main__":
    sys.exit(main())
