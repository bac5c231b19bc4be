"""Human scores of AI-generated images, predicted by a fine-tuned CLIP; and answers to questions about images.

from image_scores import Scorer
scorer = Scorer.load("runs/demo/best")
print(scorer.score(["a.png", "b.png"], ["a red circle", "a blue square"]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.scorer import Scorer

__all__ = ["Scorer"]


def __getattr__(name: str) -> object:
    """Import `Scorer`, and torch with it, when it is asked for: commands answer --help without."""
    if name != "Scorer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serving.scorer import Scorer

    return Scorer
