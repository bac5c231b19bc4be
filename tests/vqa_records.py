"""Records of questions as the official files have them, for the tests of `vqa/`."""

from __future__ import annotations

from typing import Any


def gqa_record(answer: str, **changes: Any) -> dict[str, Any]:
    """A question of GQA: "What is on the table?", two steps of reasoning, open."""
    return {
        "question": "What is on the table?",
        "imageId": "1",
        "answer": answer,
        "isBalanced": True,
        "groups": {"global": "thing", "local": "x"},
        "entailed": [],
        "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
        "semantic": [
            {"operation": "select", "argument": "table (1)", "dependencies": []},
            {"operation": "relate", "argument": "_,on,s (2)", "dependencies": [0]},
            {"operation": "query", "argument": "name", "dependencies": [1]},
        ],
    } | changes
