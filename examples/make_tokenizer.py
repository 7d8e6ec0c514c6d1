"""Make ``examples/tokenizer``: a small real tokenizer in the layout of Step-3.7-Flash.

Byte-level BPE over our captions and a page of plain English, a few hundred merges, with the special
tokens that the multimodal template needs. Training is deterministic: a rerun writes the same bytes.

Run ``python -m examples.make_tokenizer`` after a change to the captions or the corpus.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
VOCABULARY = 768
BOS = "<|begin_of_text|>"
CONTROL = (BOS, "<|im_start|>", "<|im_end|>")
IMAGE = (
    "<im_start>",
    "<im_patch>",
    "<im_end>",
    "<patch_start>",
    "<patch_newline>",
    "<patch_end>",
)
THINK = ("<think>", "</think>")

# Digits one by one, runs of line ends in one piece: what large tokenizers do, and what makes an
# empty reasoning block ("<think>\n" + "\n</think>") merge two line ends into one token.
PIECES = r"\s*[\r\n]+|\d|[^\s\d\w]+|\s?\w+|\s+"

PLAIN_ENGLISH = """
Describe this image in one sentence. What do you see in this picture? Please answer in a few words.
system user assistant tool tool_response You are a helpful assistant that describes pictures.
The user asks for a short description, so I look at the picture first and then write one sentence.
A dog runs through the grass with a ball in its mouth. Two children play in the water on a beach.
A man in a blue shirt rides a bicycle down the street. A woman in a red dress walks along a river.
A group of people stand in front of a building. A boy jumps over a stone wall. Snow covers the hill.
Several girls sit on a bench and talk to each other. A brown horse stands behind a wooden fence.
It is not easy to tell what the small black dog is looking at, but there may be a bird in the tree.
There are one, two, three, four, five, six, seven, eight, nine or ten things in the photograph.
The cup on the left is larger than the cup on the right, and both are made of white glass.

Because the light comes from above, the shadow falls below the table.

When the sun goes down, the sky turns orange, then red, then dark blue, and the first stars shine.
"""


def corpus(metadata: Path) -> list[str]:
    """Captions of ``metadata`` and the plain English above, paragraph by paragraph."""
    with metadata.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    captions = [text for row in rows for key, text in row.items() if key.startswith("caption_")]
    # The empty reasoning block is repeated so that its double line end becomes a merge.
    return captions * 4 + PLAIN_ENGLISH.splitlines() * 4 + ["\n\n"] * 64


def train(texts: list[str]) -> Tokenizer:
    """Byte-level BPE whose first ids are the control tokens: BOS is 0, as in Step-3.7-Flash."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True) for text in (*CONTROL, *IMAGE)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINK])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metadata", type=Path, default=HERE / "flickr8k_mini/train/metadata.csv")
    parser.add_argument("--out", type=Path, default=HERE / "tokenizer")
    arguments = parser.parse_args()
    tokenizer = train(corpus(arguments.metadata))
    save(tokenizer, arguments.out)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
