"""What a search shows: on a terminal a progress bar and the best trials, elsewhere a line for each run."""

from collections.abc import Iterable

from flowctr.tuning.ledger import Ledger, Run
from flowctr.tuning.outcome import best_table, monitor_name, ranked
from flowctr.tuning.space import Space
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Display:
    """Shows a search, as a context.

    Args:
        space: The space.
        ledger: The ledger, which the display reads.
        total: Number of runs that the search is to have.
    """

    def __init__(self, space: Space, ledger: Ledger, total: int):
        self._space, self._ledger, self._total = space, ledger, total
        self._console = Console(soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._task = self._progress.add_task("", total=total)
        self._live = Live(console=self._console, transient=True) if self._console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error) -> None:
        if self._live:
            self._live.stop()

    def show(self, running: Iterable[str]) -> None:
        """Shows the state of the ledger, and what runs."""
        self._progress.update(self._task, completed=self._done, description=", ".join(running))
        if self._live:
            best = ranked(self._ledger, self._space)
            self._live.update(Group(best_table(best, self._space), self._progress) if best else self._progress)

    def ended(self, run: Run) -> None:
        """Tells of a run that has just ended."""
        value = f": valid {monitor_name(self._space)} {run['value']:.6f}" if "value" in run else ""
        attempt = f", attempt {run['attempts']}" if run["attempts"] > 1 else ""
        name = f"{run['trial']}-s{run['seed']}"
        self._console.print(
            f"[{self._done}/{self._total}] {name} {run['state']} in {run['seconds']:.0f} s{attempt}{value}",
            markup=False,
        )

    @property
    def _done(self) -> int:
        return len(self._ledger.of_state("finished", "pruned", "failed"))
