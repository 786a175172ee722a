"""Seconds from `import probgen` to the first printed loss, as in a fresh notebook."""

import resource
import time


def measured(model: str) -> dict[str, float]:
    """Wall and processor seconds until the first loss is shown, and until each line before it was done."""
    began, laps = time.perf_counter(), {}

    def lap(name: str) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        laps.setdefault(name, time.perf_counter() - began)
        laps.setdefault(f"{name} (processor)", used.ru_utime + used.ru_stime)

    import probgen

    lap("import")
    data = probgen.load_data("digits")
    program = probgen.load(model, data)
    lap("load")
    from probgen.fit.progress import Progress

    show = Progress.show

    def timed(self: Progress, step: int, loss: float, valid_loss: float | None = None) -> None:
        show(self, step, loss, valid_loss)
        lap("first loss")

    Progress.show = timed
    probgen.fit(program, data, epochs=1)
    lap("fit")
    return laps
