"""How a call is refused: with a ValueError of one line. No tests: these import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refusal(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
