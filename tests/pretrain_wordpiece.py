"""Runs one of upstream's scripts, named first, with words that are made up here: masked ones (BERT, T5), or
conversations (``--sft``).

Upstream's own tokenizers for both want the package transformers and a file of words, its reader of conversations the
package datasets.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from megatron.core.tokenizers import MegatronTokenizer

WORDS = 300
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")


class WordPieces:
    """Token ids: the special ones, sentinels of T5, then words; every fourth goes on with the word before it."""

    def __init__(self) -> None:
        sentinels = [f"<extra_id_{i}>" for i in range(20)]
        words = [f"##{i}" if i % 4 == 3 else f"w{i}" for i in range(WORDS)]
        self.vocab = {word: i for i, word in enumerate([*SPECIAL, *sentinels, *words])}
        self.inv_vocab = {i: word for word, i in self.vocab.items()}
        self.pad, self.cls, self.sep, self.mask, self.bos, self.eos = range(len(SPECIAL))
        self.eod, self.unique_identifiers = self.eos, {"class": "WordPieces"}
        self.additional_special_tokens_ids = [self.vocab[word] for word in sentinels]
        self.vocab_size = len(self.vocab)

    def tokenize_conversation(self, conversation: list[dict[str, str]], **_: Any) -> tuple[Any, Any]:
        """Tokens, and what is to be learned of them: what the assistant says."""
        said = [(self.vocab[word], turn["role"]) for turn in conversation for word in turn["content"].split()]
        tokens = np.array([token for token, _ in said])
        return tokens, np.where([role == "assistant" for _, role in said], tokens, -100)


def _tokenizer(*args: Any, **kwargs: Any) -> WordPieces:
    return WordPieces()


def _load_dataset(kind: str, data_files: str, split: str) -> list[Any]:
    return [json.loads(line) for line in Path(data_files).read_text().splitlines()]


if __name__ == "__main__":
    sys.modules["datasets"] = datasets = ModuleType("datasets")
    datasets.load_dataset = _load_dataset  # type: ignore[attr-defined]
    MegatronTokenizer.from_pretrained = _tokenizer
    script = sys.argv.pop(1)
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
