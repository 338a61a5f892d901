"""Where a study is and when it will end: the lines that a command prints while it trains."""

import contextlib
import shutil
import sys
import time

import common


def duration(s):
    """Seconds as text."""
    if s < 6000:
        return f"{s:.0f} s" if s < 100 else f"{s / 60:.0f} min"
    return f"{s / 3600:.1f} h" if s < 100 * 3600 else f"{s / 86400:.0f} days"


class Progress:
    """Says where a study is and when it will end: one living line on a terminal, in a log a line now and then.

    It is told of every run, whichever process trains it. seconds: the cost of each run by its path.
    """

    def __init__(self, seconds, results, jobs):
        self.seconds, self.results, self.jobs, self.live = seconds, results, jobs, sys.stdout.isatty()
        self.running, self.worked = {}, 0.0       # path -> (share done, text); the cost of what was done here
        self.began, self.said = time.perf_counter(), 0.0
        self.replaced = {path: self.written(path) for path in seconds}      # damaged runs, and those without weights

    def written(self, path):
        """When the run at `path` was finished, or None."""
        with contextlib.suppress(FileNotFoundError):
            return (self.results / path / "run.json").stat().st_mtime_ns

    def __call__(self, path, done, text, line=None, step=1):
        """Tells of the run at `path` that the share `done` of it is done, the last `step` just now and here.

        `text` says so on the living line; without it, the run has ended. `line` is to stay. Without a path: a process
        waits for the runs of others.
        """
        if path is not None:
            before, _ = self.running.pop(path, (0, ""))
            self.worked += (step if text else 1 - before) * self.seconds[path]      # (a resumed run did not begin here)
            if text:
                self.running[path] = done, text
        over = [other for other in self.seconds if self.written(other) not in (None, self.replaced[other])]
        left = sum(self.seconds.values()) - sum(self.seconds[other] for other in over) - sum(
            share * self.seconds[other] for other, (share, _) in self.running.items() if other not in over)
        spent = time.perf_counter() - self.began
        left *= spent / self.worked if self.worked and spent > 5 else 1 / self.jobs
        head, tail = f"[{len(over)}/{len(self.seconds)}] ", f", about {duration(max(0, left))} left"
        now = head + ("; ".join(text for _, text in self.running.values())
                      or "waiting for runs that other processes train") + tail
        if line:
            print("\r\033[K" * self.live + head + line + tail, flush=True)
        if self.live and (self.running or path is None):
            print("\r\033[K" + now[:shutil.get_terminal_size().columns - 1], end="", flush=True)
        elif not self.live and not line and time.perf_counter() - self.said > 30:
            print(now, flush=True)
            if step:                            # (a run that has just begun has nothing to report yet)
                self.said = time.perf_counter()

    def close(self):
        """Leaves the terminal's last line empty, for the prompt or an error."""
        print("\r\033[K" * self.live, end="", flush=True)


def told(run, say):
    """The report of common.train on a run, as messages to a Progress."""
    part, epochs = "validation" if run.settings["validation"] else "test", run.settings["epochs"]

    def report(epoch, history):
        line, error = None, 100 * history[-1][1]["ensemble_error"]
        if epoch == common.DIAGNOSIS[0] and run.lam == 1 and run.settings["members"] > 1:
            line = common.diagnose(run.label, history[-1][0]["member_error"].numpy())
        say(run.path, epoch / epochs, f"{run.label}: epoch {epoch}/{epochs}, {part} error {error:.1f} %", line,
            1 / epochs)
    return report


def outcome(run, result):
    """The line on a finished run."""
    if result["diverged_at_epoch"] is not None:
        return f"{run.label}: DIVERGED at epoch {result['diverged_at_epoch']}"
    remarks = [f"epoch {result['epoch']}"] if "epoch" in result else []
    if result.get("penalty_is_outermost"):
        remarks.append(f"penalty {result['penalty']:g} is at an end of the grid: widen `penalties` in presets.yaml")
    if result.get("fits_not_converged"):
        remarks.append(f"{result['fits_not_converged']} fits of the combiner did not converge: try other `penalties`")
    return f"{run.label}: test error {100 * result['test_ensemble_error']:.2f} %" + f" ({'; '.join(remarks)})" * bool(
        remarks)
