"""The default name of an output: the model, the preset, and what the request has that they have not.

Another request has another name, as far as it makes something else: demo-nf4, demo-nf4-g128-dq, demo-auto-mlx-4.25bits.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from loaders.presets.naming import joined, word_of, words_of
from loaders.storage.hashes import text_digest

if TYPE_CHECKING:
    from jobs.spec.job import JobSpec

# The container that conf/output gives to a layout needs no word.
USUAL = {"hf": "safetensors", "hqq": "pytorch", "mlx": "safetensors", "gguf": "gguf", "packed": "packed",
         "diffusers": "safetensors"}  # fmt: skip

# Settings of output that say where it goes and not what it is; a card is not the model.
PLACE = ("root", "path", "overwrite", "suffix", "named", "private", "branch", "commit_message", "journal")
OWN_WORDS = (*PLACE, "layout", "container", "split", "card", "dtype")
USUAL_DTYPE = "auto"  # of conf/output; OutputSpec's own default is that of reports from before there was the setting


def output_name(spec: JobSpec) -> str:
    """Return the default name of a job's output, without a branch, in characters that every store takes."""
    model = re.sub(r"[^\w.\-]+", "_", spec.model_name)
    return f"{model}{spec.transform.label}-{spec.quant.name}{joined(_words(spec))}{spec.output.suffix}"


def _words(spec: JobSpec) -> list[str]:
    """Return the words for what changes the result, or its form."""
    source, output, rules = spec.source.container, spec.output, [rule.model_dump() for rule in spec.rules]
    words = words_of(spec.quant, [key.removeprefix("quant.") for key in output.named])
    words += spec.model.components_to_quantize or ()
    words += [f"from-{source}"] if source != "auto" else []
    is_named = output.layout == "auto" or spec.quant.name.startswith(output.layout)
    words += [] if is_named else [output.layout]
    words += [] if output.container in ("auto", USUAL.get(output.layout)) else [output.container]
    words += ["split"] if output.split else []
    forms = {key: field.default for key, field in type(output).model_fields.items() if key not in OWN_WORDS}
    words += [word_of(key, value) for key, default in forms.items() if (value := getattr(output, key)) != default]
    words += [] if output.dtype == USUAL_DTYPE else [word_of("kept_dtype", output.dtype)]
    words += [f"mtp-{spec.mtp}"] if spec.mtp != "auto" else []
    return words + ([f"rules-{text_digest(json.dumps(rules))[:6]}"] if rules else [])
