"""What a user reads on the console: numbers and errors in few words, no notes of libraries."""

import logging


def short(number: float) -> str:
    """A count in three digits: 4.21 M."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def binary(count: float) -> str:
    """Bytes in three digits or fewer: 12.5 MiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 1000:
            break
        count, unit = count / 1024, larger
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def one_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of ours that must be one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quieten() -> None:
    """Leave the console to our bar and to errors: other notes are not about what a user did."""
    import datasets  # type: ignore[import-untyped]
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    # It warns at every retry; the last one ends in an error of ours.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
