"""Train the demonstration model in ``jobs/demo``: a Llama of 1.9 M parameters, in some 40 minutes on a CPU.

The text is the reST source of the Python 3.11 documentation (PSF licence), as Debian 12 packages it. The markup, the
literal blocks and the directives are stripped and the prose paragraphs kept; every 20th document is held out. To
repeat it:

    apt-get download python3.11-doc
    dpkg -x python3.11-doc_*.deb demo_text
    python -m jobs.benchmarks.train_demo demo_text/usr/share/doc/python3.11/html/_sources jobs/demo

The result was made with torch 2.13 (CPU, 2 threads), transformers 5.23 and tokenizers 0.23. The seed is fixed, so
another run on a similar machine should give the same model; other versions or thread counts give one about as good.
The model card, ``README.md``, is written by hand from the numbers that the last lines print.

A second model, to evaluate what was tuned on the first, has another architecture (Qwen3: norms on queries and keys, an
untied head) and another text (PostgreSQL's manual). It takes some 25 minutes:

    apt-get download postgresql-doc-15
    dpkg -x postgresql-doc-15_*.deb manual
    python -m jobs.benchmarks.train_demo manual/usr/share/doc/postgresql-doc-15/html second \
        --architecture qwen3 --steps 1300 --held-out held_out.txt
"""

import argparse
import html
import math
import re
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

SEED = 20
THREADS = 2
BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB = 1024
SEQUENCE = 256
BATCH = 8
STEPS = 4800
WARMUP = 100
REPORT_EVERY = 200
LEARNING_RATE = 3e-3
HELD_OUT_EVERY = 20
MARKUP: list[tuple[str, str]] = [
    (r":[\w:+-]+:`!?([^`<]+?)\s*<[^`>]*>`", r"\1"),  # :role:`text <target>`
    (r":[\w:+-]+:`[!~]?([^`]*)`", r"\1"),  # :role:`text`
    (r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1"),  # `text <address>`_
    (r"``?([^`]+)``?(__?\b)?", r"\1"),  # ``text`` and `text`_
    (r"\*\*?(\w[^*]*)\*\*?", r"\1"),  # *text* and **text**
    (r"\|(\w+)\|", r"\1"),  # |substitution|
    (r"^([*-]|#\.|\d+\.|\(\w+\))\s+", ""),  # list marker
    (r"\\(\W)", r"\1"),  # escaped character
    (r" ::$", ""),  # literal block announced apart
    (r"::$", ":"),  # literal block announced at a sentence's end
]


def prose(source: str, is_html: bool = False) -> str:
    """Return the paragraphs of a reST or HTML document that read as sentences, one per line, without markup."""
    kept = []
    for block in re.findall(r"(?s)<p>(.*?)</p>", source) if is_html else re.split(r"\n\s*\n", source):
        text = " ".join((html.unescape(re.sub(r"<[^>]*>", "", block)) if is_html else block).split())
        for pattern, plain in () if is_html else MARKUP:
            text = re.sub(pattern, plain, text)
        if re.match(r"[A-Z\"'(]", text) and text.endswith((".", ":", "?", "!")) and text.count(" ") >= 4:
            kept.append(text)
    return "\n".join(kept)


def read_documents(folder: Path) -> tuple[list[str], list[str]]:
    """Return the documents under a folder, sorted, as (training, held out); those without prose are left out."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in {".txt", ".rst", ".html"} and path.is_file())
    texts = [text for path in paths if (text := prose(path.read_text(encoding="utf-8"), path.suffix == ".html"))]
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    del texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return texts, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer like GPT-2's, which puts <|bos|> before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=2 * SEQUENCE
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Encode the texts as one stream of token ids, each text between <|bos|> and <|eos|>."""
    return torch.tensor(
        [token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    )


def build_model(tokenizer: PreTrainedTokenizerFast, architecture: str) -> PreTrainedModel:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * SEQUENCE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture == "qwen3":
        config = Qwen3Config(
            **common, intermediate_size=256, num_hidden_layers=4, head_dim=32, tie_word_embeddings=False
        )
        return Qwen3ForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(**common, intermediate_size=512, num_hidden_layers=3, tie_word_embeddings=True))


def window_loss(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return the mean nats per token over equal windows, of which every token but the first is predicted."""
    logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, stream: Tensor) -> float:
    """Return the nats per token over the stream's whole windows, each of which starts without context."""
    windows = stream.unfold(0, SEQUENCE + 1, SEQUENCE)
    total = math.fsum(window_loss(model, batch).item() * len(batch) for batch in windows.split(BATCH))
    return total / len(windows)


def train(model: PreTrainedModel, stream: Tensor, held_out: Tensor, bytes_per_token: float, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    started = time.monotonic()
    recent = 0.0
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - SEQUENCE, (BATCH, 1))
        loss = window_loss(model, stream[starts + torch.arange(SEQUENCE + 1)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent += loss.item() / REPORT_EVERY
        if step % REPORT_EVERY == 0:
            report = describe(mean_loss(model, held_out), bytes_per_token)
            elapsed = time.monotonic() - started
            print(f"step {step}, {elapsed:.0f} s: train loss {recent:.4f}; held out: {report}", flush=True)
            recent = 0.0


def describe(loss: float, bytes_per_token: float) -> str:
    return f"perplexity {math.exp(loss):.3f}, {loss / math.log(2) / bytes_per_token:.4f} bits per byte"


def unigram_loss(stream: Tensor, held_out: Tensor) -> float:
    """Return the nats per token if each token is predicted by its add-one frequency in the training stream."""
    counts = Counter(stream.tolist())
    log_total = math.log(len(stream) + VOCAB)
    return sum(log_total - math.log(counts[token] + 1) for token in held_out.tolist()) / len(held_out)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in bfloat16, as three shards, with its tokenizer."""
    model.bfloat16().save_pretrained(folder, max_shard_size="1400KB")
    tokenizer.save_pretrained(folder)
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("text_dir", type=Path, help="folder of *.txt, *.rst and *.html files")
    parser.add_argument("out_dir", type=Path, help="folder to save the model in")
    parser.add_argument("--architecture", choices=("llama", "qwen3"), default="llama")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--held-out", type=Path, help="file to write the held-out text to")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)

    texts, held_out_texts = read_documents(arguments.text_dir)
    if arguments.held_out is not None:
        arguments.held_out.write_text("\n".join(held_out_texts), encoding="utf-8")
    tokenizer = train_tokenizer(texts)
    stream, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    bytes_per_token = sum(len(text.encode()) for text in held_out_texts) / len(held_out)
    print(f"{len(texts)} documents, {len(stream)} tokens; held out: {len(held_out_texts)}, {len(held_out)} tokens")

    model = build_model(tokenizer, arguments.architecture)
    train(model, stream, held_out, bytes_per_token, arguments.steps)
    save(model, tokenizer, arguments.out_dir)
    saved = AutoModelForCausalLM.from_pretrained(arguments.out_dir, dtype=torch.float32)
    print("saved model:", describe(mean_loss(saved, held_out), bytes_per_token))
    print("unigram baseline:", describe(unigram_loss(stream, held_out), bytes_per_token))
    print("uniform baseline:", describe(math.log(VOCAB), bytes_per_token))


if __name__ == "__main__":
    main()
