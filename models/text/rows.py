"""Token ids against the rows of the embedding table: an id without a row would be read as NaN."""

from collections.abc import Iterable

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.models.text.tokenizer import Tokenizer


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raises CheckpointError if prompts could not be written with this tokenizer and a table of `rows` rows.

    Tokens that were added without resizing the table do no harm as long as no prompt holds one, so they are left to
    `check_rows`: padding takes another id, and an end that cannot be generated is met by `read_config`. A row must have
    every word of the vocabulary proper, and what the tokenizer puts in front of every prompt or behind it.
    """
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    added = set(tokenizer.backend.get_added_tokens_decoder())
    wrong = {i: token for token, i in vocabulary.items() if i >= rows and i not in added}
    if wrong:
        first = min(wrong)
        raise CheckpointError(
            f"the token {wrong[first]!r} of tokenizer.json has the id {first}, but the model's embedding table has "
            f"{rows} rows (vocab_size), and {len(wrong)} tokens have none: the tokenizer belongs to another model"
        )
    for token_id in tokenizer.encode(""):
        if token_id >= rows:
            raise CheckpointError(
                f"the tokenizer adds {tokenizer.id_to_token(token_id)!r} to every prompt, whose id {token_id} has no "
                f"row in the model's embedding table of {rows} rows (vocab_size): resize the embeddings of the "
                "fine-tuned model and save it again, or take its original tokenizer"
            )


def check_rows(token_ids: Iterable[int], rows: int, tokenizer: Tokenizer, where: str) -> None:
    """Raises InputError, naming the first token without a row, unless every id is below `rows`.

    Args:
      token_ids: of one prompt or text.
      rows: of the model's embedding table.
      tokenizer: names the token.
      where: names the prompt, such as "row 0".
    """
    wrong = next((int(i) for i in token_ids if not 0 <= i < rows), None)
    if wrong is not None:
        raise InputError(
            f"{where}: the token {tokenizer.id_to_token(wrong)!r} has the id {wrong}, but the model's embedding table "
            f"has {rows} rows (0 to {rows - 1}): leave it out of the prompt, or resize the embeddings of the "
            "fine-tuned model and save it again"
        )


def check_image_token(tokenizer: Tokenizer, token: str, expected: int) -> None:
    """Raises CheckpointError unless a visual token has the id that `config.json` says."""
    found = tokenizer.token_to_id(token)
    if found != expected:
        raise CheckpointError(
            f"the image token {token!r} has the id {found} in tokenizer.json, but config.json says {expected}: the "
            "tokenizer belongs to another model, or lacks the added image token"
        )
