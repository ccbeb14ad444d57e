"""Token ids against the rows of the embedding table: an id without a row would be read as NaN."""

from collections.abc import Iterable

from vlcache_jax.errors import InputError
from vlcache_jax.models.processing.tokenizer import Tokenizer


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


def padding_id(tokenizer: Tokenizer, rows: int) -> int:
    """An id with a row, for the end of a padded prompt: the tokenizer's if it has one, else 0. It is never attended."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id < rows else 0
