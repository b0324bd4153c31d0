"""List the journals of interrupted jobs, and cached logits, and delete them if told to: weightmill clean."""

from __future__ import annotations

import sys
from dataclasses import replace

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Columns, Format, Location, Spec
from jobs.spec.store import StoreSpec
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.settings import StoreSettings

ON_THE_HUB = Address("hf://")


class CleanedFolder(Spec):
    """The folder or the output to clean."""

    root: Location = Field(description="a folder of outputs to look into")
    path: Location | None = Field(description="only what belongs to this output, or lies in this folder of outputs")
    journal: Location | None = Field(default=None, description="where journals of outputs on the Hub are, if not here")


class CleanSpec(Spec):
    """The settings of `clean`."""

    output: CleanedFolder
    delete: bool = Field(description="delete what is listed, as far as no job is at work on it")
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")
    columns: Columns = "fit"

    @property
    def store_settings(self) -> StoreSettings:
        return replace(self.store.settings, journal=self.output.journal)


def act(spec: CleanSpec) -> Said:
    """Find what jobs left behind, and with `delete` remove what no process holds."""
    from jobs.output.former_root import former_root
    from jobs.output.leftovers import find_leftovers, leftover_document, remove
    from jobs.report.leftovers import leftovers_text

    only = None if spec.output.path is None else Address.of(spec.output.path)
    place = only.parent if only is not None else Address.of(spec.output.root)
    found, places = find_leftovers(place, None if only is None else only.name), [place]
    if only is None and place.is_local and (former := former_root(place.path)) is not None:
        found, places = (*found, *find_leftovers(Address(str(former)))), [place, Address(str(former))]
    # A folder may be of outputs, too.
    if only is not None and only.is_local and open_store(only).absence() is None:
        found, places = (*found, *find_leftovers(only)), [only, place]
    rows = [leftover_document(leftover, will_remove=spec.delete) for leftover in found]
    # These are of no folder: who wants them gone says so, by the output or its owner.
    apart = find_leftovers(ON_THE_HUB) if only is None and place.is_local else ()
    rows += [leftover_document(leftover, will_remove=False) for leftover in apart]
    left = 0 if spec.delete else sum(leftover.size for leftover in found if not leftover.is_held)
    if spec.delete:
        remove(found)
    text = leftovers_text(rows, places, deletable=left, of_the_hub=len(apart))
    return Said({"status": "done", "delete": spec.delete, "found": rows}, text)


VERB = Verb(
    name="clean",
    is_said=False,
    summary="List what interrupted jobs left beside their outputs; delete=true deletes it, and they can then no longer"
    " be resumed. The originals' logits that verify=logits keeps there go, too; they are computed again when needed.",
    spec=CleanSpec,
    act=act,
    examples=(
        ("", "list what is in output.root"),
        ("delete=true", "and delete it"),
        ("OUT delete=true", "what was left of one output, or in a folder of outputs; the same as output.path=OUT"),
        ("output.root=hf://OWNER", "of outputs on the Hub, whose journals are in your cache, or in output.journal"),
    ),
    positional=("output.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
