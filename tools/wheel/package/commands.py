"""The commands that the wheel installs: each runs a program as `python -m` would."""

from __future__ import annotations

from collections.abc import Callable
from runpy import run_module


def command(program: str) -> Callable[[], None]:
    """What runs a program of the package with the arguments in `sys.argv`."""

    def run() -> None:
        run_module(f"{__package__}.{program}", run_name="__main__", alter_sys=True)

    return run


app = command("app")
baseline = command("baseline")
compare = command("compare")
data = command("data")
main = command("main")
predict = command("predict")
protocol = command("protocol")
report = command("report")
search = command("search")
