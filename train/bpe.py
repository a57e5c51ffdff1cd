"""`mas fit-bpe`: the text tokenizer, fitted on the captions of shards.

In: photo or scene shards. Out: tokenizer.json. Captions are streamed; all captions of a picture
count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mas.shards import ShardError, expand_shards, read_captions, read_shard
from mas.text import Tokenizer

logger = logging.getLogger(__name__)


def fit_bpe(
    *,
    input: str,
    output: str,
    vocab_size: int = 16384,
    length: int = 64,
    lowercase: bool = True,
) -> None:
    """Fits the text tokenizer on all captions of photo or scene shards.

    Args:
        input: folder of shards, 'DIR/{00000..00099}.tar' or one tar.
        output: the tokenizer.json to write; another one that is there already is not replaced.
        vocab_size: entries of the vocabulary; few captions give fewer.
        length: tokens a caption is padded or cut to.
        lowercase: turn captions into lower case, here and whenever they are encoded.
    """
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; name a file, such as {path}/tokenizer.json")
    there = Tokenizer.from_file(path) if path.exists() else None
    another = (
        f"{path}: holds another tokenizer, which tokens and networks may have been made with; "
        "choose another --output or remove that file"
    )
    if there is not None and (there.length != length or there.vocab_size > vocab_size):
        raise ValueError(another)  # without reading all captions first
    captions = _captions(expand_shards(input))
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.fit(captions, vocab_size=vocab_size, length=length, lowercase=lowercase)
    if there is None:
        tokenizer.save(path)
    elif there.content != tokenizer.content:
        raise ValueError(another)
    found = tokenizer.vocab_size
    print(f"{path}: {found} entries, {tokenizer.length} tokens a caption")
    if found < vocab_size:
        print(
            f"the captions give no more than {found}: train the GPT with "
            f"--model.network.text_vocabulary {found}"
        )


def _captions(paths: list[str]) -> Iterator[str]:
    skipped = 0
    for path in tqdm(paths, desc="captions", unit="shard", disable=None):
        for sample in read_shard(path):
            try:
                captions = read_captions(sample)
                "".join(captions).encode()  # JSON can spell what is no Unicode
            except (ShardError, UnicodeEncodeError):
                skipped += 1
            else:
                yield from captions
    if skipped:
        logger.warning("%d samples have captions that cannot be read; left out", skipped)
