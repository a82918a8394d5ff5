"""Files → conversations → examples → batches.

    formats      files of rows → `Conversation`
    encoding     conversations → `Example`: token ids and labels, by the tokenizer's chat template
    packing      examples → `Pack`: several documents in one row
    collation    examples or packs → tensors
    sources      which samples come in which batch; the embedded task; random batches
    arithmetic   the embedded task itself, in the words of `wordings`
    corpus       the text that the shipped tiny model was pretrained on

What is named here loads without torch; `collation` and `sources` need it and are imported by their own names.
"""

from fastft.data.encoding import IGNORE_INDEX, Encoded, Example, encode
from fastft.data.formats import Conversation, Message, conversation_of, load_rows
from fastft.data.packing import Pack, pack

__all__ = [
    "IGNORE_INDEX",
    "Conversation",
    "Encoded",
    "Example",
    "Message",
    "Pack",
    "conversation_of",
    "encode",
    "load_rows",
    "pack",
]
