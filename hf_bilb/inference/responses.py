"""`Responses`: what a language model says to N prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import pandas as pd


class Responses(Sequence[str]):
    """N texts, in the order of the prompts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = list(texts)

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._texts[index]

    def __len__(self) -> int:
        return len(self._texts)

    def to_columns(self, all_classes: bool = False) -> dict[str, list[Any]]:
        """The column `response`."""
        return {"response": list(self._texts)}

    def to_pandas(self) -> pd.DataFrame:
        """A DataFrame with the column `response`."""
        import pandas as pd

        return pd.DataFrame(self.to_columns())

    def to_records(self) -> list[dict[str, Any]]:
        """A dict for each."""
        return [{"response": text} for text in self._texts]
