"""Peak of the bytes of live tensors on the CPU, as torch's allocator counts them: temporaries inside operators too."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "measured from here on"


def peak_live_bytes(build: Callable[[], Callable[[], object]]) -> int:
    """The most bytes that are alive at once while `build()()` runs for the second time.

    Counted is what is allocated from the beginning of `build` on, so that model and optimizer have to be made in it. The first
    run makes what lasts from step to step, such as the states of an optimizer.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run = build()
        run()
        with record_function(_MARK):
            run()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = peak = 0
    measuring = False
    for event in events:
        if event.name() == _MARK:
            measuring, peak = True, live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live) if measuring else peak
    return peak
